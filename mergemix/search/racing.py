"""When to stop asking a candidate: a one-sided group-sequential test against the best candidate so far.

A candidate is asked its items in blocks (`evals.item_order`). After each block but the last, the race estimates what
its utility on all items will be, and stops it when even the upper limit is below the best incumbent's.

What is estimated. The target is the utility on all items of the suite, not on questions it could have asked.
Incumbents have answered all items, so their utilities are known exactly, and at the last item so is the candidate's:
variances carry the finite-population factor 1 - n/N (Cochran, Sampling Techniques, 1977).

How. Paired with the incumbents on the items asked so far: from each of the candidate's scores, what
incumbents' scores predict for the item is taken off, and the mean of what is left (by stratum, weighed by the strata's
known shares) is added to the prediction's mean over all items: the difference estimator of survey sampling. It is
unbiased at each look, however bad the prediction. The prediction is the incumbents' mean score times a factor < 1 by
their agreement (Spearman-Brown). With a single incumbent it is its score: the paired difference itself. Pairing with
the best incumbent alone when there are several would add that one's luck on each item to the candidate's.

Errors. `alpha` is the chance that a candidate exactly as good as the best incumbent is stopped at any of its looks;
for a better one it is smaller. It is spent in equal parts over the looks (Lan & DeMets, Biometrika 1983), with the
limits from the joint distribution of the estimates (Armitage, McPherson & Rowe, JRSS A 1969): successive estimates
have independent increments at information 1 / variance, for samples without replacement too. It holds for each
candidate and is not corrected for their number: the best one is stopped in error by its own race or
not at all. Quantiles are Student's t (Welch-Satterthwaite), and each stratum's variance includes PRIOR_ITEMS
pseudo-observations of the spread that incumbents show, so that a few equal scores are not taken for certainty.

The estimate of a stopped candidate is told as it stands. It is unbiased at any fixed look, but given that the
candidate was stopped it is low, by 0.3 standard errors on simulated searches: the unlucky are stopped first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from mergemix.evals.item_order import ItemOrder, ItemScores
from mergemix.evals.stats import t_quantile
from mergemix.evals.utility import Utility

ALPHA = 0.05
PRIOR_ITEMS = 2.0
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)
_NORMAL = NormalDist()
_FAR = 8.0  # standard deviations beyond which a normal density is nothing


class Look(NamedTuple):
    """What a race says after a block.

    stop: the candidate is clearly worse than the best incumbent. estimate: of its utility on all items, with its
    standard_error over the items not yet asked: 0 after the last block. upper: the limit that was compared with the
    best incumbent's utility, costs taken off both; the estimate itself, less its cost, after the last block.
    benchmarks: the same (estimate, standard error) of each benchmark's mean score, of those that count.
    """

    stop: bool
    estimate: float
    standard_error: float
    upper: float
    benchmarks: dict[str, tuple[float, float]]


class Race:
    """The race of one candidate against incumbents. It holds no state: a look depends on its arguments alone.

        order = order_items(utility.weights, counts, incumbents, seed=...)
        race = Race(utility, order, incumbents)
        for block in range(order.num_blocks):
            ...  # ask order.block(block)
            look = race.look(block, scores)
            if look.stop:
                break

    incumbents: item scores of candidates that have answered all items (NaN: an error), at least one. costs, cost: what
    is taken off their utilities and off the candidate's, such as for straying from a prior: the race is between what is
    left.
    Raises ValueError without incumbents or unless 0 < alpha < 0.5.
    """

    def __init__(
        self,
        utility: Utility,
        order: ItemOrder,
        incumbents: Sequence[ItemScores],
        *,
        alpha: float = ALPHA,
        costs: Sequence[float] = (),
        cost: float = 0.0,
    ) -> None:
        if not incumbents:
            raise ValueError("a race needs an incumbent that has answered all items")
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must be between 0 and 0.5, but is {alpha}")
        costs = costs or [0.0] * len(incumbents)
        self.best = max(utility(scores) - each for scores, each in zip(incumbents, costs, strict=True))
        self._cost = cost
        self._strata = [stratum for stratum in order.strata if utility.weights.get(stratum.benchmark)]
        self._last = order.num_blocks - 1
        self._predicted: dict[str, np.ndarray] = {}
        self._spread: dict[str, float] = {}
        for name in utility.weights:
            scores = np.stack([np.asarray(items[name], dtype=np.float64) for items in incumbents])
            self._predicted[name], self._spread[name] = _predict(scores)
        self._utility = utility
        self._means = {name: _mean(_known(values)) for name, values in self._predicted.items()}
        self._shares = [len(s.items) / len(self._predicted[s.benchmark]) for s in self._strata]
        self._critical = _critical_values(self._information(), alpha)

    def look(self, block: int, scores: ItemScores) -> Look:
        """After `block`, with scores float64 of shape (items,) by benchmark, NaN where there is none.

        Items that the candidate or all incumbents failed on (errors) are left out of the comparison.
        """
        means, variances = dict(self._means), dict.fromkeys(self._means, 0.0)
        squared = 0.0
        for stratum, share in zip(self._strata, self._shares, strict=True):
            name, asked = stratum.benchmark, stratum.items[: stratum.asked[block]]
            differences = _known(np.asarray(scores[name])[asked] - self._predicted[name][asked])
            means[name] += share * _mean(differences)
            term = share**2 * _variance(differences, len(stratum.items) - len(asked), self._spread[name])
            variances[name] += term
            squared += (self._utility.weights[name] ** 2 * term) ** 2 / (len(differences) - 1 + PRIOR_ITEMS)
        estimate = self._utility(means)
        variance = math.fsum(weight**2 * variances[name] for name, weight in self._utility.weights.items())
        benchmarks = {name: (means[name], math.sqrt(variances[name])) for name in means}
        if block == self._last or variance == 0:
            return Look(False, estimate, math.sqrt(variance), estimate - self._cost, benchmarks)
        quantile = t_quantile(1 - self._critical[block], variance**2 / squared)
        upper = estimate + quantile * math.sqrt(variance) - self._cost
        return Look(upper < self.best, estimate, math.sqrt(variance), upper, benchmarks)

    def _information(self) -> tuple[float, ...]:
        """1 / variance that is planned for the estimates of all looks, up to a common factor."""
        found = []
        for block in range(self._last):
            terms = [
                (self._utility.weights[stratum.benchmark] * share * stratum.deviation) ** 2
                * (1 / stratum.asked[block] - 1 / len(stratum.items))
                for stratum, share in zip(self._strata, self._shares, strict=True)
            ]
            found.append(1 / math.fsum(terms))
        return tuple(value / found[0] for value in found)


def _known(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _mean(values: np.ndarray) -> float:
    return math.fsum(values) / len(values) if len(values) else 0.0


def _variance(differences: np.ndarray, not_asked: int, spread: float) -> float:
    """Of the mean of `differences` as an estimate for them and the `not_asked` items of their stratum together."""
    num = max(len(differences), 1)
    squares = float(((differences - _mean(differences)) ** 2).sum()) + PRIOR_ITEMS * spread
    return squares / (num - 1 + PRIOR_ITEMS) * (1 / num - 1 / (num + not_asked))


def _predict(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """(what to take off a candidate's score, shape (items,); variance of what will be left) on one benchmark.

    scores: of K incumbents, shape (K, items). With v the variance of scores over items and r the mean correlation
    of two incumbents, the best multiple of their mean predicts a further candidate up to the variance v (1 - r f), with
    f = K r / (1 + (K - 1) r). Of a single incumbent r is not known; its score is taken off as it is.
    """
    seen = np.isfinite(scores).sum(axis=0)
    counted = np.where(seen, seen, np.nan)
    mean = np.nansum(scores, axis=0) / counted
    centred = scores - np.nanmean(scores, axis=1, keepdims=True)
    total = float(np.nanmean(centred**2))
    never = 1 / (scores.shape[1] + 1)  # Laplace: a spread that was not seen is not certain to be none
    num = len(scores)
    if num == 1 or total == 0:
        return mean, max(total, never)
    of_mean = float(np.nanmean((np.nansum(centred, axis=0) / counted) ** 2))
    agreement = min(max((num * of_mean / total - 1) / (num - 1), 0.0), 1.0)
    factor = num * agreement / (1 + (num - 1) * agreement)
    return factor * mean, max(total * (1 - agreement * factor), never * total)


@lru_cache(maxsize=256)
def _critical_values(information: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """Level of each look's own test, such that each look stops an equal part of alpha that no look before has.

    With B a Brownian motion at times t = information, a look stops when B(t) / sqrt(t) < -z. The density of B among
    those that go on is carried from look to look by Gauss-Legendre quadrature.
    """
    if not information:  # a single block: nothing is stopped
        return ()
    share = alpha / len(information)
    levels: list[float] = []
    points, density = np.zeros(1), np.ones(1)  # before the first look, B is 0
    past = 0.0
    for time in information:
        scale, step = math.sqrt(time), math.sqrt(time - past)
        low, high = 0.0, _FAR
        for _ in range(30):
            z = (low + high) / 2
            below = [_NORMAL.cdf(x) for x in ((-z * scale - points) / step).tolist()]
            low, high = (z, high) if float(density @ np.array(below)) > share else (low, z)
        levels.append(_NORMAL.cdf(-high))
        half = (_FAR + high) * scale / 2
        nodes = (_NODES + 1) * half - high * scale
        arrived = np.exp(-(((nodes[:, None] - points) / step) ** 2) / 2) / (math.sqrt(2 * math.pi) * step)
        density = _NODE_WEIGHTS * half * (arrived @ density)
        points, past = nodes, time
    return tuple(levels)
