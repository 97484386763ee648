"""Rank correlations, how likely they are by chance, and what complete agreement still allows."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
from scipy.stats import kendalltau, rankdata

from mergemix.rank_stats.bootstrap import CONFIDENCE, ROUNDING

PERMUTATIONS = 10_000
EXACT_REFERENCES = 7  # 7! = 5,040 orders can all be looked at
_CHUNK = 1 << 22  # pairs compared at once


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho along the last axis, ties sharing ranks, pairs with NaN left out; NaN where a side is constant."""
    known = np.isfinite(a) & np.isfinite(b)
    # What is left out ranks last on both sides, and so changes no other rank.
    ranks = [np.where(known, rankdata(np.where(known, x, np.inf), axis=-1), 0.0) for x in (a, b)]
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    u, v = (np.where(known, r - r.sum(axis=-1, keepdims=True) / count, 0.0) for r in ranks)
    norm = np.sqrt((u * u).sum(axis=-1) * (v * v).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, (u * v).sum(axis=-1) / norm, np.nan)


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of (n,) and (n,); NaN where one side does not vary."""
    return float(kendalltau(a, b).statistic)


def kendall_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row of (R, n) and (R, n): concordance over the pairs that are no ties."""
    step = max(1, _CHUNK // a.shape[1] ** 2)
    found = []
    for begin in range(0, len(a), step):
        u, v = (
            np.sign(x[:, :, None] - x[:, None, :]) for x in (a[begin : begin + step], b[begin : begin + step])
        )
        norm = np.sqrt((u * u).sum(axis=(1, 2)) * (v * v).sum(axis=(1, 2)))
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(norm > 0, (u * v).sum(axis=(1, 2)) / norm, np.nan))
    return np.concatenate(found)


def p_value(a: np.ndarray, b: np.ndarray, rho: float, rng: np.random.Generator) -> float | None:
    """Probability that references in random order correlate as much or more: exact for few, else by simulation."""
    if math.isnan(rho):
        return None
    n = len(a)
    if n <= EXACT_REFERENCES:
        orders = np.array(list(itertools.permutations(range(n))))
        return float(np.mean(spearman(a, b[orders]) >= rho - ROUNDING))
    orders = rng.permuted(np.tile(np.arange(n), (PERMUTATIONS - 1, 1)), axis=1)
    return float((1 + np.sum(spearman(a, b[orders]) >= rho - ROUNDING)) / PERMUTATIONS)


@lru_cache(maxsize=64)
def perfect_order_limit(n: int, confidence: float = CONFIDENCE) -> float:
    """The smallest Spearman correlation, of normal scores, with which n references agree completely often enough.

    That is: with a probability of (1 - confidence) / 2, by simulation; the one-sided limit that resampling cannot give.
    """
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 4000, n))
    x_order = np.argsort(x, axis=-1)

    def agrees(rho: float) -> float:
        y = np.take_along_axis(rho * x + math.sqrt(1 - rho * rho) * noise, x_order, axis=-1)
        return float((np.diff(y, axis=-1) > 0).all(axis=-1).mean())

    low, high = -1.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if agrees(middle) < (1 - confidence) / 2 else (low, middle)
    return 6 / math.pi * math.asin(low / 2)  # Pearson's to Spearman's (Kruskal 1958)


def perfect_limits(
    n: int, limits: list[float], tau_limits: list[float], rho: float
) -> tuple[list[float], list[float]]:
    """Intervals of rho and of tau where the orders agree completely, or are opposite."""
    reach = perfect_order_limit(n)
    tau_reach = 2 / math.pi * math.asin(2 * math.sin(math.pi / 6 * reach))  # of normal scores with that rho
    if rho > 0:
        return [min(limits[0], reach), limits[1]], [min(tau_limits[0], tau_reach), tau_limits[1]]
    return [limits[0], max(limits[1], -reach)], [tau_limits[0], max(tau_limits[1], -tau_reach)]
