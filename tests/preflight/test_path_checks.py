"""Barriers and their noise, on answers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mergemix.preflight.path_checks import Answers, Barrier, barriers_of, path_checks


def answers(values: list[float], weights: list[float] | None = None) -> Answers:
    return Answers(np.array(values), np.ones(len(values)) if weights is None else np.array(weights))


def test_means_weigh_tokens_and_their_noise_is_that_of_repeated_draws() -> None:
    assert answers([1, 4], [3, 1]).mean == 1.75
    assert answers([1, 2, 3, 4]).noise == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert answers([5]).noise == math.inf
    rng = np.random.default_rng(0)
    drawn = [
        answers(list(weights * 0.1 + rng.normal(size=50)), list(weights))
        for weights in rng.integers(1, 40, size=(2000, 50)).astype(float)
    ]
    means = [each.mean - 0.1 * np.average(each.weights, weights=each.weights) for each in drawn]
    typical = np.median(
        [answers(list(each.values - 0.1 * each.weights), list(each.weights)).noise for each in drawn]
    )
    assert np.std(means) == pytest.approx(typical, rel=0.1)


def test_a_barrier_is_the_worst_point_above_the_straight_line() -> None:
    """Losses 1 and 3 at the ends: the line is at 1.5, 2 and 2.5."""
    ends = {"a": {"math": answers([1, 1.2])}, "b": {"math": answers([3, 3.2])}}
    points = [(0.25, 1.8), (0.5, 2.7), (0.75, 2.9)]
    [found] = barriers_of(
        "a", "b", ends, [(at, {"math": answers([loss, loss + 0.2])}) for at, loss in points]
    )
    assert (found.begin, found.end, found.name, found.at) == ("a", "b", "math", 0.5)
    assert found.height == pytest.approx(0.7)
    assert found.noise == pytest.approx(0, abs=1e-12), "items differ alike everywhere: differences are paired"
    assert found.relative == pytest.approx(0.7 / 2.1)


def test_items_without_a_score_are_left_out() -> None:
    """Of what all three models answered; and nothing is said of a line on which that is no item."""
    nan = math.nan
    assert answers([1, nan, 3]).mean == 2
    assert answers([1, nan, 3]).noise == answers([1, 3]).noise
    ends = {"a": {"math": answers([1, 1, 9])}, "b": {"math": answers([nan, 1, 1])}}
    [found] = barriers_of("a", "b", ends, [(0.5, {"math": answers([0, 2, nan])})])
    assert found.height == 1
    assert barriers_of("a", "b", ends, [(0.5, {"math": answers([0, nan, nan])})]) == []


def test_scores_have_the_other_sign() -> None:
    """Accuracies of 0.8 at the ends and 0.4 between them, as answers with their sign changed."""
    ends = {"a": {"gsm": answers([-0.8, -0.8])}, "b": {"gsm": answers([-0.8, -0.8])}}
    [found] = barriers_of("a", "b", ends, [(0.5, {"gsm": answers([-0.4, -0.4])})])
    assert found.height == pytest.approx(0.4)
    assert found.relative == pytest.approx(0.5)
    [check] = path_checks(ends, [found], {}, unit="of the score", losses=False)
    assert check.verdict == "do not trust"
    assert "below" in check.why


@pytest.mark.parametrize(
    ("height", "noise", "expected"),
    [(0.01, 0.001, "fine"), (0.05, 0.001, "doubtful"), (0.2, 0.001, "do not trust"), (0.2, 0.1, "fine"),
     (0.2, math.inf, "fine"), (-0.5, 0.001, "fine")],
)  # fmt: skip
def test_a_barrier_counts_beyond_its_noise(height: float, noise: float, expected: str) -> None:
    ends = {name: {"math": answers([1.0])} for name in ("a", "b", "uniform")}
    [check] = path_checks(
        ends, [Barrier("a", "b", "math", 0.5, height, noise, height)], {}, unit="nats", losses=True
    )
    assert check.verdict == expected


def own_ends(expert: float, uniform: float) -> dict[str, dict[str, Answers]]:
    """The base at 1 on two domains, with items that differ by far more than the models do."""
    spread = np.linspace(0, 3, 30)
    wiggle = 0.001 * np.sin(np.arange(30))

    def at(mean: float) -> Answers:
        return Answers(mean + spread + (wiggle if mean != 1 else 0), np.ones(30))

    return {
        "base": {"a": at(1.0), "b": at(1.0)},
        "a": {"a": at(expert), "b": at(1.0)},
        "b": {"a": at(1.0), "b": at(0.9)},
        "uniform": {"a": at(uniform), "b": at(uniform)},
    }


@pytest.mark.parametrize(
    ("expert", "uniform", "learned", "merge"),
    [
        (0.9, 0.95, "fine", "fine"),
        (0.9, 1.02, "fine", "fine"),
        (0.9, 1.12, "fine", "doubtful"),
        (0.9, 1.4, "fine", "do not trust"),
        (1.0, 0.95, "doubtful", "fine"),
        (1.05, 0.95, "do not trust", "fine"),
        (1.2, 0.95, "do not trust", None),
    ],
)
def test_experts_must_learn_and_their_merge_must_keep_it(
    expert: float, uniform: float, learned: str, merge: str | None
) -> None:
    checks = path_checks(own_ends(expert, uniform), [], {"a": "a", "b": "b"}, unit="nats", losses=True)
    found = {check.name: check.verdict for check in checks}
    assert found["learned"] == learned
    assert found.get("merge") == merge


def test_without_a_base_or_own_domains_nothing_is_said_of_learning() -> None:
    ends = own_ends(0.9, 0.95)
    assert path_checks(ends, [], {}, unit="nats", losses=True) == []
    del ends["base"]
    assert path_checks(ends, [], {"a": "a"}, unit="nats", losses=True) == []
