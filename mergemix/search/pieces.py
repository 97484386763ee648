"""Utilities that are the least of a few linear functions of the scores: a minimum, floors, or simply a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Combine = Callable[[np.ndarray], np.ndarray]  # scores (n, C) -> utility (n,)

SAMPLES = 256  # scores at which slopes are taken
NEAR = 1e-4  # of the range of a score: distance for slopes, small beside that between two kinks
DIGITS = 6  # of the largest slope: equal slopes, but for rounding
MOST = 40  # pieces: floors on five capabilities have 32


@dataclass(frozen=True)
class Pieces:
    """Linear functions of C scores, whose least is the utility. slopes: (P, C). offsets: (P,)."""

    slopes: np.ndarray
    offsets: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """(n, P) of scores (n, C)."""
        return scores @ self.slopes.T + self.offsets


def pieces_of(combine: Combine, scores: np.ndarray) -> Pieces | None:
    """What `combine` is the least of, between the lowest and highest of `scores` (n, C) and somewhat beyond.

    Found by its slopes at random places; None where it is no such function, as a product or a maximum, or of more than
    MOST pieces. Deterministic.
    """
    low, reach = scores.min(axis=0), np.maximum(np.ptp(scores, axis=0), 1e-9)
    count = scores.shape[1]
    places = low + reach * (2 * np.random.default_rng(0).random((SAMPLES, count)) - 0.5)
    nudges = NEAR * np.diag(reach)
    up, down = (combine((places[:, None] + sign * nudges).reshape(-1, count)) for sign in (1, -1))
    values = combine(places)
    if not (np.isfinite(up).all() and np.isfinite(down).all() and np.isfinite(values).all()):
        return None
    slopes = (up - down).reshape(SAMPLES, count) / (2 * NEAR * reach)
    unit = float(np.abs(slopes).max()) or 1.0
    _, first = np.unique(np.round(slopes / unit, DIGITS), axis=0, return_index=True)
    found = Pieces(slopes[first], values[first] - (slopes[first] * places[first]).sum(axis=1))
    rounding = 10.0**-DIGITS * max(float(np.ptp(values)), 1e-300)
    # A slope that was taken across a kink belongs to no piece: it leads below the utility somewhere.
    above = (found(places) >= values[:, None] - rounding).all(axis=0)
    found = Pieces(found.slopes[above], found.offsets[above])
    if not 0 < above.sum() <= MOST or (found(places).min(axis=1) > values + rounding).any():
        return None
    return found
