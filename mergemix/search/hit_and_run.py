"""Uniform samples of a polytope of mixtures, or of a convex part of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mergemix.search.simplex import UNITS

if TYPE_CHECKING:
    from mergemix.search.polytope import Polytope

Accept = Callable[[np.ndarray], np.ndarray]  # shares (n, K) -> whether each is allowed (n,)

MIN_ACCEPTANCE = 0.05  # of independent draws: below, the walk is cheaper
NOWHERE = 1e-9  # a direction so short is rounding, and may lead out of the region
MAX_SHRINKS = 60  # halvings of a step on average: then the walker stays, which keeps the distribution


def reject(
    polytope: Polytope, count: int, rng: np.random.Generator, accept: Accept | None
) -> np.ndarray | None:
    """`count` independent draws from the smallest simplex that has the lower bounds, or None where too few fall inside.

    Domains with a share of their own stay out of the draw.
    """
    free = polytope.upper > polytope.lower
    rest = (UNITS - polytope.lower.sum()) / UNITS
    if free.sum() < 2 or rest <= 0:
        return None
    matrix, low, high = polytope.limits
    found = np.empty((0, polytope.k))
    drawn = 0
    while len(found) < count:
        size = max(256, 2 * count)
        points = np.tile(polytope.lower / UNITS, (size, 1))
        points[:, free] += rest * rng.dirichlet(np.ones(int(free.sum())), size=size)
        sums = points @ matrix.T
        inside = ((sums >= low - 1e-12) & (sums <= high + 1e-12)).all(axis=1)
        if accept is not None:
            inside &= accept(points)
        found = np.vstack([found, points[inside]])
        drawn += size
        if len(found) < MIN_ACCEPTANCE * drawn:
            return None
    return found[:count]


def hit_and_run(
    polytope: Polytope, count: int, rng: np.random.Generator, start: np.ndarray, accept: Accept | None
) -> np.ndarray:
    """`count` walkers (count, K) that all set out from `start`, a point inside, after enough steps to forget it.

    Steps (Smith 1984: to a uniform point of a random line's part inside) alternate between exchanges of two domains
    and differences of two other walkers, which have the shape of the region however thin it is (Goodman & Weare 2010).
    """
    dimension = polytope.hull.shape[1]
    if not dimension:
        return np.tile(start, (count, 1))
    size = max(count, 8 * (dimension + 1), 64)
    half = size // 2
    walkers = np.tile(start, (size, 1))
    exchanges = _exchanges(polytope)
    for _ in range(6):  # spread out: differences of walkers need to span the region
        steps = rng.standard_normal((size, dimension)) @ polytope.hull.T
        walkers = _step(polytope, walkers, steps, rng, accept)
    for turn in range(20 + 4 * dimension):
        if turn % 2 and len(exchanges):
            steps = exchanges[rng.integers(len(exchanges), size=size)]
            walkers = _step(polytope, walkers, steps, rng, accept)
            continue
        for own, others in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
            moved, company = walkers[own], walkers[others]
            first, second = rng.integers(len(company), size=(2, len(moved)))
            steps = (company[first] - company[second]) @ polytope.hull @ polytope.hull.T
            walkers[own] = _step(polytope, moved, steps, rng, accept)
    return walkers[rng.permutation(size)[:count]]


def _exchanges(polytope: Polytope) -> np.ndarray:
    """Directions (n, K) from one domain to another that keep every sum that must be kept."""
    directions = [np.eye(polytope.k)[i] - np.eye(polytope.k)[j] for i in range(polytope.k) for j in range(i)]
    found = np.array(directions)
    hull = polytope.hull
    return found[np.abs(found - found @ hull @ hull.T).max(axis=1) < 1e-9]


def _step(
    polytope: Polytope,
    walkers: np.ndarray,
    directions: np.ndarray,
    rng: np.random.Generator,
    accept: Accept | None,
) -> np.ndarray:
    """One step of each walker (n, K) along its direction (n, K), uniform on the line's part inside.

    Where `accept` refuses, the part shrinks to the refused point (Neal 2003, figure 5: it stays uniform).
    """
    back, forth = reach(polytope, walkers, directions)
    moved = walkers.copy()
    left = np.arange(len(walkers))
    for _ in range(MAX_SHRINKS if accept is not None else 1):
        step = back[left] + rng.random(len(left)) * (forth[left] - back[left])
        trial = np.clip(
            walkers[left] + step[:, None] * directions[left], polytope.lower / UNITS, polytope.upper / UNITS
        )
        fits = np.ones(len(left), dtype=bool) if accept is None else accept(trial)
        moved[left[fits]] = trial[fits]
        left, step = left[~fits], step[~fits]
        if not len(left):
            break
        back[left] = np.where(step < 0, step, back[left])
        forth[left] = np.where(step < 0, forth[left], step)
    return moved


def reach(polytope: Polytope, points: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far (n,), (n,) back (<= 0) and forth (>= 0) from points (n, K) inside along directions (n, K) is inside."""
    matrix, low, high = polytope.limits
    loose = ~polytope.tight_rows
    sums, slopes = points @ matrix[loose].T, directions @ matrix[loose].T
    flat = np.abs(slopes) <= 1e-12 * np.abs(directions).max(axis=1, initial=1e-300, keepdims=True)
    slopes = np.where(flat, 1.0, slopes)
    first, second = (low[loose] - sums) / slopes, (high[loose] - sums) / slopes
    back = np.where(flat, -np.inf, np.minimum(first, second)).max(axis=1, initial=-np.inf)
    forth = np.where(flat, np.inf, np.maximum(first, second)).min(axis=1, initial=np.inf)
    nowhere = np.isinf(back) | np.isinf(forth) | (np.abs(directions).max(axis=1) < NOWHERE)
    return np.where(nowhere, 0.0, np.minimum(back, 0.0)), np.where(nowhere, 0.0, np.maximum(forth, 0.0))
