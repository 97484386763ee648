"""In which order a candidate is asked the items of a suite, when it may be stopped before all are asked.

Items are asked in blocks. Within a benchmark they are drawn at random, without replacement, so that the items asked so
far speak for all. Once a few candidates have answered everything, the items on which those disagree are asked
first: the items of a benchmark are divided into strata by how much the candidates' scores vary on them, and the blocks
draw more from the strata that vary more (Neyman allocation: Cochran, Sampling Techniques, 1977, section 5.5).
The share of a stratum in its benchmark is known, and an estimate that weighs the strata by their shares
is as unbiased as one from a plain random sample: `search.racing` does. A plain mean over the items asked is not.

Every candidate should have an order of its own (a seed of its own). With one order for all, those who survive the
first blocks are those whom the first items flatter, and all later candidates would be compared with them there.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ItemScores = Mapping[str, np.ndarray]

BLOCKS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of all items that have been asked by the end of each block
MIN_ITEMS = 32  # in the first block: less says too little of how much the scores vary
MIN_STRATUM_ITEMS = 4  # of every stratum, in the first block
STRATA = 3  # a benchmark; most of the gain of any number of strata


@dataclass(frozen=True)
class Stratum:
    """Items of one benchmark that are drawn at random from each other.

    items: indices into the benchmark's items, in the order in which they are asked. asked: how many of them have
    been asked by the end of each block; after the last, all. deviation: the standard deviation that a candidate's
    scores are expected to have on them around what other candidates scored; only the ratios between strata count.
    """

    benchmark: str
    items: np.ndarray
    asked: tuple[int, ...]
    deviation: float


@dataclass(frozen=True)
class ItemOrder:
    """All items of a suite, each in one stratum. Blocks are numbered 0, 1, ..."""

    strata: tuple[Stratum, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.strata[0].asked)

    def num_asked(self, block: int) -> int:
        """How many items have been asked by the end of a block."""
        return sum(stratum.asked[block] for stratum in self.strata)

    def block(self, block: int) -> dict[str, np.ndarray]:
        """Indices of the items that the block asks, ascending, by benchmark."""
        found: dict[str, list[np.ndarray]] = {}
        for stratum in self.strata:
            begin = stratum.asked[block - 1] if block else 0
            found.setdefault(stratum.benchmark, []).append(stratum.items[begin : stratum.asked[block]])
        return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}


def order_items(
    weights: Mapping[str, float],
    counts: Mapping[str, int],
    full: Sequence[ItemScores] = (),
    *,
    seed: int | Sequence[int],
    blocks: Sequence[float] = BLOCKS,
) -> ItemOrder:
    """The order in which one candidate is asked the items; the same for the same arguments.

    weights: of the benchmarks in the utility; the items of one without weight are asked in the last block.
    counts: number of items by benchmark. full: candidates that have answered all items, for item selection; with
    fewer than two, or none given, every benchmark is one stratum and has the same share of every block.
    blocks: shares of the items, ascending, the last 1. Blocks that would come before the first MIN_ITEMS items or hold
    nothing are left out, so a small suite has a single block.
    Raises ValueError when `blocks` are not as said, or no benchmark counts.
    """
    if not blocks or blocks[-1] != 1 or min(np.diff((0.0, *blocks))) <= 0:
        raise ValueError(f"blocks must be ascending shares of which the last is 1, but are {tuple(blocks)}")
    drawn, deviations = [], []
    for name in (name for name in counts if weights.get(name)):
        rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), zlib.crc32(name.encode())])
        priority = rng.permutation(counts[name])
        labels, found = _strata([scores[name] for scores in full], counts[name])
        for label, deviation in enumerate(found):
            drawn.append((name, priority[labels[priority] == label]))
            deviations.append(deviation)
    if not drawn:
        raise ValueError("a utility must count a benchmark that has items")
    sizes = np.array([len(items) for _, items in drawn])
    per_item = [abs(weights[name]) / counts[name] for name, _ in drawn]
    # Without item selection every item is as likely to be asked as any other, whatever its benchmark counts for.
    rates = np.multiply(per_item, deviations) if len(full) > 1 else np.ones(len(drawn))
    plan = _plan(sizes, rates, blocks)
    strata = [
        Stratum(name, items, tuple(asked), deviation)
        for (name, items), asked, deviation in zip(drawn, plan.T.tolist(), deviations, strict=True)
    ]
    last_only = (0,) * (len(plan) - 1)
    strata += [
        Stratum(name, np.arange(count), (*last_only, count), 1.0)
        for name, count in counts.items()
        if not weights.get(name)
    ]
    return ItemOrder(tuple(strata))


def _strata(scores: Sequence[np.ndarray], num_items: int) -> tuple[np.ndarray, list[float]]:
    """(stratum of each item, shape (items,); deviation of each stratum) of one benchmark.

    scores: of K candidates. The variance of an item's K scores is shrunk towards the mean over the items, as if
    one more score had been seen, so that no item counts as decided. The strata have about the same sum of
    deviations (Cochran, section 5A.7), and items whose scores vary alike are in the same.
    """
    if len(scores) < 2:
        return np.zeros(num_items, dtype=np.int64), [1.0]
    values = np.stack(scores)
    known = np.isfinite(values)
    seen = known.sum(axis=0)
    means = np.where(known, values, 0).sum(axis=0) / np.maximum(seen, 1)
    squares = np.where(known, (values - means) ** 2, 0).sum(axis=0)
    typical = squares.sum() / max(np.maximum(seen - 1, 0).sum(), 1)
    if typical == 0:
        return np.zeros(num_items, dtype=np.int64), [
            1 / np.sqrt(num_items + 1)
        ]  # Laplace: not seen is not never
    variances = (squares + typical) / np.maximum(seen, 1)
    deviations, of_item = np.unique(np.sqrt(variances).round(12), return_inverse=True)
    totals = deviations * np.bincount(of_item)
    middles = (np.cumsum(totals) - totals / 2) / totals.sum()
    _, labels = np.unique((middles * STRATA).astype(np.int64)[of_item], return_inverse=True)
    return labels, [float(np.sqrt(variances[labels == label].mean())) for label in range(labels.max() + 1)]


def _plan(sizes: np.ndarray, rates: np.ndarray, blocks: Sequence[float]) -> np.ndarray:
    """How many items of each stratum have been asked by the end of each block, shape (blocks, strata).

    sizes, rates: shape (strata,). An item of a stratum is asked early in proportion to its rate.
    """
    total = int(sizes.sum())
    least = np.minimum(sizes, MIN_STRATUM_ITEMS)
    plan: list[np.ndarray] = []
    for share in blocks[:-1]:
        wanted = max(round(share * total), MIN_ITEMS, int(least.sum()))
        asked = _allocate(sizes, rates, plan[-1] if plan else least, wanted)
        if asked.sum() < total and (not plan or asked.sum() > plan[-1].sum()):
            plan.append(asked)
    return np.stack([*plan, sizes])


def _allocate(sizes: np.ndarray, rates: np.ndarray, least: np.ndarray, wanted: int) -> np.ndarray:
    """Whole numbers between least and sizes that sum to about `wanted`, as near to sizes * rates as these allow."""
    wished = rates * sizes
    low, high = 0.0, float(1 / rates.min())
    for _ in range(40):  # bisection on the share that is asked of an item of rate 1
        middle = (low + high) / 2
        asked = np.minimum(np.maximum(middle * wished, least), sizes)
        low, high = (low, middle) if asked.sum() > wanted else (middle, high)
    return np.rint(asked).astype(np.int64)
