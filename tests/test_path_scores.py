"""Lines between experts, on an engine whose loss is a known function of the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import EngineError
from mergemix.evals.benchmark import Context, load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.mixture import Mixture
from mergemix.path_scores import NO_LOSS, SuiteQuestions, TextQuestions, between, measure_paths
from mergemix.preflight.texts import Snippet
from mergemix.serve.engine import Engine, Likelihood, LogLikelihood, Output, Request, Swap
from tests.merge.families import tiny_family
from tests.study_fixture import TinyStudy


class Bowl(Engine):
    """The loss of every text is `curvature` times the squared distance from the base's weights, zero, each token."""

    kind = "toy"

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature
        self.applied: list[Mixture] = []

    def apply(self, mixture: Mixture) -> Swap:
        self.applied.append(mixture)
        return Swap(0.0, 0)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        squared = float(np.sum(np.square(self.applied[-1].weights)))
        loss = self.curvature * squared if squared else 0.0  # an infinite curvature too
        counts = [len(request.continuation) for request in requests if isinstance(request, LogLikelihood)]
        return [Likelihood(-loss * count, count, False) for count in counts]

    def close(self) -> None: ...


TEXTS = {
    "math": (Snippet((1, 2, 3), 1), Snippet((4, 5, 6, 7), 2)),
    "other": (Snippet((1, 1), 1), Snippet((2, 2, 2), 1)),
}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return tiny_family(tmp_path, with_base=True)


def paths_of(family: Family, curvature: float) -> tuple[Bowl, dict[str, Any], dict[str, str]]:
    engine = Bowl(curvature)
    found = measure_paths(engine, family, [TextQuestions(TEXTS)])
    return engine, found.measured["paths"]["loss"], {check.name: check.verdict for check in found.checks}


def test_a_bowl_lies_below_its_chords(family: Family) -> None:
    """Between a and b a quadratic lies t (1 - t) |a - b|^2 below the chord, least at the ends of what is looked at."""
    engine, paths, verdicts = paths_of(family, 1.0)
    assert len(engine.applied) == len(set(engine.applied)) == 5 + 3 * 3 + 3
    assert paths["ends"]["math"] == {"math": 1.0, "other": 1.0}
    assert paths["ends"]["base"] == {"math": 0.0, "other": 0.0}
    assert paths["ends"]["uniform"]["math"] == pytest.approx(1 / 3)
    for barrier in paths["barriers"]:
        apart, share = (2 / 3, 0.25) if barrier["to"] == "uniform" else (2.0, 0.5)
        assert barrier["barrier"] == pytest.approx(-share * (1 - share) * apart)
        assert barrier["noise"] == pytest.approx(0, abs=1e-9)
        assert (barrier["at"] == 0.5) == (barrier["to"] != "uniform")
    assert verdicts == {"barrier": "fine", "learned": "do not trust"}, "the base is the best of all at math"


def test_a_hill_between_experts_is_a_barrier(family: Family) -> None:
    _, paths, verdicts = paths_of(family, -1.0)
    [middle] = [
        barrier for barrier in paths["barriers"]
        if (barrier["from"], barrier["to"], barrier["name"]) == ("math", "code", "math")
    ]  # fmt: skip
    assert middle["barrier"] == pytest.approx(0.5)
    assert middle["relative"] == pytest.approx(0.5), "of the chord's height of 1"
    assert verdicts["barrier"] == "do not trust"


@pytest.mark.parametrize("curvature", [math.inf, 1e30])
def test_a_model_without_finite_losses_is_a_verdict_and_no_error(family: Family, curvature: float) -> None:
    _, paths, verdicts = paths_of(family, curvature)
    assert paths["ends"]["math"]["math"] == NO_LOSS
    assert verdicts["learned"] == "do not trust"
    json.dumps(paths, allow_nan=False)


def test_scores_are_reported_as_they_are_and_barriers_as_what_is_lost(
    family: Family, tiny_study: TinyStudy
) -> None:
    """The same bowl as a benchmark of log-likelihoods: a score, of which more is better."""
    context = Context(root=tiny_study.paths["base"], engine="hf")
    [words] = [path for path in tiny_study.bench if path.stem == "words"]
    found = measure_paths(Bowl(1.0), family, [SuiteQuestions(Suite(load_benchmarks([str(words)], context)))])
    paths = found.measured["paths"]["score"]
    assert paths["ends"]["math"]["words"] == -2.0, "a space and a letter, each a token here"
    assert paths["ends"]["base"]["words"] == 0
    assert all(barrier["barrier"] < 0 for barrier in paths["barriers"])
    hill = measure_paths(Bowl(-1.0), family, [SuiteQuestions(Suite(load_benchmarks([str(words)], context)))])
    assert [check.verdict for check in hill.checks] == ["do not trust"]
    assert "below the straight line" in hill.checks[0].why


def test_weights_that_cannot_be_scored_are_a_verdict_and_no_error(
    family: Family, tiny_study: TinyStudy
) -> None:
    """A benchmark of log-likelihoods refuses what is not finite: here of all weights but the base's."""
    context = Context(root=tiny_study.paths["base"], engine="hf")
    [words] = [path for path in tiny_study.bench if path.stem == "words"]
    questions = SuiteQuestions(Suite(load_benchmarks([str(words)], context)))
    found = measure_paths(Bowl(math.inf), family, [questions])
    paths = found.measured["paths"]["score"]
    assert (set(paths["ends"]), paths["barriers"]) == ({"base"}, [])
    [check] = found.checks
    assert check.verdict == "do not trust"
    assert check.why.startswith("math, code, web, uniform, math merged with uniform, ")
    assert "web cannot be scored: words: a log-likelihood must be finite, but is -inf on item" in check.why
    json.dumps(paths, allow_nan=False)
    alone = open_family(None, {expert.name: expert.source for expert in family.experts})
    with pytest.raises(EngineError, match="must be finite"):
        measure_paths(Bowl(math.inf), alone, [questions])


def test_two_experts_have_one_line_and_one_alone_has_none(tmp_path: Path, family: Family) -> None:
    sources = {expert.name: expert.source for expert in family.experts}
    two = open_family(None, {name: sources[name] for name in ("math", "code")})
    _, paths, _ = paths_of(two, 1.0)
    assert {(barrier["from"], barrier["to"]) for barrier in paths["barriers"]} == {
        ("math", "uniform"), ("code", "uniform"),
    }  # fmt: skip
    one = open_family(None, {"math": sources["math"]})
    engine, paths, verdicts = paths_of(one, 1.0)
    assert (len(engine.applied), paths["barriers"], verdicts) == (1, [], {})


def test_between_is_a_straight_line() -> None:
    one, other = Mixture(("a", "b"), (1.0, 0.0)), Mixture(("a", "b"), (0.2, 0.8))
    assert between(one, other, 0.25).weights == pytest.approx((0.8, 0.2))
