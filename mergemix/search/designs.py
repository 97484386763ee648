"""Designs: sets of mixtures to measure, all inside a region, exactly. Cornell, Experiments with Mixtures (2002).

Every design is a list of distinct mixtures. It is shorter than asked for where the region has no more to give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.corners import vertices
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS

DESIGNS = ("maximin", "d-optimal", "dirichlet", "lattice", "vertices")
CANDIDATES = 2000  # points that the optimal designs choose from, besides the vertices
CORNERS = 128
SWEEPS = 3  # of exchanges over a whole design
TRIES = 20  # draws per wanted mixture
VISITS = 20_000  # nodes of the tree of lattice points, before there are too many
TOTAL_VISITS = 100_000  # likewise, of all lattices tried: in a thin region most have no point inside
RIDGE = 1e-3  # prior precision per coefficient (DuMouchel & Jones 1994): fewer points than coefficients are allowed


def design(
    kind: str,
    region: Region,
    count: int,
    rng: np.random.Generator,
    *,
    existing: Sequence[Mixture] = (),
    prior: Mixture | None = None,
) -> list[Mixture]:
    """Up to `count` distinct mixtures that are not among `existing`, by one of DESIGNS.

    prior: what "dirichlet" is centred on, uniform by default. Raises ConfigError for another kind.
    """
    if kind not in DESIGNS:
        raise ConfigError(f"a design must be one of {', '.join(DESIGNS)}, but is {kind!r}")
    if kind == "maximin":
        points = maximin(region, count, rng, existing=existing)
    elif kind == "d-optimal":
        points = d_optimal(region, count, rng, existing=existing)
    elif kind == "dirichlet":
        centre = prior or Mixture.uniform(region.names)
        points = dirichlet(region, count + len(existing), centre, len(region.names), rng)
    elif kind == "vertices":
        points = vertices(region, count + len(existing))
    else:
        points = lattice(region, count + len(existing))
    return [point for point in points if point not in set(existing)][:count]


def lattice(region: Region, count: int) -> list[Mixture]:
    """The finest simplex lattice inside the region that has at most `count` points: the paper's coarse grid.

    Shares are minimum + (1 - sum of minima) * n / steps, n whole: under minima a lattice of pseudo-components, and
    without them of the shares themselves. [] when every lattice with a point inside has more than `count`.
    """
    best: list[Mixture] = []
    visits = 0
    for steps in range(1, min(UNITS, 4 * count + 100) + 1):  # a line has steps + 1 points, other regions more
        points, visited = _lattice(region, steps, count)
        visits += visited
        if points is None or visits > TOTAL_VISITS:
            break
        if len(points) > len(best):
            best = _distinct(region, points)
    return best


def _lattice(region: Region, steps: int, most: int) -> tuple[np.ndarray | None, int]:
    """The points (n, K) of one lattice, None when there are more than `most`; and how many nodes were visited."""
    polytope = region.polytope
    lower, upper, limit = polytope.lower / UNITS, polytope.upper / UNITS, region.kl_limit
    step = (1 - lower.sum()) / steps
    if step < 1e-9:
        return lower[None], 1
    largest = np.floor((upper - lower) / step + 1e-9).astype(int)
    matrix, low, high = polytope.limits
    found: list[np.ndarray] = []
    visits, most_visits = 0, VISITS + len(lower) * most

    def place(counts: tuple[int, ...], rest: int) -> bool:
        """Whether the points that begin with `counts` are not too many."""
        nonlocal visits
        visits += 1
        k = len(counts)
        if k == len(lower):
            point = lower + step * np.array(counts)
            sums = matrix @ point
            inside = (sums >= low - 1e-9).all() and (sums <= high + 1e-9).all()
            if inside and (limit is None or region.divergence(point) <= limit):
                found.append(point)
            return len(found) <= most and visits <= most_visits
        fewest = max(0, rest - int(largest[k + 1 :].sum()))
        counts_here = range(min(rest, int(largest[k])), fewest - 1, -1)
        return all(place((*counts, n), rest - n) for n in counts_here)

    complete = place((), steps)
    return (np.array(found).reshape(-1, len(lower)) if complete else None), visits


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
    return _some(region, np.vstack([points[chosen], points[: TRIES * count]]), count, exclude=existing)


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
    gain = _Gain(features, np.linalg.inv(RIDGE * np.eye(features.shape[1]) + known.T @ known))
    chosen: list[int] = []
    free = np.ones(len(points), dtype=bool)
    for _ in range(min(count, len(points))):
        best = int(np.where(free, gain.leverage, -np.inf).argmax())
        gain.change(best, 1.0)
        chosen.append(best)
        free[best] = False
    for _ in range(SWEEPS):
        moved = False
        for place, index in enumerate(chosen):
            gain.change(index, -1.0)
            best = int(np.where(free, gain.leverage, -np.inf).argmax())
            if free[best] and gain.leverage[best] > gain.leverage[index] * (1 + 1e-6):
                free[[index, best]] = True, False
                chosen[place], moved = best, True
            gain.change(chosen[place], 1.0)
        if not moved:
            break
    return _some(region, np.vstack([points[chosen], points[: TRIES * count]]), count, exclude=existing)


class _Gain:
    """The inverse of M = F'F + ridge, and f' M^-1 f of all candidates: adding one multiplies det(M) by 1 + that."""

    def __init__(self, features: np.ndarray, inverse: np.ndarray) -> None:
        self.features, self.inverse = features, inverse
        self.leverage = np.einsum("nf,nf->n", features @ inverse, features)

    def change(self, index: int, sign: float) -> None:
        """Add (1) or take away (-1) a candidate: Sherman & Morrison's formula."""
        along = self.inverse @ self.features[index]
        size = sign / (1 + sign * float(self.features[index] @ along))
        self.inverse = self.inverse - size * np.outer(along, along)
        self.leverage = self.leverage - size * (self.features @ along) ** 2


def _features(points: np.ndarray, model: str) -> np.ndarray:
    if model == "linear":
        return points
    first, second = np.triu_indices(points.shape[1], 1)
    return np.hstack([points, points[:, first] * points[:, second]])


def _candidates(region: Region, rng: np.random.Generator) -> np.ndarray:
    """Points inside the region (n, K), a unit apart: the corners, the middles between them, and a sample."""
    ends = np.array([mixture.weights for mixture in vertices(region, CORNERS)])
    first, second = np.triu_indices(len(ends), 1)
    if len(first) > CANDIDATES:
        kept = np.sort(rng.choice(len(first), CANDIDATES, replace=False))
        first, second = first[kept], second[kept]
    middles = (ends[first] + ends[second]) / 2
    sample = region.sample(CANDIDATES, rng)
    points = np.vstack([ends, middles, sample])
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
