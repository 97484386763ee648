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
    from scipy.optimize import minimize

    signed = np.vstack([polytope.rows, -polytope.rows])
    rests = np.append(polytope.row_lower, -polytope.row_upper) / UNITS
    constraints: list[dict[str, Any]] = [
        {"type": "eq", "fun": lambda point: point.sum() - 1, "jac": np.ones_like},
        *more,
    ]
    if len(signed):
        constraints.append(
            {"type": "ineq", "fun": lambda point: signed @ point - rests, "jac": lambda _: signed}
        )
    found = minimize(
        value,
        start,
        jac=slope,
        method="SLSQP",
        bounds=np.column_stack([polytope.lower, polytope.upper]) / UNITS,
        constraints=constraints,
        options={"maxiter": steps, "ftol": precision},
    )
    return found.x if found.get("status", 0) in (0, 8, 9) and np.isfinite(found.x).all() else None
