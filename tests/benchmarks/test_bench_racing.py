"""The racing benchmark from its command line to its last line, and its parts where the answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_racing
from benchmarks.bench_racing import Search, halving, race, summary, utility_for, wilson
from benchmarks.children import BenchmarkError
from benchmarks.score_matrices import SURFACES, Matrix, read_matrix, simulate
from mergemix.evals.suite import ItemResult
from mergemix.evals.utility import Utility
from mergemix.mixture import Mixture
from mergemix.study import Study
from mergemix.study.records import Estimate

NAMES = ("math", "code")


def search_of(matrix: Matrix, seed: int = 0) -> Search:
    utility = Utility(dict.fromkeys(matrix, 1 / len(matrix)), 0.0)
    num = len(next(iter(matrix.values())))
    return Search(utility, [{name: scores[i] for name, scores in matrix.items()} for i in range(num)], seed)


def distinct(num: int = 8, items: int = 400) -> Matrix:
    """Candidates of quite different skill, the best last but one."""
    rng = np.random.default_rng(0)
    skills = np.append(np.linspace(0.1, 0.9, num - 1), 0.2)
    return {name: (rng.random((num, items)) < skills[:, None]).astype(float) for name in ("a", "b")}


@pytest.mark.parametrize("surface", SURFACES)
def test_simulated_matrices_look_like_benchmarks(surface: str) -> None:
    rng = np.random.default_rng(1)
    matrix = simulate(SURFACES[surface], 40, [200, 350], rng)
    assert {name: scores.shape for name, scores in matrix.items()} == {
        "bench0": (40, 200),
        "bench1": (40, 350),
    }
    for scores in matrix.values():
        assert set(np.unique(scores)) == {0, 1}
        means = scores.mean(axis=1)
        assert 0.01 < means.std() < 0.3
        # Item difficulties are shared: candidates agree far more often than by chance.
        assert np.corrcoef(scores).mean() > 0.15


def test_candidates_near_the_best_are_nearer_to_each_other() -> None:
    def spread(name: str) -> float:
        found = [simulate(SURFACES[name], 40, [400], np.random.default_rng(seed)) for seed in range(10)]
        return float(np.mean([matrix["bench0"][20:].mean(axis=1).std() for matrix in found]))

    assert spread("half near the best") < 0.8 * spread("anywhere")


def test_a_race_asks_less_and_finds_the_best() -> None:
    search = search_of(distinct())
    for select in (True, False):
        found = race(search, select=select, first_full=1)
        assert not found.wrong
        assert found.loss == 0
        # Each is better than the one before, so all but the last answer everything.
        assert found.answered_all == 7
        assert 7 / 8 < found.cost < 1
        worst_first = race(Search(search.utility, search.candidates[-2::-1], 0), select=select, first_full=2)
        assert worst_first.answered_all == 2
        assert worst_first.cost < 0.5


def test_halving_costs_what_its_rounds_ask() -> None:
    """8 candidates on 1/8, 4 more eighths for 4, 2 more for 2 ..., the last one all: (8 + 4 + 4 + 4) / 64."""
    found = halving(search_of(distinct()))
    assert found.cost == pytest.approx(20 / 64)
    assert not found.wrong


def test_who_misses_the_best_is_wrong_by_how_much() -> None:
    search = search_of({"a": np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])})
    found = search.replay(3, [0, 1])
    assert found.wrong
    assert found.cost == 0.5
    assert found.loss == pytest.approx(0.5 / np.std([0, 0.5, 1]))
    row = summary("case", "way", [found, search.replay(3, [2])])
    assert (row["factor"], row["wrong"], row["same_winner"]) == (2.0, 0.5, 0.5)
    assert row["wrong_low"] < 0.5 < row["wrong_high"]


def test_wilson_intervals_are_those_of_the_tables() -> None:
    assert wilson(0, 200) == pytest.approx((0, 0.01885), abs=1e-4)
    assert wilson(10, 200) == pytest.approx((0.0274, 0.0896), abs=1e-4)


def test_utilities_of_recorded_matrices() -> None:
    matrix = {"a": np.array([[0.0], [2.0]]), "loss": np.array([[1.0], [5.0]])}
    assert utility_for(matrix, lower=["loss"], zscore=False).weights == {"a": 0.5, "loss": -0.5}
    assert utility_for(matrix, lower=["loss"], zscore=True).weights == {"a": 0.5, "loss": -0.25}
    with pytest.raises(BenchmarkError, match="--lower must name benchmarks of the matrix"):
        utility_for(matrix, lower=["perplexity"], zscore=False)


def test_it_runs_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert bench_racing.main(["--quick", "--surface", "anywhere", "--out", str(out)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    assert {"cpu", "commit", "versions", "taken_at", "alpha", "replays"} <= written["conditions"].keys()
    verdicts = [row for row in written["rows"] if row["case"] == "verdict"]
    assert last["shown"] == {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    assert len(verdicts) == 4
    measured = [row for row in written["rows"] if row["case"] == "anywhere"]
    assert [row["provider"] for row in measured] == [
        bench_racing.SELECTED,
        bench_racing.UNSELECTED,
        bench_racing.HALVING,
    ]
    for row in measured:
        assert row["replays"] == 4
        assert row["factor_low"] <= row["factor"] <= row["factor_high"]


@pytest.mark.parametrize("suffix", ["json", "npz"])
def test_recorded_matrices(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, matrix = tmp_path / f"scores.{suffix}", distinct()
    if suffix == "json":
        path.write_text(json.dumps({name: scores.tolist() for name, scores in matrix.items()}))
    else:
        np.savez(path, **matrix)  # type: ignore[arg-type]
    read = read_matrix(path)
    assert all(np.array_equal(read[name], matrix[name]) for name in matrix)
    assert bench_racing.main(["--matrix", str(path), "--replays", "3"]) == 0
    assert f"scores.{suffix}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no", '{"a": [[1, 2]]}', '{"a": [[1],[2],[3]], "b": [[1],[2]]}']
)
def test_what_is_no_matrix(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    assert bench_racing.main(["--matrix", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_study_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_racing.main(["--study", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_recorded_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base, repeats and candidates that were stopped early are not replayed."""
    matrix, num = distinct(5, 60), 5
    mixtures = [Mixture(NAMES, (share, 1 - share)) for share in np.arange(1, num + 1) / 10]
    with Study.open(tmp_path / "study", identity={}, info={}) as study:

        def record(mixture: Mixture, index: int, repeat: int = 0, stopped: bool = False) -> None:
            results = [
                ItemResult(name, str(item), float(score), None)
                for name, scores in matrix.items()
                for item, score in enumerate(scores[index])
            ]
            study.record(
                mixture,
                repeat=repeat,
                origin="test",
                results=results,
                timings={"swap_s": 0.0},
                stopped=("clearly worse", Estimate(0.1, 0.01)) if stopped else None,
            )

        for index, mixture in enumerate(mixtures):
            record(mixture, index)
        record(Mixture.base_only(NAMES), 0)
        record(mixtures[0], 0, repeat=1)
        record(Mixture(NAMES, (0.9, 0.1)), 0, stopped=True)
    assert bench_racing.main(["--study", str(tmp_path / "study"), "--replays", "3"]) == 0
    assert "study study" in capsys.readouterr().out
    read = bench_racing.read_study(tmp_path / "study")
    assert all(np.array_equal(read[name], matrix[name]) for name in matrix)
