"""Smooth minimisation under the linear limits of a polytope of mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergemix.search.simplex import UNITS

if TYPE_CHECKING:
    from mergemix.search.polytope import Polytope


def minimize_inside(
    polytope: Polytope,
    value: Callable[[np.ndarray], float],
    slope: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    *,
    more: Sequence[dict[str, Any]] = (),
    steps: int = 200,
    precision: float = 1e-14,
) -> np.ndarray | None:
    """The shares (K,) where SLSQP (Kraft 1988) ends from `start`, and None where it breaks down.

    Limits hold but for rounding. more: further constraints, as scipy.optimize.minimize takes them.
    """
    constraints: list[dict[str, Any]] = [
        {"type": "eq", "fun": lambda point: point.sum() - 1, "jac": np.ones_like},
        *more,
    ]
    if polytope.rows.size:
        signed, rests = _rows(polytope)
        constraints.append(
            {"type": "ineq", "fun": lambda point: signed @ point - rests, "jac": lambda _: signed}
        )
    bounds = np.column_stack([polytope.lower, polytope.upper]) / UNITS
    return _ended(value, slope, start, bounds, constraints, steps, precision)


def maximize_least(
    polytope: Polytope,
    values: Callable[[np.ndarray], np.ndarray],
    slopes: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    *,
    more: Sequence[dict[str, Any]] = (),
    steps: int,
    precision: float,
) -> np.ndarray | None:
    """The shares (K,) where the least of `values` (K,) -> (P,), smooth with `slopes` (K,) -> (P, K), is the largest.

    A number below all of them is maximised beside the shares, so that there are no kinks. The flattest should have a
    slope of about 1. The rest as of `minimize_inside`.
    """
    k = len(start)
    signed, rests = _rows(polytope)
    sizes = np.maximum(
        np.abs(slopes(start)).max(axis=1), 1.0
    )  # steep ones, as of floors, would drown the others
    inside = np.append(np.ones(k), 0.0)
    constraints: list[dict[str, Any]] = [
        {"type": "eq", "fun": lambda point: point[:k].sum() - 1, "jac": lambda _: inside},
        {
            "type": "ineq",
            "fun": lambda point: (values(point[:k]) - point[k]) / sizes,
            "jac": lambda point: _beside(slopes(point[:k]), -1.0) / sizes[:, None],
        },
        *(_of_shares(each, k) for each in more),
    ]
    if len(signed):
        wider = _beside(signed, 0.0)
        constraints.append(
            {"type": "ineq", "fun": lambda point: signed @ point[:k] - rests, "jac": lambda _: wider}
        )
    limits = np.column_stack([polytope.lower, polytope.upper]) / UNITS
    down = np.append(np.zeros(k), -1.0)
    found = _ended(
        lambda point: -point[k],
        lambda _: down,
        np.append(start, values(start).min()),
        np.vstack([limits, [-np.inf, np.inf]]),
        constraints,
        steps,
        precision,
    )
    return None if found is None else found[:k]


def _rows(polytope: Polytope) -> tuple[np.ndarray, np.ndarray]:
    """(A, b): A @ shares >= b says what the sums of shares must be."""
    signed = np.vstack([polytope.rows, -polytope.rows])
    return signed, np.append(polytope.row_lower, -polytope.row_upper) / UNITS


def _beside(slopes: np.ndarray, last: float) -> np.ndarray:
    """slopes (P, K) and a column more."""
    return np.column_stack([slopes, np.full(len(slopes), last)])


def _of_shares(constraint: dict[str, Any], k: int) -> dict[str, Any]:
    """A constraint on shares (K,) as one on shares and a number more."""
    value, slope = constraint["fun"], constraint["jac"]
    return {
        **constraint,
        "fun": lambda point: value(point[:k]),
        "jac": lambda point: np.append(slope(point[:k]), 0.0),
    }


def _ended(
    value: Callable[[np.ndarray], float],
    slope: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    bounds: np.ndarray,
    constraints: Sequence[dict[str, Any]],
    steps: int,
    precision: float,
) -> np.ndarray | None:
    from scipy.optimize import minimize

    options = {"maxiter": steps, "ftol": precision}
    found = minimize(
        value, start, jac=slope, method="SLSQP", bounds=bounds, constraints=constraints, options=options
    )
    return found.x if found.get("status", 0) in (0, 8, 9) and np.isfinite(found.x).all() else None
