"""Kullback-Leibler divergence of mixtures from a prior: its value, its least value, and projection onto its ball."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mergemix.search.simplex import UNITS
from mergemix.search.slsqp import minimize_inside

if TYPE_CHECKING:
    from mergemix.search.polytope import Polytope

TOLERANCE = 1e-9  # nats beyond the limit at which projection stops looking: the last step draws it inside
SLSQP_EXCESS = 1e-6  # nats beyond the limit that count as broken down
MAX_CUTS = 60
SMALLEST = 1e-9  # share at which the logarithm's slope is taken for shares of 0
EXCHANGES = (1024, 256, 64, 16, 4, 1)  # units


def divergence(shares: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """KL(shares || prior) in nats over the last axis of `shares` (..., K); infinite outside the prior's support."""
    from scipy.special import rel_entr

    return rel_entr(np.maximum(shares, 0.0), prior).sum(axis=-1)


def draw_inside(
    prior: np.ndarray, limit: float, inner: np.ndarray, outer: np.ndarray, *, halvings: int = 36
) -> np.ndarray:
    """Where the way from `inner`, with KL <= limit, to `outer` (..., K) leaves the ball of KL <= limit."""
    found = np.array(outer, dtype=np.float64)
    beyond = divergence(found, prior) > limit
    far = found[beyond]
    inside, outside = np.zeros((len(far), 1)), np.ones((len(far), 1))
    for _ in range(halvings if len(far) else 0):
        middle = (inside + outside) / 2
        fits = divergence(inner + middle * (far - inner), prior)[:, None] <= limit
        inside, outside = np.where(fits, middle, inside), np.where(fits, outside, middle)
    found[beyond] = inner + inside * (far - inner)
    return found


