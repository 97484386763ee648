"""Training against itself: how far runs of the same mixtures with other seeds rank them alike."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from mergemix.rank_stats.correlations import spearman

# Of four references all 24 orders are possible by chance, so even complete agreement has p = 0.08 on two sides.
MIN_REFERENCES = 5
SPLITS = 30  # of seeds into halves


def ceiling(trained: np.ndarray) -> dict[str, Any] | None:
    """Test-retest ceiling of (n, s) trained scores; None unless MIN_REFERENCES have two seeds or more.

    seed_to_seed: mean Spearman of one seed against another. halves: of the means of half of the seeds against those of
    the other half; with two or three seeds, or where some references have fewer, the same. reliability: of the mean
    over all seeds, by Spearman-Brown. ceiling: its square root, what a proxy without any error would reach; None
    where seeds do not agree at all. seed_deviation: standard deviation of the score between seeds of one reference.
    """
    counts = np.isfinite(trained).sum(axis=1)
    if (counts >= 2).sum() < MIN_REFERENCES:
        return None
    repeated = trained[counts >= 2]
    within = np.nanvar(repeated, axis=1, ddof=1)
    weights = counts[counts >= 2] - 1
    halves, size = _between_halves(trained)
    reliability = spearman_brown(halves, effective_seeds(trained) / size)
    top = np.sqrt(reliability) if reliability > 0 else math.nan
    return {
        "seed_to_seed": known_or_none(float(_between_seeds(trained))),
        "halves": known_or_none(float(halves)),
        "reliability": known_or_none(float(reliability)),
        "ceiling": known_or_none(float(top)),
        "interval": None,
        "seed_deviation": float(np.sqrt(np.average(within, weights=weights))),
    }


def ceilings(runs: np.ndarray, seeds: float) -> np.ndarray:
    """The ceiling of each of (R, n, s) draws; NaN where seeds do not agree."""
    halves, size = _between_halves(runs)
    reliability = spearman_brown(halves, seeds / size)
    return np.sqrt(np.where(reliability > 0, reliability, np.nan))


def spearman_brown(correlation: np.ndarray, factor: float) -> np.ndarray:
    """Reliability of a mean of `factor` times as many runs as those that correlate so (Spearman 1910, Brown 1910)."""
    with np.errstate(divide="ignore"):  # of two runs that are opposite: no reliability at all
        return np.asarray(factor * correlation / (1 + (factor - 1) * correlation))


def effective_seeds(trained: np.ndarray) -> float:
    """Harmonic mean of the numbers of seeds: the variance of a mean is that of a run over their number."""
    return float(1 / np.mean(1 / np.isfinite(trained).sum(axis=1)))


def mean_over_seeds(trained: np.ndarray) -> np.ndarray:
    """Over the seeds that there are, the last axis; NaN where there is none."""
    known = np.isfinite(trained)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, trained, 0.0).sum(axis=-1) / known.sum(axis=-1))


def known_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _between_seeds(trained: np.ndarray) -> np.ndarray:
    """Mean Spearman of each two seeds of (..., n, s), over the references that have both."""
    pairs = itertools.combinations(range(trained.shape[-1]), 2)
    return mean_over_seeds(np.stack([spearman(trained[..., i], trained[..., j]) for i, j in pairs], axis=-1))


def _between_halves(trained: np.ndarray) -> tuple[np.ndarray, int]:
    """Mean Spearman of the means of two halves of the seeds of (..., n, s), and how many seeds a half has."""
    seeds = trained.shape[-1]
    size = seeds // 2
    if size < 2 or np.isnan(trained).any():
        return _between_seeds(trained), 1
    splits = (
        (first, second)
        for first in itertools.combinations(range(seeds), size)
        for second in itertools.combinations(sorted(set(range(seeds)) - set(first)), size)
        if first < second
    )
    found = [
        spearman(trained[..., list(first)].mean(axis=-1), trained[..., list(second)].mean(axis=-1))
        for first, second in itertools.islice(splits, SPLITS)
    ]
    return mean_over_seeds(np.stack(found, axis=-1)), size
