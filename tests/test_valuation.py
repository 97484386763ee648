"""What candidates are worth, and how far that can be trusted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.evals.estimate import estimate, reference_scores
from mergemix.evals.utility import Utility
from mergemix.evals.utility_spec import capability_objective
from mergemix.stored import read_evidence
from mergemix.study import Estimate
from mergemix.valuation import propagate
from tests.solve_study import write_study

NAMES = ["math", "code", "web"]
Number = st.floats(-1, 1)


@given(
    st.tuples(Number, Number, Number),
    st.tuples(*[st.floats(0, 0.3)] * 3),
    st.tuples(*[st.floats(0.1, 5)] * 3),
)
def test_the_error_of_a_weighted_mean_is_that_of_its_parts(values, errors, weights) -> None:
    spec = ",".join(f"{name}={weight!r}" for name, weight in zip(NAMES, weights, strict=True))
    scores = {name: (v, e) for name, v, e in zip(NAMES, values, errors, strict=True)}
    expected = np.linalg.norm(np.array(weights) / sum(weights) * errors)
    assert propagate(capability_objective(spec, NAMES), scores) == pytest.approx(expected, abs=1e-9)


def test_the_error_of_the_worst_is_that_of_the_lowest_alone() -> None:
    scores = {"math": (0.2, 0.01), "code": (0.9, 0.1), "web": (0.8, 0.1)}
    assert propagate(capability_objective("worst", NAMES), scores) == pytest.approx(0.01)
    assert propagate(capability_objective("sqrt(math - 1)", NAMES), scores) == 0, "a slope that is not there"


def test_a_complete_candidate_is_estimated_by_its_own_mean() -> None:
    rng = np.random.default_rng(0)
    utility = Utility({"a": 0.7, "b": -0.3}, 0.1)
    difficulty = {"a": rng.normal(size=50), "b": rng.normal(size=80)}
    others = [{n: d + 0.1 * rng.normal(size=len(d)) for n, d in difficulty.items()} for _ in range(5)]
    own = {n: d + 0.1 * rng.normal(size=len(d)) for n, d in difficulty.items()}
    value, error = estimate(utility, own, reference_scores(others))
    assert value == pytest.approx(utility(own))
    assert error == pytest.approx(np.hypot(0.7 * 0.1 / np.sqrt(50), 0.3 * 0.1 / np.sqrt(80)), rel=0.5)
    plain = np.hypot(0.7 * own["a"].std() / np.sqrt(50), 0.3 * own["b"].std() / np.sqrt(80))
    assert error < plain / 3, "hard items are no noise"


def test_missing_items_are_filled_from_what_others_scored_there() -> None:
    rng = np.random.default_rng(1)
    utility = Utility({"a": 1.0}, 0.0)
    difficulty = rng.normal(size=2000)
    reference = reference_scores([{"a": difficulty}])
    own = difficulty + 0.5 + 0.1 * rng.normal(size=2000)
    easy_first = np.where(difficulty > 0.5, own, np.nan)
    value, error = estimate(utility, {"a": easy_first}, reference)
    assert value == pytest.approx(own.mean(), abs=4 * error)
    assert np.nanmean(easy_first) > own.mean() + 0.5, "which the plain mean would not give"
    assert estimate(utility, {"a": np.full(2000, np.nan)}, reference) is None
    with pytest.raises(ValueError, match="needs a candidate"):
        reference_scores([])


def test_items_that_no_other_has_a_score_for_are_left_out() -> None:
    reference = reference_scores(
        [{"a": np.array([1.0, np.nan, 3.0])}, {"a": np.array([np.nan, np.nan, 5.0])}]
    )
    np.testing.assert_array_equal(reference["a"], [1.0, np.nan, 4.0])
    value, _ = estimate(Utility({"a": 1.0}, 0.0), {"a": np.array([2.0, 9.0, 5.0])}, reference)
    assert value == pytest.approx(3.5)


def test_a_stopped_candidate_is_worth_what_is_asked_now(tmp_path: Path) -> None:
    """Raced on math: what it would have scored on code nobody knows."""
    write_study(tmp_path / "a", stopped=1)
    raced = Estimate(0.123, 0.05, {"sums": (0.4, 0.05)})
    for utility, expected in (("math", 0.4), ("2*math + 1", 1.8), ("code", None), ("macro", None)):
        evidence = read_evidence(tmp_path / "a", utility=utility)
        [stopped] = [each for each in evidence.candidates if each.record.status == "stopped"]
        outcome = evidence.valuation.outcome(replace(stopped.record, estimate=raced), stopped.items)
        assert outcome.utility == (None if expected is None else pytest.approx(expected))
        assert outcome.partial
        assert set(outcome.capabilities) == {"math"}, "which it teaches in any case"


def test_stopped_candidates_have_larger_errors(tmp_path: Path) -> None:
    write_study(tmp_path / "a", stopped=10)
    found = [(each.record.status, each.outcome) for each in read_evidence(tmp_path / "a").candidates]
    whole = [outcome for status, outcome in found if status == "done"]
    partial = [outcome for status, outcome in found if status == "stopped"]
    assert len(partial) == 10
    assert all(
        outcome.partial and set(outcome.capabilities) == {"math", "code", "language"} for outcome in partial
    )
    assert not any(outcome.partial for outcome in whole)
    assert min(o.stderr for o in partial) > max(o.stderr for o in whole) > 0
    # The estimate's own error (0.05 in this study) beside that of a candidate that answered all items: what makes items
    # hard for all is in neither.
    for name in ("math", "code", "language"):
        own = float(np.median([outcome.capabilities[name][1] for outcome in whole]))
        assert all(o.capabilities[name][1] == pytest.approx(math.hypot(0.05, own), rel=0.02) for o in partial)
