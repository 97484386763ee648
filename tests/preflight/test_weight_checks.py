"""Verdicts on constructed geometries: each rule by itself, at and around its threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from mergemix.checkpoints.family import Family
from mergemix.preflight import weight_checks as checks
from mergemix.preflight.family import preflight_family
from mergemix.preflight.verdict import VERDICTS, graded, worst
from tests.merge.families import write_family

SIZE = 64
GENERATOR = torch.Generator().manual_seed(0)
# Orthonormal directions in a model of one matrix: 0 is the base's.
DIRECTIONS = torch.linalg.qr(torch.randn(SIZE * SIZE, 8, dtype=torch.float64, generator=GENERATOR))[0].T


def model(base: float = 1.0, **along: float) -> dict[str, torch.Tensor]:
    """base * direction 0 + d1 * direction 1 + ..., of norm 10 altogether for base=1."""
    vector = base * DIRECTIONS[0] + sum(size * DIRECTIONS[int(name[1:])] for name, size in along.items())
    return {"model.layers.0.w.weight": (10 * vector).float().reshape(SIZE, SIZE)}


def verdicts(
    root: Path, experts: Mapping[str, dict[str, torch.Tensor]], *, base: bool = True
) -> dict[str, str]:
    result = preflight_family(write_family(root, model() if base else None, experts))
    assert result["verdict"] == worst(check["verdict"] for check in result["checks"])
    return {check["name"]: check["verdict"] for check in result["checks"]}


def test_a_sound_family_is_fine(tmp_path: Path) -> None:
    found = verdicts(tmp_path, {"a": model(d1=0.05), "b": model(d2=0.06), "c": model(d1=0.02, d3=0.05)})
    assert found.pop("tokenizer") == "doubtful", "there is none"
    assert set(found.values()) == {"fine"}
    assert set(found) == {"finite", "same base", "norms", "moved", "layers", "equally far", "cosines"}


@pytest.mark.parametrize(
    ("check", "experts", "expected"),
    [
        ("norms", {"a": {"d1": 0.99 * checks.NORM_DOUBTFUL}, "b": {"d2": 0.1}}, "fine"),
        ("norms", {"a": {"d1": 1.01 * checks.NORM_DOUBTFUL}, "b": {"d2": 0.1}}, "doubtful"),
        ("norms", {"a": {"d1": 1.01 * checks.NORM_DISTRUSTED}, "b": {"d2": 0.5}}, "do not trust"),
        ("same base", {"a": {"base": 0.1, "d1": 1.0}, "b": {"d2": 0.05}}, "do not trust"),
        ("same base", {"a": {"d1": 0.5, "d2": 0.05}, "b": {"d1": 0.5, "d3": 0.05}}, "do not trust"),
        ("same base", {"a": {"d1": 0.15, "d2": 0.01}, "b": {"d1": 0.15, "d3": 0.01}}, "doubtful"),
        ("equally far", {"a": {"d1": 0.01}, "b": {"d2": 0.01}, "c": {"d3": 0.04}}, "doubtful"),
        ("equally far", {"a": {"d1": 0.01}, "b": {"d2": 0.01}, "c": {"d3": 0.12}}, "do not trust"),
        ("equally far", {"a": {"d1": 0.05}, "b": {"d2": 0.05}, "c": {"d3": 0.01}}, "doubtful"),
        ("cosines", {"a": {"d1": 0.05}, "b": {"d1": -0.05, "d2": 0.05}}, "doubtful"),
        ("cosines", {"a": {"d1": 0.05}, "b": {"d1": 0.05, "d2": 0.001}, "c": {"d3": 0.05}}, "doubtful"),
        ("moved", {"a": {}, "b": {"d1": 0.05}}, "doubtful"),
        ("layers", {"a": {"d1": 0.5}, "b": {"d2": 0.5}}, "doubtful"),
    ],
)  # fmt: skip
def test_each_rule_has_its_threshold(
    tmp_path: Path, check: str, experts: dict[str, dict[str, float]], expected: str
) -> None:
    found = verdicts(tmp_path, {name: model(**along) for name, along in experts.items()})
    assert found[check] == expected


@pytest.mark.parametrize(("apart", "expected"), [(0.1, "fine"), (0.3, "doubtful"), (1.0, "do not trust")])
def test_without_a_base_distances_tell(tmp_path: Path, apart: float, expected: str) -> None:
    found = verdicts(tmp_path, {"a": model(d1=apart), "b": model(d2=apart), "c": model(d3=apart)}, base=False)
    assert found["distance"] == expected
    assert "same base" not in found


@pytest.mark.parametrize("owner", ["base", "b"])
def test_what_is_not_finite_is_named(tmp_path: Path, owner: str) -> None:
    tensors = {"base": model(), "a": model(d1=0.05), "b": model(d2=0.05)}
    tensors[owner]["model.layers.0.w.weight"][3, 4] = float("nan")
    result = preflight_family(write_family(tmp_path, tensors.pop("base"), tensors))
    [check] = [check for check in result["checks"] if check["name"] == "finite"]
    assert result["verdict"] == check["verdict"] == "do not trust"
    assert ("the base" if owner == "base" else "b holds") in check["why"]
    assert "model.layers.0.w.weight" in check["why"]
    assert result["norms"]["b"] is None


def _one_expert(root: Path) -> Family:
    return write_family(root, model(), {"a": model(d1=0.05)})


def _one_without_base(root: Path) -> Family:
    return write_family(root, None, {"a": model(d1=0.05)})


def _two_copies_of_the_base(root: Path) -> Family:
    return write_family(root, model(), {"a": model(), "b": model()})


@pytest.mark.parametrize("family", [_one_expert, _one_without_base, _two_copies_of_the_base])
def test_the_smallest_families_have_a_verdict(tmp_path: Path, family: Callable[[Path], Family]) -> None:
    result = preflight_family(family(tmp_path))
    assert result["verdict"] in VERDICTS
    assert all(check["why"] for check in result["checks"])


def test_a_nan_is_never_fine() -> None:
    assert graded(float("nan"), 1, 2) == graded(float("nan"), 2, 1) == "do not trust"
    assert [graded(value, 1, 2) for value in (0.9, 1, 2)] == ["fine", "doubtful", "do not trust"]
    assert [graded(value, 2, 1) for value in (2.1, 2, 1)] == ["fine", "doubtful", "do not trust"]


def test_one_expert_given_twice_is_doubtful_without_a_base_too(tmp_path: Path) -> None:
    """Alone, and beside another one."""
    twice = {"a": model(d1=0.05), "b": model(d1=0.05)}
    assert verdicts(tmp_path / "two", twice, base=False)["distance"] == "doubtful"
    three = write_family(tmp_path / "three", None, {"c": model(d2=0.05), **twice})
    [why] = [c["why"] for c in preflight_family(three)["checks"] if c["name"] == "distance"]
    assert why == "a and b are nearly the same expert: no search can part them"


@pytest.mark.parametrize("base", [True, False])
def test_nothing_to_measure_against_is_not_fine(tmp_path: Path, base: bool) -> None:
    """A base of zeros; experts whose mean is zero."""
    experts = {"a": model(base=0, d1=1), "b": model(base=0, d1=-1)}
    result = preflight_family(write_family(tmp_path, model(base=0) if base else None, experts))
    [why] = [check["why"] for check in result["checks"] if check["name"] == "same base"]
    assert result["verdict"] == "do not trust"
    assert "all zero" in why


def test_only_who_is_beyond_the_threshold_is_named(tmp_path: Path) -> None:
    experts = {"a": model(d1=0.2), "b": model(d2=2 * checks.NORM_DISTRUSTED)}
    result = preflight_family(write_family(tmp_path, model(), experts))
    [why] = [check["why"] for check in result["checks"] if check["name"] == "norms"]
    assert "(b)" in why
