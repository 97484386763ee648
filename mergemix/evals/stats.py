"""How far a utility can be trusted: the percentile bootstrap over items.

The items of a benchmark are a sample of the questions it could have asked. A resample draws, within
each benchmark, as many items as it has, with replacement; the utility of the resample is
offset + sum over benchmarks of weight * mean of the drawn scores. The interval is between the
(1 - confidence) / 2 and (1 + confidence) / 2 quantiles over resamples (Efron & Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13). Two candidates that answered the same items are
compared by resampling their per-item differences, so what makes an item hard for both cancels.

It rests on the items alone: a benchmark with fewer than some tens of items, or one on which all items
score the same, gives intervals that are too narrow. Comparisons with many candidates are not corrected
for their number.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from mergemix.evals.utility import Utility

CONFIDENCE = 0.95
RESAMPLES = 2000
_CHUNK_BYTES = 48 << 20  # of resampling work space; three int64/float64 arrays of (resamples, items)

ItemScores = Mapping[str, np.ndarray]  # by benchmark: shape (items,), in suite order
Key = TypeVar("Key", bound=Hashable)


class Difference(NamedTuple):
    """estimate: utility(a) - utility(b); low, high: its interval."""

    estimate: float
    low: float
    high: float


def interval(
    utility: Utility,
    items: ItemScores,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """(low, high) of a candidate's utility over items; the same for the same seed."""
    columns = {name: np.asarray(items[name], dtype=np.float64)[:, None] for name in utility.weights}
    low, high = _quantiles(utility, columns, confidence, resamples, seed)
    return utility.offset + float(low[0]), utility.offset + float(high[0])


def paired_difference(
    utility: Utility,
    a: ItemScores,
    b: ItemScores,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """utility(a) - utility(b) and its interval over the items, which both have answered in the same order.

    Raises ValueError when a benchmark has not the same number of items in both.
    """
    return _differences(utility, a, [b], confidence, resamples, seed)[0]


def indistinguishable(
    utility: Utility,
    best: ItemScores,
    others: Mapping[Key, ItemScores],
    noise_floor: float = 0.0,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Key]:
    """Those of `others`, in their order, that cannot be told from the best.

    That is: 0 lies in the interval of the paired difference, or the difference is within `noise_floor`,
    what the engine's utility varies by when the same mixture is evaluated twice.
    Raises ValueError when a benchmark has not the same number of items in all.
    """
    found = _differences(utility, best, list(others.values()), confidence, resamples, seed)
    return [
        key
        for key, difference in zip(others, found, strict=True)
        if difference.low <= 0 <= difference.high or abs(difference.estimate) <= noise_floor
    ]


def _differences(
    utility: Utility,
    a: ItemScores,
    others: Sequence[ItemScores],
    confidence: float,
    resamples: int,
    seed: int,
) -> list[Difference]:
    """a against each of the others, all on the same resamples."""
    if not others:
        return []
    columns = {}
    for name in utility.weights:
        shapes = {np.shape(scores[name]) for scores in (a, *others)}
        if len(shapes) > 1:
            raise ValueError(f"candidates must have answered the same items of {name!r}, but have {shapes}")
        columns[name] = np.stack([np.subtract(a[name], other[name]) for other in others], axis=1)
    estimates = [
        Utility(utility.weights, 0.0)({name: values[:, k] for name, values in columns.items()})
        for k in range(len(others))
    ]
    low, high = _quantiles(utility, columns, confidence, resamples, seed)
    return [Difference(*map(float, triple)) for triple in zip(estimates, low, high, strict=True)]


def _quantiles(
    utility: Utility, columns: Mapping[str, np.ndarray], confidence: float, resamples: int, seed: int
) -> np.ndarray:
    """Low and high quantiles over resamples of sum_b weight_b * mean of benchmark b; the offset is left out.

    columns: by benchmark, shape (items, columns), all with the same number of columns.
    Returns shape (2, columns).
    """
    rng = np.random.default_rng(seed)
    num_columns = next(iter(columns.values())).shape[1]
    sums = np.zeros((resamples, num_columns))
    for name, weight in utility.weights.items():
        values = columns[name]
        num_items = len(values)
        rows_per_chunk = max(1, _CHUNK_BYTES // (3 * 8 * num_items))
        for begin in range(0, resamples, rows_per_chunk):
            rows = min(rows_per_chunk, resamples - begin)
            drawn = rng.integers(num_items, size=(rows, num_items))
            # How often each item was drawn: means then are one matrix product for all columns.
            drawn += num_items * np.arange(rows)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=rows * num_items).reshape(rows, num_items)
            sums[begin : begin + rows] += weight / num_items * (counts.astype(np.float64) @ values)
    tail = (1 - confidence) / 2
    return np.quantile(sums, [tail, 1 - tail], axis=0)
