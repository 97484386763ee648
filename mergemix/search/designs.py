"""Designs: sets of mixtures to measure, all inside a region, exactly. Cornell, Experiments with Mixtures (2002).

Every design is a list of distinct mixtures. It is shorter than asked for where the region has no more to give.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search import kl
from mergemix.search.polytope import Polytope
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS

CANDIDATES = 2000  # points that the optimal designs choose from, besides the vertices
CORNERS = 256
SWEEPS = 3  # of exchanges over a whole design
TRIES = 50  # draws per wanted mixture
VISITS = 200_000  # nodes of the tree of lattice points or vertices, before it counts as too large
RIDGE = 1e-3  # prior precision per coefficient (DuMouchel & Jones 1994): fewer points than coefficients are allowed


def lattice(region: Region, count: int) -> list[Mixture]:
    """The finest simplex lattice inside the region that has at most `count` points: the paper's coarse grid.

    Shares are minimum + (1 - sum of minima) * n / steps, n whole: under minima a lattice of pseudo-components, and
    without them of the shares themselves. [] when every lattice with a point inside has more than `count`.
    """
    best: list[Mixture] = []
    for steps in range(1, min(UNITS, 4 * count + 100) + 1):  # a line has steps + 1 points, other regions more
        points = _lattice(region, steps, count)
        if points is None:
            break
        if len(points) > len(best):
            best = _distinct(region, points)
    return best


def _lattice(region: Region, steps: int, most: int) -> np.ndarray | None:
    """The points (n, K) of one lattice, first domain first; None when there are more than `most`."""
    polytope = region.polytope
    lower, upper, limit = polytope.lower / UNITS, polytope.upper / UNITS, region.kl_limit
    step = (1 - lower.sum()) / steps
    if step < 1e-9:
        return lower[None]
    largest = np.floor((upper - lower) / step + 1e-9).astype(int)
    matrix, low, high = polytope.limits
    found: list[np.ndarray] = []
    visits = 0

    def place(counts: tuple[int, ...], rest: int) -> bool:
        """Whether the points that begin with `counts` are not too many."""
        nonlocal visits
        visits += 1
        k = len(counts)
        if k == len(lower):
            point = lower + step * np.array(counts)
            sums = matrix @ point
            if (sums >= low - 1e-9).all() and (sums <= high + 1e-9).all():
                if limit is None or region.divergence(point) <= limit:
                    found.append(point)
            return len(found) <= most and visits <= VISITS
        fewest = max(0, rest - int(largest[k + 1 :].sum()))
        counts_here = range(min(rest, int(largest[k])), fewest - 1, -1)
        return all(place((*counts, n), rest - n) for n in counts_here)

    return np.array(found).reshape(-1, len(lower)) if place((), steps) else None


def vertices(region: Region, limit: int) -> list[Mixture]:
    """The corners of the region, all of them if it has at most `limit` and only bounds on single domains.

    Otherwise up to `limit` of them, where random linear functions are largest; with a KL limit, where the way from
    the centre to the corner leaves it. Remembered: every maximisation over a region asks for them.
    """
    return list(_vertices(region, limit))


@lru_cache(maxsize=16)
def _vertices(region: Region, limit: int) -> tuple[Mixture, ...]:
    polytope = region.polytope
    corners = _corners(polytope, limit)
    if corners is None:
        rng = np.random.default_rng(0)
        found: dict[tuple[float, ...], None] = {}
        for _ in range(2 * limit):
            found[tuple(_highest(polytope, rng.standard_normal(polytope.k)))] = None
            if len(found) == limit:
                break
        corners = np.array(list(found))
    if region.kl_limit is not None:
        corners = kl.draw_inside(np.array(region.prior), region.kl_limit, region.center, corners)
    return tuple(_distinct(region, corners))


def _highest(polytope: Polytope, slopes: np.ndarray) -> np.ndarray:
    """The corner (K,) where a linear function is largest."""
    if not polytope.rows.size:
        units = polytope.lower.copy()
        rest = UNITS - units.sum()
        for k in np.argsort(-slopes):  # all that is free to the best domain, then to the next
            units[k] += min(rest, polytope.upper[k] - units[k])
            rest = UNITS - units.sum()
        return units / UNITS
    from scipy.optimize import linprog

    above = np.vstack([polytope.rows, -polytope.rows])
    rests = np.append(polytope.row_upper, -polytope.row_lower)
    bounds = np.column_stack([polytope.lower, polytope.upper])
    found = linprog(-slopes, above, rests, np.ones((1, polytope.k)), [UNITS], bounds, method="highs-ds")
    return polytope.center if found.x is None else found.x / UNITS


def _corners(polytope: Polytope, most: int) -> np.ndarray | None:
    """All corners (n, K) under bounds on single domains; None when there are more than `most`, or other bounds.

    All domains but one are at one of their bounds.
    """
    if polytope.rows.size:
        return None
    ends = [sorted({int(a), int(b)}) for a, b in zip(polytope.lower, polytope.upper, strict=True)]
    found: dict[tuple[int, ...], None] = {}
    visits = 0

    def place(units: tuple[int, ...], free: int) -> bool:
        """Whether the corners that begin with `units` are not too many; the share of `free` is what is left."""
        nonlocal visits
        visits += 1
        k = len(units)
        rest = UNITS - sum(units)
        if not sum(e[0] for e in ends[k:]) + units_free(units, free)[0] <= rest:
            return True
        if not sum(e[-1] for e in ends[k:]) + units_free(units, free)[1] >= rest:
            return True
        if k == len(ends):
            found[tuple(rest if j == free else n for j, n in enumerate(units))] = None
            return len(found) <= most and visits <= VISITS
        return all(place((*units, n), free) for n in ([0] if k == free else ends[k]))

    def units_free(units: tuple[int, ...], free: int) -> tuple[int, int]:
        """The least and most that the free domain takes, once it has been passed with 0."""
        return (ends[free][0], ends[free][-1]) if len(units) > free else (0, 0)

    complete = all(place((), free) for free in range(len(ends)))
    return np.array(list(found)) / UNITS if complete and visits <= VISITS else None


def centroid(region: Region) -> Mixture:
    """The mean of the corners where they are few, as usual for constrained mixtures, and else of a uniform sample."""
    if region.is_simplex:
        return Mixture.uniform(region.names)
    if region.kl_limit is None:
        corners = _corners(region.polytope, CORNERS)
        if corners is not None:
            return region.snap(corners.mean(axis=0))
    return region.snap(region.sample(CANDIDATES, np.random.default_rng(0)).mean(axis=0))


def dirichlet(
    region: Region, count: int, prior: Mixture, concentration: float, rng: np.random.Generator
) -> list[Mixture]:
    """Draws from Dirichlet(concentration * prior), mean `prior`: the larger the concentration, the nearer.

    Draws outside the region are drawn again; where few fall inside, the nearest points inside take their place.
    Domains with prior 0 get no share but what constraints demand. Raises ValueError for a concentration <= 0.
    """
    if not concentration > 0:
        raise ValueError(f"the concentration must be > 0, but is {concentration}")
    weights = np.array(prior.weights)
    support = weights > 0
    draws = np.zeros((TRIES * count, len(weights)))
    draws[:, support] = rng.dirichlet(concentration * weights[support], size=len(draws))
    # A concentration so small that every draw underflows gives no numbers: then it is a single domain.
    draws = draws[np.isfinite(draws).all(axis=1)]
    inside = region.holds(draws)
    return _some(region, np.vstack([draws[inside], draws[~inside]]), count)


def maximin(
    region: Region, count: int, rng: np.random.Generator, *, existing: Sequence[Mixture] = ()
) -> list[Mixture]:
    """Space filling: mixtures that are far from each other and from `existing` ones.

    Greedy farthest points of a large sample and the corners, then exchanges of single points while the smallest
    distance (Euclidean) grows.
    """
    points = _candidates(region, rng)
    taken = np.array([mixture.weights for mixture in existing]).reshape(-1, points.shape[1])
    nearest = (
        _distances(points, taken).min(axis=1) if len(taken) else _distances(points, region.center[None])[:, 0]
    )
    chosen: list[int] = []
    for _ in range(min(count, len(points))):
        best = int(nearest.argmax())
        if nearest[best] < 0.5 / UNITS:
            break
        chosen.append(best)
        fresh = _distances(points, points[[best]])[:, 0]
        nearest = np.minimum(nearest, fresh) if len(taken) or len(chosen) > 1 else fresh
    for _ in range(SWEEPS):
        if not _spread(points, chosen, taken):
            break
    return _some(region, np.vstack([points[chosen], points]), count, exclude=existing)


def _spread(points: np.ndarray, chosen: list[int], taken: np.ndarray) -> bool:
    """Move each chosen point to where it is farthest from the others; whether any moved."""
    moved = False
    between = _distances(points, points[chosen])
    fixed = _distances(points, taken).min(axis=1) if len(taken) else np.full(len(points), np.inf)
    for place, index in enumerate(chosen):
        others = np.minimum(np.delete(between, place, axis=1).min(axis=1, initial=np.inf), fixed)
        best = int(others.argmax())
        if np.isfinite(others[best]) and others[best] > others[index] * (1 + 1e-9):
            chosen[place], moved = best, True
            between[:, place] = _distances(points, points[[best]])[:, 0]
    return moved


def d_optimal(
    region: Region,
    count: int,
    rng: np.random.Generator,
    *,
    existing: Sequence[Mixture] = (),
    model: str = "scheffe",
) -> list[Mixture]:
    """Mixtures that, with `existing` ones, determine the coefficients of a model best: the largest det(F'F).

    model: "linear" in the shares, or "scheffe", with all products of two. Greedy, then exchanges of single points
    (Fedorov 1972) over a large sample, the corners and the middles between corners. A small ridge makes fewer points
    than coefficients possible. A mixture is never proposed twice: another measurement of it is not a new mixture.
    """
    if model not in ("linear", "scheffe"):
        raise ValueError(f'model must be "linear" or "scheffe", but is {model!r}')
    points = _candidates(region, rng)
    features = _features(points, model)
    known = _features(np.array([m.weights for m in existing]).reshape(-1, points.shape[1]), model)
    inverse = np.linalg.inv(RIDGE * np.eye(features.shape[1]) + known.T @ known)
    chosen: list[int] = []
    free = np.ones(len(points), dtype=bool)
    for _ in range(min(count, len(points))):
        best = int(np.where(free, _leverage(features, inverse), -np.inf).argmax())
        inverse = _updated(inverse, features[best], 1.0)
        chosen.append(best)
        free[best] = False
    for _ in range(SWEEPS):
        moved = False
        for place, index in enumerate(chosen):
            without = _updated(inverse, features[index], -1.0)
            gains = np.where(free, _leverage(features, without), -np.inf)
            best = int(gains.argmax())
            if gains[best] > features[index] @ without @ features[index] * (1 + 1e-6):
                free[[index, best]] = True, False
                chosen[place], moved = best, True
                inverse = _updated(without, features[best], 1.0)
        if not moved:
            break
    return _some(region, np.vstack([points[chosen], points]), count, exclude=existing)


def _features(points: np.ndarray, model: str) -> np.ndarray:
    if model == "linear":
        return points
    first, second = np.triu_indices(points.shape[1], 1)
    return np.hstack([points, points[:, first] * points[:, second]])


def _leverage(features: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """f' M^-1 f of each row: adding it multiplies the determinant by 1 + that."""
    return np.einsum("nf,nf->n", features @ inverse, features)


def _updated(inverse: np.ndarray, feature: np.ndarray, sign: float) -> np.ndarray:
    """The inverse of M + sign * f f' (Sherman & Morrison)."""
    along = inverse @ feature
    return inverse - sign * np.outer(along, along) / (1 + sign * float(feature @ along))


def _candidates(region: Region, rng: np.random.Generator) -> np.ndarray:
    """Points inside the region (n, K), a unit apart: the corners, the middles between them, and a sample."""
    corners = np.array([mixture.weights for mixture in vertices(region, CORNERS)])
    first, second = np.triu_indices(len(corners), 1)
    if len(first) > CANDIDATES:
        kept = np.sort(rng.choice(len(first), CANDIDATES, replace=False))
        first, second = first[kept], second[kept]
    middles = (corners[first] + corners[second]) / 2
    sample = region.sample(CANDIDATES, rng)
    points = np.vstack([corners, middles, sample])
    _, first = np.unique(np.rint(points * UNITS), axis=0, return_index=True)
    return points[np.sort(first)]


def _distances(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    return cdist(points, others)


def _distinct(region: Region, shares: np.ndarray) -> list[Mixture]:
    return list(dict.fromkeys(region.snap(row) for row in shares))


def _some(region: Region, shares: np.ndarray, count: int, exclude: Sequence[Mixture] = ()) -> list[Mixture]:
    """The mixtures of the first rows (n, K) that give `count` distinct ones, not among `exclude`."""
    found: dict[Mixture, None] = {}
    known = set(exclude)
    for row in shares:
        if len(found) == count:
            break
        mixture = region.snap(row)
        if mixture not in known:
            found[mixture] = None
    return list(found)
