"""How far a utility can be trusted, which candidates cannot be told apart, and what the engine's own noise is.

The items of a benchmark are a sample of the questions it could have asked. A linear utility is a weighted sum of
means over items, so its variance is the sum over benchmarks of weight^2 * variance of the scores / number of items.
Two candidates are compared on the items that both have answered, by their differences item by item, so that what
makes an item hard for both cancels.

Two intervals, of which the first is the default:

    analytic   estimate -+ Student's t * standard error, with the degrees of freedom of Welch and Satterthwaite
               (Biometrics Bulletin 1946), which allow for variances that are estimated from few items
    bootstrap  percentiles over resamples that draw, within each benchmark, as many items as it has, with
               replacement (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13); it follows
               skewed scores, and is too narrow where a benchmark has fewer than some tens of items

With 10 items in each of three benchmarks, right with probability 0.1, the first covers the truth in 96 % of simulated
cases where 95 % are due, the second in 82 %; with 50 items both in 93 %. Both rest on the items alone: on items
that all score the same they have no width. For utilities that are not linear `evals.simulated` has both.

What is corrected: nothing, unless `indistinguishable` is told to (`correct=True`: Bonferroni over the comparisons).
Uncorrected, each candidate is compared as if it were the only one; of many equals some will seem different by chance,
so the set of those that cannot be told apart is rather too small than too large. The best of many candidates is also
lucky, which no interval here shows: fresh items do. Racing corrects for its repeated looks by itself (`search.racing`).

NaN is a score that is not there: an item that failed, or was not asked. Items that were chosen because they tell
candidates apart are no random sample: for a candidate that was stopped early, take the race's estimate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np

from mergemix.evals import simulated
from mergemix.evals.simulated import Method
from mergemix.evals.utility import AnyUtility, Utility

CONFIDENCE = 0.95
RESAMPLES = 2000
METHOD: Method = "analytic"
_CHUNK_BYTES = 48 << 20  # of resampling work space; two int64/float64 arrays of (resamples, items)
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(48)

ItemScores = Mapping[str, np.ndarray]  # by benchmark: shape (items,), in suite order; NaN: no score
Key = TypeVar("Key", bound=Hashable)


class Difference(NamedTuple):
    """estimate: utility(a) - utility(b) on common items; low, high: its interval."""

    estimate: float
    low: float
    high: float


class EngineNoise(NamedTuple):
    """What two evaluations of one mixture differ by, although nothing has changed.

    standard_error: of the difference of two utilities, from what single items moved by. largest: of the observed
    differences of utilities, absolute. flipped: share of items whose score moved.
    """

    standard_error: float
    largest: float
    flipped: float

    def floor(self, confidence: float = CONFIDENCE) -> float:
        """A difference of utilities that noise alone exceeds with probability 1 - confidence at most.

        Not below `largest`: what was seen can happen.
        """
        return max(t_quantile((1 + confidence) / 2, math.inf) * self.standard_error, self.largest)


def interval(
    utility: AnyUtility,
    items: ItemScores,
    *,
    confidence: float = CONFIDENCE,
    method: Method = METHOD,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of a candidate's utility over items; the same for the same seed.

    Analytic: both infinite where a benchmark that counts has a single item, which says nothing of the spread.
    Raises ValueError when a benchmark has no scores.
    """
    values = {name: _common(name, [items[name]]) for name in utility.benchmarks}
    if not isinstance(utility, Utility):
        found = simulated.interval(
            utility, [values], confidence=confidence, method=method, resamples=resamples, seed=seed
        )
        return found.low, found.high
    _, low, high = _interval(utility, values, confidence, method, resamples, seed)
    return utility.offset + low, utility.offset + high


