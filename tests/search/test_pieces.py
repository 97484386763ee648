"""Which utilities are the least of a few linear functions, and of which."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.evals.utility_spec import capability_objective
from mergemix.search.pieces import MOST, pieces_of

CAPABILITIES = ["a", "b", "c"]
SCORES = np.random.default_rng(0).uniform(0.2, 0.9, size=(50, 3))


def combined(spec: str):
    objective = capability_objective(spec, CAPABILITIES)
    return lambda scores: objective(dict(zip(CAPABILITIES, scores.T, strict=True)))


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("macro", 1),
        ("a=2,b=1", 1),
        ("worst", 3),
        ("0.5*a + 0.5*min(b, c)", 2),
        ("min(a, 0.5)", 2),
        ("a; b >= 0.5; c >= 0.4", 4),
    ],
)
def test_minima_sums_and_floors_are_made_of_pieces(spec: str, count: int) -> None:
    pieces = pieces_of(combined(spec), SCORES)
    assert pieces is not None
    assert pieces.slopes.shape == (count, 3)
    near = np.random.default_rng(1).uniform(0.0, 1.0, size=(500, 3))
    np.testing.assert_allclose(pieces(near).min(axis=1), combined(spec)(near), atol=1e-7)


@pytest.mark.parametrize(
    "spec",
    [
        "max(a, b)",
        "a*b",
        "a - min(b, c)",
        "sqrt(a)",
        "a/b",
        "sqrt(a - 0.5)",
        "min(2*a, 0.5 + max(0, a - 0.8))",
    ],
)
def test_what_is_curved_or_has_a_ridge_the_other_way_is_not(spec: str) -> None:
    assert pieces_of(combined(spec), SCORES) is None


def test_a_score_that_is_the_same_everywhere_does_no_harm() -> None:
    scores = SCORES * [1, 1, 0] + [0, 0, 0.3]
    pieces = pieces_of(combined("worst"), scores)
    assert pieces is not None
    np.testing.assert_allclose(pieces(scores).min(axis=1), scores.min(axis=1), atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 5), st.sampled_from([1e-3, 1.0, 1e4]))
def test_any_minimum_of_linear_functions_is_found(seed: int, count: int, width: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    slopes, offsets = rng.normal(size=(count, width)), rng.normal(size=count) / 4 * unit
    scores = unit * rng.random((30, width))

    def combine(at: np.ndarray) -> np.ndarray:
        return (at @ slopes.T + offsets).min(axis=1)

    pieces = pieces_of(combine, scores)
    assert pieces is not None
    assert len(pieces.offsets) <= min(count, MOST)
    # A piece that is the least in hardly any place may be missed, never one that is too low.
    assert (pieces(scores).min(axis=1) >= combine(scores) - 1e-5 * unit).all()
    assert np.mean(np.abs(pieces(scores).min(axis=1) - combine(scores)) < 1e-5 * unit) > 0.8
