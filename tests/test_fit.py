"""`mergemix fit`: files in, correlations and an optimum out; and what it says of files that make no sense."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mergemix.errors import ConfigError
from mergemix.fit import fit, spearman
from mergemix.measured import read_measured
from mergemix.report.fit_tables import fit_table
from mergemix.search.constraints import Constraints

DOMAINS = ("web", "code", "math")
N = 24


def runs(n: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses of two sets, the first best with much code, the second with much math; the shares are rounded."""
    rng = np.random.default_rng((seed, n))
    shares = rng.dirichlet(np.ones(3), n).round(3)
    losses = 2 - np.log(shares + 0.05) @ np.array([[0.1, 0.1], [0.6, 0.1], [0.1, 0.5]])
    return shares, losses + 0.01 * rng.normal(size=losses.shape)


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return path


def with_ids(rows: np.ndarray) -> list[tuple[object, ...]]:
    return [(i, *row) for i, row in enumerate(rows, 1)]


def pair(directory: Path, n: int = N, seed: int = 0, prefix: str = "train") -> tuple[Path, Path]:
    """Files in RegMix's layout: an index, then numbers."""
    shares, losses = runs(n, seed)
    return (
        write(directory / f"{prefix}_mixture.csv", ("index", *DOMAINS), with_ids(shares)),
        write(directory / f"{prefix}_loss.csv", ("index", "loss/code", "loss/math"), with_ids(losses)),
    )


def edited(path: Path, line: int, change) -> Path:
    """The file with one line (1: the header) changed."""
    lines = path.read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("unit", [1e300, 1e-300])
def test_scores_of_an_impossible_size_are_refused(tmp_path: Path, unit: float) -> None:
    mixtures, scores = pair(tmp_path)
    header, *lines = scores.read_text().splitlines()
    rows = [line.split(",") for line in lines]
    scaled = [",".join([row[0], *(repr(float(value) * unit) for value in row[1:])]) for row in rows]
    scores.write_text("\n".join([header, *scaled]) + "\n")
    with pytest.raises(ConfigError, match="give them in another unit"):
        fit(mixtures, scores)


def test_the_keys_that_scripts_rely_on(tmp_path: Path) -> None:
    result = fit(*pair(tmp_path), *pair(tmp_path, 50, 1, "test"), minimize=True)
    assert list(result["targets"]) == ["loss/code", "loss/math", "mean"]
    for name, target in result["targets"].items():
        assert target["surrogate"] == "auto"
        assert target["cv"]["spearman"] > 0.9
        assert target["test"]["spearman"] > 0.9
        assert 0.7 < target["test"]["coverage90"] <= 1
        assert set(target["candidates"]) - {"columns"} == {"lightgbm", "trees", "gp", "loglinear", "scheffe"}
        assert ("columns" in target["candidates"]) == (name == "mean")
        assert sum(target["weights"].values()) == pytest.approx(1)
    optimum = result["optimum"]
    assert optimum["target"] == "mean"
    assert sum(optimum["mixture"].values()) == pytest.approx(1)
    low, high = optimum["predictions"]["mean"]["interval"]
    assert low < optimum["predictions"]["mean"]["mean"] < high
    assert optimum["predictions"]["mean"]["mean"] < optimum["best_measured"]["score"] + 0.05
    # Least loss: both domains that matter, about evenly.
    assert optimum["mixture"]["code"] > 0.25
    assert optimum["mixture"]["math"] > 0.25
    assert not result["warnings"]
    assert any("were rounded" in note for note in result["notes"])
    json.dumps(result)


def test_the_best_is_the_highest_unless_told_otherwise(tmp_path: Path) -> None:
    files = pair(tmp_path)
    worst, best = (fit(*files, surrogate="gp", minimize=flag)["optimum"] for flag in (False, True))
    assert worst["predictions"]["mean"]["mean"] > best["predictions"]["mean"]["mean"] + 0.1
    assert worst["best_measured"]["score"] > best["best_measured"]["score"]