def paired_difference(
    utility: AnyUtility,
    a: ItemScores,
    b: ItemScores,
    *,
    confidence: float = CONFIDENCE,
    method: Method = METHOD,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """utility(a) - utility(b) and its interval over the items that both have a score for; the same order in both.

    Raises ValueError when a benchmark has not the same number of items in both, or no common item.
    """
    if not isinstance(utility, Utility):
        both = _both(utility.benchmarks, a, b)
        return Difference(
            *simulated.interval(
                utility, both, confidence=confidence, method=method, resamples=resamples, seed=seed
            )
        )
    values = {name: _differences(name, a, b) for name in utility.weights}
    return _interval(utility, values, confidence, method, resamples, seed)


def indistinguishable(
    utility: AnyUtility,
    best: ItemScores,
    others: Mapping[Key, ItemScores],
    noise_floor: float = 0.0,
    *,
    confidence: float = CONFIDENCE,
    correct: bool = False,
    method: Method = METHOD,
    resamples: int = RESAMPLES,
    seed: int = 0,
    costs: Mapping[Key, float] | None = None,
) -> list[Key]:
    """Those of `others`, in their order, that cannot be told from the best.

    That is: 0 lies in the interval of the paired difference, or the difference is within `noise_floor`,
    what utilities differ by when the same mixture is evaluated twice (EngineNoise.floor).
    correct: the confidence holds for all comparisons together (Bonferroni), which makes the set larger. costs: by how
    much more is taken off each than off the best, such as for straying from a prior.
    Raises ValueError when a benchmark has not the same number of items in all, or no common item.
    """
    if correct and others:
        confidence = 1 - (1 - confidence) / len(others)
    found = {
        key: paired_difference(
            utility, best, items, confidence=confidence, method=method, resamples=resamples, seed=seed
        )
        for key, items in others.items()
    }
    more = {key: (costs or {}).get(key, 0.0) for key in found}
    return [
        key
        for key, difference in found.items()
        if difference.low + more[key] <= 0 <= difference.high + more[key]
        or abs(difference.estimate + more[key]) <= noise_floor
    ]


def engine_noise(utility: AnyUtility, repeats: Sequence[tuple[ItemScores, ItemScores]]) -> EngineNoise | None:
    """The A/A noise from pairs of evaluations of one mixture each; None without any.

    Two evaluations differ on an item by chance alone, with mean 0 and independently between items, so the mean
    square of their differences is the variance of one. An engine that answers the same twice has no noise.
    """
    if not repeats:
        return None
    variances, moved, changed = [], [], []
    for once, again in repeats:
        differences = {name: _differences(name, once, again) for name in utility.benchmarks}
        if isinstance(utility, Utility):
            terms = [(w / len(d)) ** 2 * float(d @ d) for w, d in _weighted(utility, differences)]
            variances.append(math.fsum(terms))
            moved.append(abs(Utility(utility.weights, 0.0)(differences)))
        else:
            pair = _both(utility.benchmarks, once, again)
            middle = {
                name: (float(np.mean([own[name] for own in pair])), math.sqrt(float(d @ d) / 2) / len(d))
                for name, d in differences.items()
            }
            variances.append(2 * simulated.standard_error(utility, middle) ** 2)
            moved.append(abs(utility(pair[0]) - utility(pair[1])))
        changed.append(np.concatenate(list(differences.values())) != 0)
    standard_error = math.sqrt(math.fsum(variances) / len(variances))
    return EngineNoise(standard_error, max(moved), float(np.concatenate(changed).mean()))


def uninformative(candidates: Sequence[ItemScores]) -> dict[str, str]:
    """Benchmarks that cannot tell these candidates apart, and why; none for fewer than two candidates.

    Compared are the items that all have a score for; a benchmark without such items is not judged.
    """
    found: dict[str, str] = {}
    for name in candidates[0] if len(candidates) > 1 else ():
        scores = np.stack([np.asarray(items[name], dtype=np.float64) for items in candidates])
        scores = scores[:, np.isfinite(scores).all(axis=0)]
        if not scores.shape[1]:
            continue
        if (scores == scores[0]).all():
            found[name] = "all candidates score the same on every item"
        elif len({math.fsum(row) for row in scores.tolist()}) == 1:
            found[name] = "all candidates have the same mean score"
    return found


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t: what a variable of `freedom` >= 1 degrees (inf: normal) is below with this probability.

    By bisection on t = sqrt(freedom) tan(x), where the density is proportional to cos(x) ** (freedom - 1).
    """
    if probability < 0.5:
        return -_upper_t(1 - probability, float(freedom))
    return _upper_t(probability, float(freedom))


@lru_cache(maxsize=4096)
def _upper_t(probability: float, freedom: float) -> float:
    if freedom > 1e6:  # there is no difference to six digits
        return NormalDist().inv_cdf(probability)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        x = (low + high) / 2
        # Beyond some 9 standard deviations there is nothing left to integrate.
        end = min(x, 9 / math.sqrt(freedom)) if freedom > 50 else x
        cosines = np.log(np.cos(end * (_NODES + 1) / 2)) * (freedom - 1) + log_scale
        mass = 0.5 + end / 2 * float(_NODE_WEIGHTS @ np.exp(cosines))
        low, high = (x, high) if mass < probability else (low, x)
    return math.sqrt(freedom) * math.tan(low)


def _common(name: str, scores: Sequence[np.ndarray]) -> np.ndarray:
    """scores[0] (- scores[1]), shape (common items,)."""
    shapes = {np.shape(values) for values in scores}
    if len(shapes) > 1:
        raise ValueError(f"candidates must have answered the same items of {name!r}, but have {shapes}")
    values = np.asarray(scores[0], dtype=np.float64)
    if len(scores) > 1:
        values = values - scores[1]
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError(f"candidates must have a score for an item of {name!r} in common, but have none")
    return values


def _differences(name: str, a: ItemScores, b: ItemScores) -> np.ndarray:
    return _common(name, [a[name], b[name]])


def _both(benchmarks: Sequence[str], a: ItemScores, b: ItemScores) -> list[dict[str, np.ndarray]]:
    """The scores of each on the items that both have one for."""
    known = {
        name: np.isfinite(a[name]) & np.isfinite(b[name])
        for name in benchmarks
        if len(_differences(name, a, b))
    }
    return [
        {name: np.asarray(own[name], dtype=np.float64)[known[name]] for name in benchmarks} for own in (a, b)
    ]


def _weighted(utility: Utility, values: Mapping[str, np.ndarray]) -> list[tuple[float, np.ndarray]]:
    return [(weight, values[name]) for name, weight in utility.weights.items()]


def _interval(
    utility: Utility,
    values: Mapping[str, np.ndarray],
    confidence: float,
    method: Method,
    resamples: int,
    seed: int,
) -> Difference:
    """sum_b weight_b * mean of values[b], shape (items,), and its interval; the utility's offset is left out."""
    estimate = Utility(utility.weights, 0.0)(values)
    if method == "bootstrap":
        return Difference(estimate, *_percentiles(utility, values, confidence, resamples, seed))
    if min(len(scores) for scores in values.values()) < 2:
        return Difference(estimate, -math.inf, math.inf)
    terms = [
        (w**2 * float(scores.var(ddof=1)) / len(scores), len(scores))
        for w, scores in _weighted(utility, values)
    ]
    variance = math.fsum(term for term, _ in terms)
    if variance == 0:
        return Difference(estimate, estimate, estimate)
    freedom = variance**2 / math.fsum(term**2 / (num - 1) for term, num in terms)
    reach = t_quantile((1 + confidence) / 2, freedom) * math.sqrt(variance)
    return Difference(estimate, estimate - reach, estimate + reach)


def _percentiles(
    utility: Utility, values: Mapping[str, np.ndarray], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Low and high quantiles over resamples of sum_b weight_b * mean of benchmark b."""
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for weight, scores in _weighted(utility, values):
        num = len(scores)
        rows_per_chunk = max(1, _CHUNK_BYTES // (2 * 8 * num))
        for begin in range(0, resamples, rows_per_chunk):
            rows = min(rows_per_chunk, resamples - begin)
            drawn = rng.integers(num, size=(rows, num))
            sums[begin : begin + rows] += weight * scores[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(sums, [tail, 1 - tail]).tolist()
    return low, high
