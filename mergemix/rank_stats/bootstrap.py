"""Intervals by resampling."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
ROUNDING = 1e-12  # of a correlation
_LARGEST_SHIFT = 1.0  # of the median, in standard deviations: beyond it the correction eats the interval
_CHUNK = 1 << 22  # numbers drawn at once


def interval(estimate: float, drawn: np.ndarray) -> list[float] | None:
    """Bias-corrected percentiles; None where more than one in twenty draws has no value."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < 0.95 * len(drawn) or not math.isfinite(estimate):
        return None
    normal = NormalDist()
    below = np.mean(known < estimate - ROUNDING) + np.mean(np.abs(known - estimate) <= ROUNDING) / 2
    shift = normal.inv_cdf(min(max(float(below), 1e-6), 1 - 1e-6))
    shift = min(max(shift, -_LARGEST_SHIFT), _LARGEST_SHIFT)
    reach = normal.inv_cdf((1 + CONFIDENCE) / 2)
    limits = np.quantile(known, [normal.cdf(2 * shift - reach), normal.cdf(2 * shift + reach)])
    # An interval that leaves out what was seen would puzzle more than it tells.
    return [min(float(limits[0]), estimate), max(float(limits[1]), estimate)]


def combined(samples: list[np.ndarray], highest: float = 1.0) -> np.ndarray:
    """A statistic under other references, (R,); and moved by what other items do to it where they are given too."""
    if len(samples) == 1:
        return samples[0]
    over_references, over_items = samples
    return np.clip(over_references + over_items - np.nanmedian(over_items), -highest, highest)


def drawn_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of (models, items) scores over RESAMPLES draws of items with replacement, the same for all models.

    Returns (RESAMPLES, models). NaN: an item without a score; a draw of such items alone has no mean either.
    """
    items = scores.shape[1]
    known = np.isfinite(scores)
    filled, drawn = np.where(known, scores, 0.0), []
    step = max(1, _CHUNK // items)
    for begin in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - begin)
        counts = rng.multinomial(items, np.full(items, 1 / items), size=rows).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn.append((counts @ filled.T) / (counts @ known.T))
    return np.concatenate(drawn)