def test_the_optimum_keeps_the_constraints(tmp_path: Path) -> None:
    constraints = Constraints(max={"code": 0.2}, min={"web": 0.3})
    result = fit(*pair(tmp_path), surrogate="gp", minimize=True, region_of=constraints.region)
    assert result["optimum"]["mixture"]["code"] <= 0.2
    assert result["optimum"]["mixture"]["web"] >= 0.3
    with pytest.raises(ConfigError, match="chemistry"):
        fit(*pair(tmp_path), region_of=Constraints(max={"chemistry": 0.2}).region)


def test_one_surrogate_and_one_metric(tmp_path: Path) -> None:
    mixtures, _ = pair(tmp_path)
    one = write(tmp_path / "one.csv", ("loss",), [(row[0],) for row in runs()[1]])
    result = fit(mixtures, one, surrogate="loglinear")
    assert list(result["targets"]) == ["loss"]
    assert result["optimum"]["target"] == "loss"
    assert result["targets"]["loss"]["surrogate"] == "loglinear"
    assert "weights" not in result["targets"]["loss"]
    assert any("by their order" in note for note in result["notes"])


def test_rows_are_matched_by_the_id_that_tells_runs_apart(tmp_path: Path) -> None:
    """Olmix: run, name and index, where the name is that of the whole experiment. Orders and columns may differ."""
    shares, losses = runs()
    ratios = [(f"r{i}", "swarm", i, *row) for i, row in enumerate(shares)]
    metrics = [(i, f"r{i}", "swarm", *row) for i, row in enumerate(losses)]
    mixtures = write(tmp_path / "ratios.csv", ("run", "name", "index", *DOMAINS), ratios)
    scores = write(tmp_path / "metrics.csv", ("index", "run", "name", "a", "b"), metrics[::-1])
    found = read_measured(mixtures, scores)
    assert found.domains == DOMAINS
    assert np.array_equal(found.scores, losses)
    np.testing.assert_allclose(found.shares, shares / shares.sum(axis=1, keepdims=True))
    swapped = write(
        tmp_path / "t.csv",
        ("run", "math", "web", "code"),
        [(f"r{i}", r[2], r[0], r[1]) for i, r in enumerate(shares)],
    )
    np.testing.assert_array_equal(read_measured(swapped, scores, like=found).shares, found.shares)


def test_a_metric_called_mean_is_not_replaced(tmp_path: Path) -> None:
    mixtures, scores = pair(tmp_path)
    edited(scores, 1, lambda line: line.replace("loss/math", "mean"))
    result = fit(mixtures, scores, surrogate="gp")
    assert list(result["targets"]) == ["loss/code", "mean"]
    assert result["targets"]["mean"]["cv"] == fit_alone(tmp_path, 1)["cv"]


def fit_alone(directory: Path, column: int) -> dict:
    one = write(directory / "alone.csv", ("x",), [(row[column],) for row in runs()[1]])
    return fit(directory / "train_mixture.csv", one, surrogate="gp")["targets"]["x"]


