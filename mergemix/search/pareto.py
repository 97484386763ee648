"""Mixtures that no other beats in all capabilities: among measured ones, and as surrogates predict them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.region import Region

SAMPLES = 1024
CORNERS = 128
ROUNDS = 6
COUNT = 24
_BLOCK = 256  # rows compared at once: memory is block * n * capabilities numbers

# Normalised scores by capability, (n,) each, of shares (n, K).
Predict = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def front(scores: np.ndarray, margin: np.ndarray | None = None) -> np.ndarray:
    """Which rows of `scores` (n, capabilities), higher is better, no other row beats: bool (n,).

    A row beats another that is nowhere higher and somewhere lower; equal rows do not beat each other.
    margin: (n, capabilities), error of each score in the same unit. Then a row is only left out where another is
    ahead of it in every capability by more than the two errors together (root of the sum of squares): "not clearly
    beaten". Without it measured sets are rather too small, and hold the lucky.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if margin is not None:
        return _not_clearly_beaten(scores, margin)
    # In lexicographic order whoever beats a row stands before it; and if anybody does, so does a row of the front.
    order = np.lexsort(-scores.T[::-1])
    best = np.empty(0, dtype=np.int64)
    for begin in range(0, len(order), _BLOCK):
        block = order[begin : begin + _BLOCK]
        block = block[~_beaten(scores[block], scores[best])]
        best = np.append(best, block[~_beaten(scores[block], scores[block])])
    found = np.zeros(len(scores), dtype=bool)
    found[best] = True
    return found


def _beaten(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which rows of `scores` a row of `others` beats."""
    ahead = others[None] - scores[:, None]
    return np.asarray(((ahead >= 0).all(axis=2) & (ahead > 0).any(axis=2)).any(axis=1))


def _not_clearly_beaten(scores: np.ndarray, margin: np.ndarray) -> np.ndarray:
    found = np.empty(len(scores), dtype=bool)
    for begin in range(0, len(scores), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        clear = np.hypot(margin[None], margin[part, None])
        found[part] = ~(scores[None] - scores[part, None] > clear).all(axis=2).any(axis=1)
    return found


def predicted_front(
    predict: Predict,
    region: Region,
    rng: np.random.Generator,
    *,
    starts: np.ndarray | None = None,
    count: int = COUNT,
) -> tuple[list[Mixture], dict[str, np.ndarray]]:
    """(mixtures of the grid inside `region`, their scores by capability), none of which beats another.

    Sampled over the region, its edges and faces, then refined: what lies between members of the front, and between them
    and the rest, competes in ROUNDS rounds; a region is convex, so all of that is inside. Of more than `count`, those
    are kept that are the best in one capability, or stand far apart in scores. Means are compared, so
    what the surrogates are unsure of is not in it. starts: (s, K), mixtures inside that compete too.
    """
    points = np.concatenate([_everywhere(region, rng), *([] if starts is None else [starts])])
    others = points
    scores = _stacked(predict(points))
    for round_ in range(ROUNDS):
        best = np.flatnonzero(front(scores))
        best = best[_spread(scores[best], 3 * count)]
        points, scores = points[best], scores[best]
        if round_ == ROUNDS - 1:
            break
        new = _between(points, others[rng.integers(len(others), size=8 * count)], 0.5 ** (round_ + 1), rng)
        points, scores = np.concatenate([points, new]), np.concatenate([scores, _stacked(predict(new))])
    mixtures = list(dict.fromkeys(region.snap(shares) for shares in points))
    snapped = predict(np.array([mixture.weights for mixture in mixtures]))
    stacked = _stacked(snapped)
    kept = np.flatnonzero(front(stacked))
    kept = kept[_spread(stacked[kept], count)]
    kept = kept[np.argsort(-stacked[kept].mean(axis=1), kind="stable")]
    return [mixtures[index] for index in kept], {
        name: np.asarray(values)[kept] for name, values in snapped.items()
    }


def _everywhere(region: Region, rng: np.random.Generator) -> np.ndarray:
    """Points (n, K) inside, at the corners, and on edges and faces, which a sample of the inside never meets."""
    from mergemix.search.designs import vertices

    inside = region.sample(SAMPLES, rng)
    corners = np.array([mixture.weights for mixture in vertices(region, CORNERS)])
    starts = np.array([mixture.weights for mixture in region.start_points(None)])
    chosen = corners[rng.integers(len(corners), size=(SAMPLES, 3))]
    ways = rng.dirichlet(np.ones(3), size=SAMPLES)
    ways[::2, 2] = 0.0  # edges
    ways /= ways.sum(axis=1, keepdims=True)
    faces = np.einsum("nc,nck->nk", ways, chosen)
    return np.concatenate([starts, corners, faces, inside])


def _stacked(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.stack([np.asarray(values) for values in scores.values()], axis=1)


def _between(points: np.ndarray, others: np.ndarray, step: float, rng: np.random.Generator) -> np.ndarray:
    """Convex combinations: of pairs of points anywhere, and of points with a step towards others."""
    size = len(others)
    first, second = points[rng.integers(len(points), size=(2, size))]
    pairs = first + rng.random((size, 1)) * (second - first)
    own = points[rng.integers(len(points), size=size)]
    return np.concatenate([pairs, own + step * rng.random((size, 1)) * (others - own)])


def _spread(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of at most `count` rows: the best in each column, then always the one furthest from those chosen."""
    if len(scores) <= count:
        return np.arange(len(scores))
    widths = np.ptp(scores, axis=0)
    scaled = scores / np.where(widths > 0, widths, 1.0)
    chosen = list(dict.fromkeys(scores.argmax(axis=0).tolist()))[:count]
    nearest = np.min([((scaled - scaled[index]) ** 2).sum(axis=1) for index in chosen], axis=0)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((scaled - scaled[chosen[-1]]) ** 2).sum(axis=1))
    return np.array(chosen)


def observed_front(
    mixtures: Sequence[Mixture],
    scores: Mapping[str, np.ndarray],
    margin: Mapping[str, np.ndarray] | None = None,
) -> list[int]:
    """Indices of the measured mixtures that no other one beats, highest mean over capabilities first.

    scores: (n,) by capability, NaN where a mixture has none: such a mixture is left out. margin: as of `front`.
    """
    stacked = _stacked(scores)
    known = np.flatnonzero(np.isfinite(stacked).all(axis=1))
    if not len(known) or not len(mixtures):
        return []
    errors = None if margin is None else _stacked(margin)[known]
    best = known[front(stacked[known], errors)]
    return [int(index) for index in best[np.argsort(-stacked[best].mean(axis=1), kind="stable")]]
