"""The agreement of proxies with training, all of it in one dictionary."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from mergemix.rank_stats.bootstrap import CONFIDENCE, RESAMPLES, ROUNDING, combined, interval
from mergemix.rank_stats.correlations import kendall, kendall_rows, p_value, perfect_limits, spearman
from mergemix.rank_stats.reliability import (
    MIN_REFERENCES,
    ceiling,
    ceilings,
    effective_seeds,
    known_or_none,
    mean_over_seeds,
)

# Among normal scores the proxy's choice brings the share rho of what the best mixture gains over an average one: an
# interval wider than this does not say that to within half of all there is to gain.
MAX_WIDTH = 0.5


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
    n, mean = len(proxy), mean_over_seeds(trained)
    rng = np.random.default_rng(seed)
    rho, tau = float(spearman(proxy, mean)), kendall(proxy, mean)
    rows = rng.integers(n, size=(RESAMPLES if redraws is None else len(redraws[0]), n))
    samples = [(proxy[rows], trained[rows]), *([] if redraws is None else [redraws])]
    limits = interval(rho, combined([spearman(a, mean_over_seeds(b)) for a, b in samples]))
    tau_limits = interval(tau, combined([kendall_rows(a, mean_over_seeds(b)) for a, b in samples]))
    if limits and tau_limits and abs(rho) > 1 - ROUNDING:
        limits, tau_limits = perfect_limits(n, limits, tau_limits, rho)
    reason = shortage(n, rho, limits)
    size = top or max(1, round(n / 4))
    reliability, corrected = ceiling(trained), None
    if reliability is not None and reliability["ceiling"] is not None:
        tops = [ceilings(b, effective_seeds(trained)) for _, b in samples]
        reliability["interval"] = interval(reliability["ceiling"], combined(tops))
        drawn = [spearman(a, mean_over_seeds(b)) / each for (a, b), each in zip(samples, tops, strict=True)]
        value = rho / reliability["ceiling"]
        corrected = {
            "spearman": known_or_none(value),
            "interval": interval(value, combined(drawn, highest=math.inf)),
        }
    return {
        "references": n,
        "seeds": int(np.isfinite(trained).sum(axis=1).max()),
        "spearman": known_or_none(rho),
        "interval": limits,
        "p": p_value(proxy, mean, rho, rng),
        "kendall": known_or_none(tau),
        "kendall_interval": tau_limits,
        "conclusive": reason is None,
        "inconclusive": reason,
        **regret(proxy, mean),
        "top": {"size": size, "overlap": top_overlap(proxy, mean, size), "chance": size / n},
        "offset": {"mean": float((proxy - mean).mean()), "spread": float((proxy - mean).std(ddof=1))},
        "ceiling": reliability,
        "corrected": corrected,
    }


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


def _needed(rho: float) -> int:
    """References with which an interval about rho has MAX_WIDTH, and leaves out 0 (Bonett & Wright 2000)."""
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    deviation = math.sqrt(1 + rho * rho / 2)
    bounded = min(rho, 0.99)
    width = 2 * quantile * deviation * (1 - bounded**2) / MAX_WIDTH
    above = quantile * deviation / math.atanh(bounded)
    return max(math.ceil(max(width, above) ** 2) + 3, MIN_REFERENCES)


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
