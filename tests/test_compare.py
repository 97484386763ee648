"""Two studies beside each other: does the best mixture move?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mergemix.compare import compare
from mergemix.errors import ConfigError, StudyError
from mergemix.report.compare_tables import compare_table
from tests.solve_study import NAMES, SURFACES, write_study

# Best at math 80%, where SURFACES is best elsewhere; the same items, other skills.
MOVED = {**SURFACES, "sums": lambda s: 0.7 - 3 * (s[0] - 0.9) ** 2, "words": lambda s: 0.3}
TURNED = {name: (lambda s, f=surface: -f(s)) for name, surface in SURFACES.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("studies") / "first"
    write_study(directory)
    return directory


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same surfaces, measured again."""
    directory = tmp_path_factory.mktemp("studies") / "again"
    write_study(directory, seed=1)
    return directory


@pytest.fixture(scope="module")
def itself(first: Path) -> dict[str, Any]:
    """A study beside itself."""
    return compare(first, first)


def beside(first: Path, directory: Path, **options: Any) -> dict[str, Any]:
    write_study(directory, **options)
    return compare(first, directory)


def test_the_same_surface_measured_again_has_not_moved(first: Path, again: Path) -> None:
    found = compare(first, again)
    assert not found["moved"]
    assert "no move can be told" in found["verdict"]
    predicted = found["rank_correlation"]["predicted"]
    assert predicted["spearman"] > 0.9
    assert predicted["interval"][0] <= predicted["spearman"] <= predicted["interval"][1] <= 1
    assert predicted["ceiling"] > 0.9
    assert set(found["capabilities"]) == {"math", "code", "language"}
    assert found["distance"]["estimate"] < 0.3
    assert found["regret"]["first_on_second"]["estimate"] < 0.02
    assert found["rank_correlation"]["measured"] is None, "only four baselines are in both"
    assert found["dropped"] == []


def test_a_surface_that_is_best_elsewhere_has_moved(first: Path, tmp_path: Path) -> None:
    found = beside(first, tmp_path / "moved", surfaces=MOVED, seed=1)
    assert found["moved"]
    assert "the best mixture moves" in found["verdict"]
    assert found["optimum"]["second"]["math"] > 0.6 > found["optimum"]["first"]["math"]
    assert found["distance"]["interval"][0] > found["distance"]["ceiling"]
    assert found["regret"]["first_on_second"]["interval"][0] > found["noise_floor"][1]


def test_a_surface_upside_down_has_the_opposite_ranks(first: Path, tmp_path: Path) -> None:
    found = beside(first, tmp_path / "turned", surfaces=TURNED, seed=1)
    assert found["rank_correlation"]["predicted"]["spearman"] < -0.9
    assert found["capabilities"]["code"]["interval"][1] < -0.8


def test_mixtures_that_both_have_measured_are_ranked_beside_each_other(first: Path, tmp_path: Path) -> None:
    found = beside(first, tmp_path / "copy", candidates=30, noise=0.06)  # the same seed: the same mixtures
    measured = found["rank_correlation"]["measured"]
    assert measured["mixtures"] == 34
    assert measured["interval"][0] < measured["spearman"] <= measured["interval"][1]
    assert measured["spearman"] > 0.8


def test_a_domain_that_one_of_them_lacks_is_left_out(first: Path, tmp_path: Path) -> None:
    found = beside(first, tmp_path / "more", names=("web", "math", "extra", "code"), seed=2, candidates=60)
    assert found["domains"] == list(NAMES)
    assert found["dropped"] == ["extra"]
    assert set(found["optimum"]["second"]) == set(NAMES)


def test_the_same_call_gives_the_same_answer(first: Path, itself: dict[str, Any]) -> None:
    assert compare(first, first) == itself
    assert itself["rank_correlation"]["measured"]["spearman"] == pytest.approx(1)
    assert not itself["moved"]


def test_another_utility_may_be_compared_by(first: Path, again: Path) -> None:
    found = compare(first, again, utility="worst; code >= 0.2")
    assert found["utility"] == "worst; code >= 0.2"
    with pytest.raises(ConfigError, match="nothing"):
        compare(first, again, utility="nothing")


def test_studies_with_nothing_in_common_are_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"two domains in common, but .* has math, code, web and .* has a, b, web"
    ):
        beside(first, tmp_path / "other", names=("a", "b", "web"))
    with pytest.raises(StudyError, match="must exist"):
        compare(first, tmp_path / "none")


def test_other_benchmarks_are_said(first: Path, itself: dict[str, Any], tmp_path: Path) -> None:
    assert itself["warnings"] == []
    found = beside(first, tmp_path / "other", identity={"benchmark sums": "other items"})
    assert "not asked the same: sums differ" in found["warnings"][0]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(compare_table(found))
    assert "not asked the same" in console.export_text()


def test_the_table_shows_it_all(itself: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(compare_table(itself))
    text = console.export_text()
    for part in ("34 measured mixtures", "language", "Best of the second", "Verdict: no move can be told"):
        assert part in text
