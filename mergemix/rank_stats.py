"""Do proxies rank mixtures as training does: rank correlations, their intervals and ceilings, what a choice costs.

Higher is better in all scores. n references (mixtures) were trained, each with up to s seeds; NaN: that seed was not.

Intervals are bootstrapped over the references: percentiles, corrected for the bias of the median (Efron & Tibshirani,
An Introduction to the Bootstrap, 1993, section 14.3), because a reference that is drawn twice is a tie. Where the
caller gives the scores under other draws of items, what those move a correlation by is added to each draw, without
their median effect: items drawn again are noisier than the items, and would make every correlation look lower.
An interval is about the correlation that other references of this kind, and as many other items, would show. For
bivariate normal scores 95% intervals of Spearman's rho cover it in 94 to 99% of cases from 9 references on; of
simulated answers in 98 to 99%, and in 91 to 97% without the items. Complete agreement has no spread to resample: its
lower limit is `perfect_order_limit`; without it intervals of 6 references miss in 11% (rho 0.9) to 41% (0.98) of cases.

The ceiling says what of a missing correlation is the training's own: runs of the same mixture with other seeds do not
rank the same either. It knows nothing of what all seeds share, such as the items that were asked.
"""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.stats import kendalltau, rankdata

CONFIDENCE = 0.95
RESAMPLES = 2000
PERMUTATIONS = 10_000
EXACT_REFERENCES = 7  # 7! = 5,040 orders can all be looked at
SPLITS = 30  # of seeds into halves
# Of four references all 24 orders are possible by chance, so even complete agreement has p = 0.08 on two sides.
MIN_REFERENCES = 5
# Among normal scores the proxy's choice brings the share rho of what the best mixture gains over an average one: an
# interval wider than this does not say that to within half of all there is to gain.
MAX_WIDTH = 0.5
_LARGEST_SHIFT = 1.0  # of the median, in standard deviations: beyond it the correction eats the interval
_CHUNK = 1 << 22  # pairs compared at once
_ROUNDING = 1e-12