# Which file, which line, what is done to it, and what is said about it.
BAD = {
    "a missing cell": (
        0,
        5,
        lambda t: t.rpartition(",")[0] + ",",
        r"mixture.csv, line 5, column 'math': .*empty",
    ),
    "no number": (
        1,
        3,
        lambda t: t.replace("2,", "2,n/a", 1),
        r"line 3, column 'loss/code': a number .*'n/a",
    ),
    "not finite": (1, 3, lambda t: t.rpartition(",")[0] + ",nan", r"column 'loss/math': a finite number"),
    "a negative share": (
        0,
        4,
        lambda t: "3,-0.1,0.6,0.5",
        r"line 4, column 'web': shares .* but this is -0.1",
    ),
    "a wrong sum": (0, 4, lambda t: "3,0.1,0.6,0.5", r"line 4: shares must sum to 1 .*, but sum to 1.2"),
    "an id twice": (
        0,
        4,
        lambda t: t.replace("3,", "2,", 1),
        r"line 4: ids must differ, but index '2' is in line 3",
    ),
    "an id without scores": (
        0,
        4,
        lambda t: t.replace("3,", "77,", 1),
        r"line 4: index 77 is not in .*loss.csv",
    ),
    "an id without shares": (1, 4, lambda t: t.replace("3,", "77,", 1), r"index 3 is not in .*loss.csv"),
    "a row too short": (0, 6, lambda t: t.rpartition(",")[0], r"line 6: each row must have 4 cells .* has 3"),
    "a column twice": (0, 1, lambda t: "index,web,code,web", r"names of columns must differ, but 'web'"),
    "a column without name": (1, 1, lambda t: "index,loss/code,", r"column 3 has no name"),
    "only ids": (1, 1, lambda t: "index,run,name", r"only columns of ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_line_and_rule(tmp_path: Path, case: str) -> None:
    which, line, change, message = BAD[case]
    files = pair(tmp_path)
    edited(files[which], line, change)
    with pytest.raises(ConfigError, match=message):
        fit(*files)


def test_other_ways_to_be_wrong(tmp_path: Path) -> None:
    mixtures, scores = pair(tmp_path)
    with pytest.raises(ConfigError, match="both --test-mixtures and --test-scores"):
        fit(mixtures, scores, test_mixtures=mixtures)
    with pytest.raises(ConfigError, match="the surrogate must be one of auto, "):
        fit(mixtures, scores, surrogate="magic")
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere.csv"):
        fit(tmp_path / "nowhere.csv", scores)
    empty = write(tmp_path / "empty.csv", ("index", "a", "b"), [])
    with pytest.raises(ConfigError, match="at least one row"):
        fit(empty, scores)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        fit(tmp_path / "binary.csv", scores)
    single = write(tmp_path / "single.csv", ("index", "web"), [(1, 1.0)])
    with pytest.raises(ConfigError, match="at least two columns of shares"):
        fit(single, write(tmp_path / "s.csv", ("index", "x"), [(1, 1.0)]))
    short = write(tmp_path / "short.csv", ("x",), [(1.0,)])
    with pytest.raises(ConfigError, match=f"has {N} rows and .*short.csv 1"):
        fit(mixtures, short)
    test_mixtures, test_scores = pair(tmp_path, 10, 1, "test")
    edited(test_scores, 1, lambda line: "index,loss/code,loss/law")
    with pytest.raises(ConfigError, match="missing: loss/math; unknown: loss/law"):
        fit(mixtures, scores, test_mixtures, test_scores)


def test_repeats_are_kept_and_said(tmp_path: Path) -> None:
    mixtures, scores = pair(tmp_path)
    first = mixtures.read_text().splitlines()[1]
    edited(mixtures, 3, lambda line: first.replace("1,", "2,", 1))
    found = read_measured(mixtures, scores)
    assert len(found.shares) == N
    assert any("more than once (lines 2 and 3)" in warning for warning in found.warnings)


def test_what_no_mixture_holds_cannot_be_known(tmp_path: Path) -> None:
    mixtures = write(tmp_path / "m.csv", ("a", "b", "c"), [(x, 1 - x, 0) for x in np.linspace(0, 1, 9)])
    scores = write(tmp_path / "s.csv", ("y",), [(x,) for x in np.linspace(0, 1, 9)])
    assert any("no mixture has any of c" in text for text in read_measured(mixtures, scores).warnings)


def test_equal_scores_and_few_points_give_the_simpler_model(tmp_path: Path) -> None:
    mixtures, _ = pair(tmp_path)
    flat = write(tmp_path / "flat.csv", ("x",), [(0.5,)] * N)
    result = fit(mixtures, flat)
    assert any("x: all 24 scores are equal" in warning for warning in result["warnings"])
    assert result["targets"]["x"]["cv"]["spearman"] is None
    assert result["optimum"]["predictions"]["x"]["mean"] == 0.5
    result = fit(*pair(tmp_path, 3))
    assert any("needs at least" in warning for warning in result["warnings"])


def test_spearman_shares_ranks_between_ties() -> None:
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.ones(4), np.arange(4.0)) is None


@pytest.mark.parametrize("tested", [True, False])
def test_the_table_shows_what_people_look_for(tmp_path: Path, tested: bool) -> None:
    test = pair(tmp_path, 10, 1, "test") if tested else (None, None)
    result = fit(*pair(tmp_path), *test, surrogate="gp")
    result["warnings"].append("[brackets] are no markup")
    console = Console(width=200, record=True)
    console.print(fit_table(result))
    text = console.export_text()
    for needed in ("loss/code", "code", "best measured", "90% interval", "[brackets] are", "were rounded"):
        assert needed in text
    assert ("tested on 10 others" in text) == tested
