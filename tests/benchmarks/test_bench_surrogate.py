"""The surrogate benchmark from its command line to its last line, and its verdicts where the answer is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_surrogate
from benchmarks.bench_surrogate import (
    ALONE,
    AUTO,
    COLUMNS,
    SURFACES,
    subsample,
    synthetic,
    verdicts_of,
)
from mergemix.search.surrogates import SURROGATES


def write_runs(directory: Path, part: str, n: int) -> None:
    rng = np.random.default_rng(n)
    shares = rng.dirichlet(np.ones(3), n)
    losses = np.column_stack([-np.log(shares[:, 0] + 0.1), -np.log(shares[:, 1] + 0.1)])
    for name, header, rows in (("mixture", "index,a,b,c", shares), ("loss", "index,one,pile_cc", losses)):
        lines = [header, *(f"{i}," + ",".join(map(repr, row.tolist())) for i, row in enumerate(rows))]
        (directory / f"{part}_{name}_tiny.csv").write_text("\n".join(lines))


def test_from_command_line_to_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path, "train", 30)
    write_runs(tmp_path, "test", 25)
    out = tmp_path / "results.json"
    arguments = [
        "--quick",
        "--data",
        str(tmp_path),
        "--surface",
        "kinks",
        "--domains",
        "3",
        "--out",
        str(out),
    ]
    assert bench_surrogate.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bench"] == "surrogate"
    rows = json.loads(out.read_text())["rows"]
    measured = [row for row in rows if row["case"] != "verdict"]
    assert {row["case"] for row in measured} == {tmp_path.name, "kinks, K = 3"}
    singles = {*SURROGATES, AUTO}
    by_target = {
        target: {row["surrogate"] for row in measured if row["target"] == target}
        for target in ("mean", "pile_cc", "score")
    }
    assert by_target == {"mean": singles | {ALONE, COLUMNS}, "pile_cc": singles, "score": singles}
    assert all(-1 <= row["low"] <= row["spearman"] <= 1 for row in measured)


def test_without_data_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_surrogate.main(["--quick", "--surface", "noise", "--domains", "2"]) == 0
    assert "no --data: synthetic surfaces only" in capsys.readouterr().out


def test_data_that_is_not_there_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_surrogate.main(["--quick", "--data", str(tmp_path)]) == 1
    assert "must hold one train_mixture*.csv" in capsys.readouterr().err


def test_verdicts() -> None:
    def rows(auto: float, rival: float, coverage: float) -> list[dict]:
        ranks = {
            "lightgbm": rival,
            "gp": 0.9,
            "loglinear": 0.5,
            "scheffe": 0.5,
            AUTO: auto,
            "trees": rival - 0.1,
        }
        return [
            {
                "case": "x",
                "n": 40,
                "target": "mean",
                "surrogate": name,
                "spearman": rank,
                "coverage90": coverage,
            }
            for name, rank in ranks.items()
        ]

    assert [row["met"] for row in verdicts_of(rows(0.9, 0.82, 0.9), margins=True)] == [True] * 5
    assert [row["met"] for row in verdicts_of(rows(0.9, 0.85, 0.9), margins=True)] == [False, *[True] * 4]
    assert [row["met"] for row in verdicts_of(rows(0.88, 0.7, 0.97), margins=False)] == [False, True, False]


@pytest.mark.parametrize("surface", SURFACES)
def test_synthetic_surfaces(surface: str) -> None:
    train, test = synthetic(surface, 5, 30, 20, seed=1)
    assert train.shares.shape == (30, 5)
    assert test.scores.shape == (20, 1)
    again, _ = synthetic(surface, 5, 30, 20, seed=1)
    other, _ = synthetic(surface, 5, 30, 20, seed=2)
    assert np.array_equal(train.scores, again.scores)
    assert not np.array_equal(train.scores, other.scores)
    half = subsample(train, 15, 0)
    assert len(half.scores) == 15
    assert {row.tobytes() for row in half.shares} <= {row.tobytes() for row in train.shares}