def rank_agreement(
    proxy: np.ndarray,
    trained: np.ndarray,
    *,
    top: int | None = None,
    redraws: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How far proxies rank n references as training does, as JSON values; what is not known is None.

    proxy: (n,). trained: (n,) or (n, s); its mean over seeds is what is compared. top: size of the top sets, by default
    a quarter of the references. redraws: (R, n) and (R, n, s), both under the same R draws of items.

    Keys: references seeds; spearman interval p; kendall kendall_interval; conclusive, inconclusive: why not; regret and
    relative_regret as `regret`; top{size overlap chance}; offset{mean spread} of proxy - trained; ceiling as `ceiling`
    with its interval; corrected{spearman interval}: what a proxy would have if training had no noise, above 1 by
    chance only.
    Raises ValueError for fewer than two references, other shapes, or a reference without a finite score.
    """
    proxy, trained = _checked(proxy, trained, redraws)
    n, mean = len(proxy), _mean(trained)
    rng = np.random.default_rng(seed)
    rho, tau = float(spearman(proxy, mean)), kendall(proxy, mean)
    rows = rng.integers(n, size=(RESAMPLES if redraws is None else len(redraws[0]), n))
    samples = [(proxy[rows], trained[rows]), *([] if redraws is None else [redraws])]
    limits = _interval(rho, _draws([spearman(a, _mean(b)) for a, b in samples]))
    tau_limits = _interval(tau, _draws([_kendall_rows(a, _mean(b)) for a, b in samples]))
    if limits and tau_limits and abs(rho) > 1 - _ROUNDING:
        limits, tau_limits = _perfect_limits(n, limits, tau_limits, rho)
    reason = shortage(n, rho, limits)
    size = top or max(1, round(n / 4))
    reliability, corrected = ceiling(trained), None
    if reliability is not None and reliability["ceiling"] is not None:
        tops = [_ceilings(b, effective_seeds(trained)) for _, b in samples]
        reliability["interval"] = _interval(reliability["ceiling"], _draws(tops))
        drawn = [spearman(a, _mean(b)) / each for (a, b), each in zip(samples, tops, strict=True)]
        value = rho / reliability["ceiling"]
        corrected = {"spearman": _known(value), "interval": _interval(value, _draws(drawn, highest=math.inf))}
    return {
        "references": n,
        "seeds": int(np.isfinite(trained).sum(axis=1).max()),
        "spearman": _known(rho),
        "interval": limits,
        "p": _p_value(proxy, mean, rho, rng),
        "kendall": _known(tau),
        "kendall_interval": tau_limits,
        "conclusive": reason is None,
        "inconclusive": reason,
        **regret(proxy, mean),
        "top": {"size": size, "overlap": top_overlap(proxy, mean, size), "chance": size / n},
        "offset": {"mean": float((proxy - mean).mean()), "spread": float((proxy - mean).std(ddof=1))},
        "ceiling": reliability,
        "corrected": corrected,
    }


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


def regret(proxy: np.ndarray, trained: np.ndarray) -> dict[str, Any]:
    """What choosing by the proxy costs in trained score, (n,) each. Ties of the proxy count with their mean.

    regret: best trained score - that of the choice. relative_regret: of what the best is ahead of the mean reference:
    0 the best, 1 as good as drawing a reference. choice, best: their numbers.
    """
    chosen = proxy == proxy.max()
    cost = float(trained.max() - trained[chosen].mean())
    at_stake = float(trained.max() - trained.mean())
    return {
        "regret": cost,
        "relative_regret": cost / at_stake if at_stake > 0 else None,
        "choice": int(proxy.argmax()),
        "best": int(trained.argmax()),
    }


def top_overlap(a: np.ndarray, b: np.ndarray, size: int) -> float:
    """Share that the `size` highest of a and of b have in common; where ties decide who belongs, on average."""

    def membership(values: np.ndarray) -> np.ndarray:
        limit = np.sort(values)[-size]
        above, at = values > limit, values == limit
        return above + at * ((size - above.sum()) / at.sum())

    if not 1 <= size <= len(a):
        raise ValueError(f"a top set must have 1 to {len(a)} members, but has {size}")
    return float((membership(a) * membership(b)).sum() / size)


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
        "seed_to_seed": _known(float(_between_seeds(trained))),
        "halves": _known(float(halves)),
        "reliability": _known(float(reliability)),
        "ceiling": _known(float(top)),
        "interval": None,
        "seed_deviation": float(np.sqrt(np.average(within, weights=weights))),
    }


def spearman_brown(correlation: np.ndarray, factor: float) -> np.ndarray:
    """Reliability of a mean of `factor` times as many runs as those that correlate so (Spearman 1910, Brown 1910)."""
    with np.errstate(divide="ignore"):  # of two runs that are opposite: no reliability at all
        return np.asarray(factor * correlation / (1 + (factor - 1) * correlation))


def effective_seeds(trained: np.ndarray) -> float:
    """Harmonic mean of the numbers of seeds: the variance of a mean is that of a run over their number."""
    return float(1 / np.mean(1 / np.isfinite(trained).sum(axis=1)))


def shortage(n: int, rho: float, limits: list[float] | None) -> str | None:
    """Why n references do not suffice to conclude anything from rho and its interval; None where they do."""
    if math.isnan(rho):
        return "all references score the same, by the proxy or by training: there is nothing to rank"
    if n < MIN_REFERENCES:
        return f"{n} references are too few: fewer than {MIN_REFERENCES} can agree completely by chance"
    if limits is None:
        return f"{n} references score the same too often for an interval"
    low, high = limits
    more = (
        f"train more references; about {max(_needed(rho), n + 1)} would do if the correlation stays"
        if rho > 0
        else ""
    )
    if low <= 0 <= high:
        wanted = f": {more}" if more else ": the proxy may say nothing about training"
        return f"{n} references cannot tell the correlation from chance ({low:.2f} to {high:.2f}){wanted}"
    if high - low > MAX_WIDTH:
        return (
            f"{n} references leave the correlation too uncertain ({low:.2f} to {high:.2f}, wider than {MAX_WIDTH:g})"
            + (f": {more}" if more else "")
        )
    return None


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


def _checked(
    proxy: np.ndarray, trained: np.ndarray, redraws: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    proxy, trained = np.asarray(proxy, np.float64), np.asarray(trained, np.float64)
    if trained.ndim == 1:
        trained = trained[:, None]
    if proxy.ndim != 1 or trained.ndim != 2 or len(proxy) != len(trained) or len(proxy) < 2:
        raise ValueError(
            f"proxies must be (n,) and trained scores (n, s) with n >= 2, but are {proxy.shape}, {trained.shape}"
        )
    if not (np.isfinite(proxy).all() and np.isfinite(trained).any(axis=1).all()):
        raise ValueError("each reference must have a finite proxy score and one of training, but one has not")
    if redraws is not None:
        shapes = [each.shape for each in redraws]
        if shapes[0][1:] != proxy.shape or shapes[1] != (shapes[0][0], *trained.shape):
            raise ValueError(f"redraws must be (R, n) and (R, n, s) of the same n and s, but are {shapes}")
    return proxy, trained


def _mean(trained: np.ndarray) -> np.ndarray:
    """Over the seeds that there are, the last axis."""
    return np.asarray(np.nanmean(trained, axis=-1))


def _draws(samples: list[np.ndarray], highest: float = 1.0) -> np.ndarray:
    """A statistic under other references, (R,); and moved by what other items do to it where they are given too."""
    if len(samples) == 1:
        return samples[0]
    over_references, over_items = samples
    return np.clip(over_references + over_items - np.nanmedian(over_items), -highest, highest)


def _kendall_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
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


def _interval(estimate: float, drawn: np.ndarray) -> list[float] | None:
    """Bias-corrected percentiles; None where more than one in twenty draws has no value."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < 0.95 * len(drawn) or not math.isfinite(estimate):
        return None
    normal = NormalDist()
    below = np.mean(known < estimate - _ROUNDING) + np.mean(np.abs(known - estimate) <= _ROUNDING) / 2
    shift = normal.inv_cdf(min(max(float(below), 1e-6), 1 - 1e-6))
    shift = min(max(shift, -_LARGEST_SHIFT), _LARGEST_SHIFT)
    reach = normal.inv_cdf((1 + CONFIDENCE) / 2)
    limits = np.quantile(known, [normal.cdf(2 * shift - reach), normal.cdf(2 * shift + reach)])
    # An interval that leaves out what was seen would puzzle more than it tells.
    return [min(float(limits[0]), estimate), max(float(limits[1]), estimate)]


def _perfect_limits(
    n: int, limits: list[float], tau_limits: list[float], rho: float
) -> tuple[list[float], list[float]]:
    """Intervals of rho and of tau where the orders agree completely, or are opposite."""
    reach = perfect_order_limit(n)
    tau_reach = 2 / math.pi * math.asin(2 * math.sin(math.pi / 6 * reach))  # of normal scores with that rho
    if rho > 0:
        return [min(limits[0], reach), limits[1]], [min(tau_limits[0], tau_reach), tau_limits[1]]
    return [limits[0], max(limits[1], -reach)], [tau_limits[0], max(tau_limits[1], -tau_reach)]


def _p_value(a: np.ndarray, b: np.ndarray, rho: float, rng: np.random.Generator) -> float | None:
    """Probability that references in random order correlate as much or more: exact for few, else by simulation."""
    if math.isnan(rho):
        return None
    n = len(a)
    if n <= EXACT_REFERENCES:
        orders = np.array(list(itertools.permutations(range(n))))
        return float(np.mean(spearman(a, b[orders]) >= rho - _ROUNDING))
    orders = rng.permuted(np.tile(np.arange(n), (PERMUTATIONS - 1, 1)), axis=1)
    return float((1 + np.sum(spearman(a, b[orders]) >= rho - _ROUNDING)) / PERMUTATIONS)


def _between_seeds(trained: np.ndarray) -> np.ndarray:
    """Mean Spearman of each two seeds of (..., n, s), over the references that have both."""
    pairs = itertools.combinations(range(trained.shape[-1]), 2)
    return _mean_known([spearman(trained[..., i], trained[..., j]) for i, j in pairs])


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
    return _mean_known(found), size


def _mean_known(found: list[np.ndarray]) -> np.ndarray:
    stacked = np.array(found)
    known = np.isfinite(stacked)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, stacked, 0.0).sum(axis=0) / known.sum(axis=0))


def _ceilings(runs: np.ndarray, seeds: float) -> np.ndarray:
    """The ceiling of each of (R, n, s) draws; NaN where seeds do not agree."""
    halves, size = _between_halves(runs)
    reliability = spearman_brown(halves, seeds / size)
    return np.sqrt(np.where(reliability > 0, reliability, np.nan))


def _needed(rho: float) -> int:
    """References with which an interval about rho has MAX_WIDTH, and leaves out 0 (Bonett & Wright 2000)."""
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    deviation = math.sqrt(1 + rho * rho / 2)
    bounded = min(rho, 0.99)
    width = 2 * quantile * deviation * (1 - bounded**2) / MAX_WIDTH
    above = quantile * deviation / math.atanh(bounded)
    return max(math.ceil(max(width, above) ** 2) + 3, MIN_REFERENCES)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
