"""The search benchmark from its command line to its last line, and its parts where the answer is known."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_search
from benchmarks.bench_search import (
    BO,
    OBSERVED,
    PAPER,
    RANDOM,
    RECOMMENDED,
    STRATEGIES,
    replay,
    summary,
    verdicts,
)
from benchmarks.children import BenchmarkError
from benchmarks.search_surfaces import (
    REGMIX_GROUPS,
    Scale,
    Surface,
    fitted,
    objective,
    optimum,
    read_measured,
    regmix,
    simulated,
)
from mergemix.mixture import Mixture


def bowl(peak: list[float], noise: float = 0.0) -> Surface:
    """Two capabilities with the best mixture `peak`."""

    def truth(shares: np.ndarray) -> dict[str, np.ndarray]:
        distance = ((shares - peak) ** 2).sum(axis=1)
        return {"a": 1 - distance, "b": -3 * distance}

    def measure(shares, rng):
        return {
            n: (float(v[0] + noise * rng.standard_normal()), noise) for n, v in truth(shares[None]).items()
        }

    return Surface(tuple("abcde"[: len(peak)]), truth, measure)


@pytest.mark.parametrize("peak", [[0.2, 0.3, 0.5], [0.0, 0.6, 0.4], [1.0, 0.0], [0.1, 0.0, 0.0, 0.0, 0.9]])
def test_the_optimum_is_found_wherever_it_is(peak: list[float]) -> None:
    assert optimum(bowl(peak)) == pytest.approx(0.5, abs=1e-4)


def test_regret_is_in_units_of_the_lead_over_uniform() -> None:
    scale = Scale.of(bowl([0.9, 0.1]))
    assert scale.uniform == pytest.approx(0.5 - 2 * 0.32)
    assert scale.regret(0.5) == pytest.approx(0, abs=1e-3)
    assert scale.regret(scale.uniform) == 1
    assert scale.regret(scale.uniform - scale.lead) == 2


def test_an_outcome_is_the_macro_average_with_its_error() -> None:
    outcome = bowl([0.5, 0.5], noise=0.2).outcome(Mixture(("a", "b"), (0.5, 0.5)), np.random.default_rng(0))
    assert outcome.utility == pytest.approx(np.mean([score for score, _ in outcome.capabilities.values()]))
    assert outcome.stderr == pytest.approx(0.2 / np.sqrt(2))
    assert bowl([0.5, 0.5], noise=0.2).noise_sd(repeats=4000) == pytest.approx(0.2 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("k", [2, 5])
def test_simulated_scores_scatter_around_the_truth_as_they_say(k: int) -> None:
    surface = simulated(k, 0)
    rng = np.random.default_rng(1)
    uniform = np.full(k, 1 / k)
    for name, truth in surface.truth(uniform[None]).items():
        drawn = np.array([surface.measure(uniform, rng)[name] for _ in range(400)])
        assert drawn[:, 0].mean() == pytest.approx(truth[0], abs=4 * drawn[:, 0].std() / 20)
        assert 0 < drawn[:, 0].std() < drawn[:, 1].mean()  # which also holds the choice of items


def test_a_fitted_surface_follows_what_was_measured() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 60)
    signal = {"a": 100 + shares[:, 0], "b": -((shares[:, 1] - 0.4) ** 2)}
    scores = {name: values + 0.1 * values.std() * rng.standard_normal(60) for name, values in signal.items()}
    surface = fitted("abc", shares, scores)
    fresh = rng.dirichlet(np.ones(3), 200)
    found = surface.truth(fresh)
    assert np.corrcoef(found["a"], fresh[:, 0])[0, 1] > 0.98
    assert np.corrcoef(found["b"], -((fresh[:, 1] - 0.4) ** 2))[0, 1] > 0.95
    assert (
        0.03
        < np.std([surface.outcome(Mixture.uniform("abc"), rng).capabilities["a"][0] for _ in range(99)])
        < 0.2
    )


def test_replays_are_the_same_again_and_budgets_do_not_matter_to_random() -> None:
    surface = bowl([0.6, 0.4, 0.0], noise=0.1)
    scale = Scale.of(surface)
    short, long = (
        replay(surface, scale, STRATEGIES[RANDOM], budgets, 3) for budgets in ([5, 10], [5, 10, 30])
    )
    assert set(long) == {5, 10, 30}
    assert short == {budget: long[budget] for budget in (5, 10)}
    assert long != replay(surface, scale, STRATEGIES[RANDOM], [5, 10, 30], 4)
    assert all(regret > -1e-6 for found in long.values() for regret in found.values())


def test_a_model_helps_where_there_is_noise() -> None:
    surface = bowl([0.5, 0.3, 0.2, 0.0], noise=0.3)
    scale = Scale.of(surface)
    random, bo = (
        np.mean([replay(surface, scale, STRATEGIES[name], [20], seed)[20][answer] for seed in range(4)])
        for name, answer in ((RANDOM, OBSERVED), (BO, RECOMMENDED))
    )
    assert bo < random


def test_verdicts_compare_with_random_at_200() -> None:
    def rows(provider: str, budget: int, values: list[float]) -> list:
        return summary("case", provider, [{budget: {OBSERVED: v, RECOMMENDED: v / 2}} for v in values])

    table = rows(RANDOM, 200, [0.2, 0.4]) + rows(BO, 50, [0.5, 0.6]) + rows(PAPER, 80, [0.8, 0.9])
    assert table[0]["regret"] == pytest.approx(0.3)
    assert table[0]["low"] < 0.2
    shown = verdicts("case", table)
    assert [(row["measured"], row["bar"], row["met"]) for row in shown] == [
        (pytest.approx(0.275), "<= 0.3", True),
        (pytest.approx(0.275), "<= 0.15", False),
        (pytest.approx(0.425), "<= 0.3", False),
        (pytest.approx(0.425), "<= 0.15", False),
    ]
    assert verdicts("case", table[2:]) == []


def test_it_runs_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, matrix = tmp_path / "out.json", tmp_path / "measured.npz"
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 30)
    np.savez(matrix, mixtures=shares, math=shares[:, :1] + np.zeros((30, 5)), code=shares[:, 1] ** 2)
    arguments = ["--quick", "--skip-items", "--matrix", str(matrix), "--out", str(out)]
    strategies = [RANDOM, "grid", "cma", BO]
    for name in strategies:
        arguments += ["--strategy", name]
    assert bench_search.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    assert last == {"bench": "search", "replays": 2, "shown": {}}  # nobody got as far as 50
    assert {"cpu", "commit", "versions", "budgets", "cpu_s"} <= written["conditions"].keys()
    assert {row["provider"] for row in written["rows"]} == set(strategies)
    assert all(row["low"] <= row["regret"] <= row["high"] for row in written["rows"])


def write_regmix(directory: Path, rng: np.random.Generator, losses: list[str]) -> None:
    for split, count in (("train", 30), ("test", 10)):
        shares = rng.dirichlet(np.ones(4), count).round(3)
        tables = {"mixture": (["train_the_pile_" + n for n in "abcd"], shares)}
        tables["pile_loss"] = losses, 3 - shares[:, :1] + 0.01 * rng.standard_normal((count, len(losses)))
        for kind, (header, table) in tables.items():
            with (directory / f"{split}_{kind}_1m.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["index", *header], *([i, *row] for i, row in enumerate(table))])


def test_regmix_losses_are_negated_and_grouped(tmp_path: Path) -> None:
    losses = [f"metric/the_pile_{name}_val_loss" for group in REGMIX_GROUPS.values() for name in group]
    write_regmix(tmp_path, np.random.default_rng(0), losses)
    surface = regmix(tmp_path)
    assert surface.names == ("a", "b", "c", "d")
    corners = surface.truth(np.eye(4))
    assert set(corners) == set(REGMIX_GROUPS)
    assert objective(corners).argmax() == 0  # the more of it, the lower the loss
    write_regmix(tmp_path, np.random.default_rng(0), losses[1:])
    with pytest.raises(BenchmarkError, match="must hold losses of github"):
        regmix(tmp_path)


def test_what_is_no_surface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.npz").write_text("no")
    np.savez(tmp_path / "half.npz", math=np.ones((3, 2)))
    for path in (tmp_path / "no.npz", tmp_path / "half.npz", tmp_path / "none.npz"):
        with pytest.raises(BenchmarkError, match=r"must be a \.npz file"):
            read_measured(path)
    for option in ("--data", "--study"):
        assert bench_search.main(["--skip-items", option, str(tmp_path / "none")]) == 1
        assert str(tmp_path / "none") in capsys.readouterr().err