def project(
    polytope: Polytope, prior: np.ndarray, limit: float, center: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """The point nearest to `shares` (K,) of the polytope's part with KL <= limit; center: a point inside it.

    Under bounds alone solved as equations in two multipliers; with sums of shares by SLSQP, and if that breaks down
    by cutting planes.
    """
    point = polytope.project(shares)
    if float(divergence(point, prior)) <= limit:
        return point
    if not polytope.rows.size:
        return draw_inside(prior, limit, center, _project_on_box(polytope, prior, limit, shares))
    # From the boundary: there the slope is finite, and the nearest point is on it.
    found = minimize_inside(
        polytope,
        lambda point: float(np.sum((point - shares) ** 2)) / 2,
        lambda point: point - shares,
        draw_inside(prior, limit, center, point),
        more=[ball(prior, limit)],
        precision=1e-12,
    )
    if found is None or float(divergence(found, prior)) > limit + SLSQP_EXCESS:
        found = _cut(polytope, prior, limit, center, point, shares)
    return draw_inside(prior, limit, center, polytope.project(found))


def _cut(
    polytope: Polytope,
    prior: np.ndarray,
    limit: float,
    center: np.ndarray,
    point: np.ndarray,
    shares: np.ndarray,
) -> np.ndarray:
    """Cutting planes (Kelley 1960) from `point`, the polytope's nearest.

    The divergence is convex, so each point outside gives half-spaces that hold all of the inside: by the tangent at
    the point, and where the way to the centre crosses the boundary.
    """
    slopes, limits = np.empty((0, len(prior))), np.empty(0)
    for _ in range(MAX_CUTS):
        if float(divergence(point, prior)) <= limit + TOLERANCE:
            break
        for at in (point, draw_inside(prior, limit, center, point)):
            at = np.where(prior > 0, np.maximum(at, SMALLEST), 0.0)
            slope = _slope(at, prior)
            slopes = np.vstack([slopes, slope])
            limits = np.append(limits, limit - divergence(at, prior) + slope @ at)
        found = polytope.project(shares, (slopes, limits))
        if not np.isfinite(found).all():
            break
        point = found
    return point


def _project_on_box(polytope: Polytope, prior: np.ndarray, limit: float, shares: np.ndarray) -> np.ndarray:
    """The nearest point with KL = limit under bounds alone, to rounding.

    With a multiplier m of the divergence and t of the sum, each share solves x + m log x = share - t - m + m log prior
    (or is at a bound): x = m omega(that / m - log m) with Wright's omega, m and t found by bracketing.
    """
    from scipy.optimize import brentq
    from scipy.special import wrightomega

    lower, upper = polytope.lower / UNITS, polytope.upper / UNITS
    support = prior > 0
    logs = np.log(prior[support])

    def at(multiplier: float) -> np.ndarray:
        level = shares[support] / multiplier - 1 + logs - np.log(multiplier)
        point = lower.copy()

        def rest(shift: float) -> float:
            found = multiplier * wrightomega(level - shift)
            point[support] = np.clip(found, lower[support], upper[support])
            return float(point.sum()) - 1

        low, high = level.min() - 1 / multiplier - 50.0, level.max() + 800.0
        rest(brentq(rest, low, high, xtol=1e-13, rtol=1e-14))
        return point

    def beyond(logarithm: float) -> float:
        return float(divergence(at(float(np.exp(logarithm))), prior)) - limit

    low, high = -12.0, 12.0
    if beyond(high) > 0:
        return at(float(np.exp(high)))
    if beyond(low) < 0:
        return at(float(np.exp(low)))
    return at(float(np.exp(brentq(beyond, low, high, xtol=1e-10))))


def ball(prior: np.ndarray, limit: float) -> dict[str, Any]:
    """KL <= limit as a constraint for scipy.optimize.minimize."""
    return {
        "type": "ineq",
        "fun": lambda point: limit - _smooth(point, prior),
        "jac": lambda point: -_slope(point, prior),
    }


def least_units(polytope: Polytope, prior: np.ndarray) -> np.ndarray:
    """Whole units (K,) in the polytope with (about) the least KL.

    The least over all shares, rounded, then improved by exchanges between two domains until none helps.
    """
    units = polytope.round(_least_shares(polytope, prior))
    exchange = np.eye(polytope.k, dtype=np.int64)
    exchange = exchange[:, None] - exchange[None]  # [to, from]
    for size in EXCHANGES:
        for _ in range(UNITS // size):
            trial = units + size * exchange
            sums = trial @ polytope.rows.T
            inside = ((trial >= polytope.lower) & (trial <= polytope.upper)).all(axis=-1)
            inside &= ((sums >= polytope.row_lower) & (sums <= polytope.row_upper)).all(axis=-1)
            losses = np.where(inside, divergence(trial / UNITS, prior), np.inf)
            best = np.unravel_index(int(losses.argmin()), losses.shape)
            if not losses[best] < divergence(units / UNITS, prior) - 1e-15:
                break
            units = trial[best]
    return units


def _least_shares(polytope: Polytope, prior: np.ndarray) -> np.ndarray:
    """The shares (K,) in the polytope with the least KL: the prior scaled and clipped, without sums of shares."""
    lower, upper = polytope.lower / UNITS, polytope.upper / UNITS
    if not polytope.rows.size:
        low, high = -800.0, 800.0  # of the scale's logarithm
        for _ in range(200):
            middle = (low + high) / 2
            too_little = np.clip(_scaled(prior, middle), lower, upper).sum() < 1
            low, high = (middle, high) if too_little else (low, middle)
        return np.clip(_scaled(prior, high), lower, upper)
    found = minimize_inside(
        polytope, lambda point: _smooth(point, prior), lambda point: _slope(point, prior), polytope.center
    )
    return polytope.project(polytope.center if found is None else found)


def _smooth(point: np.ndarray, prior: np.ndarray) -> float:
    """The divergence, finite where a share is 0 or a rounding error below."""
    return float(divergence(np.where(prior > 0, np.maximum(point, SMALLEST), 0.0), prior))


def _slope(point: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Its gradient (K,), where shares of 0 count as SMALLEST."""
    support = prior > 0
    ratio = np.maximum(point, SMALLEST) / np.where(support, prior, 1.0)
    return np.where(support, np.log(ratio) + 1, 0.0)


def _scaled(prior: np.ndarray, logarithm: float) -> np.ndarray:
    """exp(logarithm) * prior without overflow; 2 is more than any share."""
    with np.errstate(divide="ignore"):
        return np.exp(np.minimum(np.log(prior) + logarithm, np.log(2.0)))
