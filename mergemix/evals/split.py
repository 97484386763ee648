"""The held-out split: a share of every benchmark's items that the search never sees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mergemix.errors import ConfigError
from mergemix.evals.suite import Benchmark, Score
from mergemix.serve.engine import Generate, Output, Request


class Subset:
    """Some of a benchmark's items, as a benchmark of the same name. indices: of those items, ascending."""

    def __init__(self, whole: Benchmark, indices: Sequence[int]) -> None:
        self._whole = whole
        self._indices = tuple(indices)
        self.name = whole.name
        self.capability = whole.capability
        self.metric = whole.metric
        self.higher_is_better = whole.higher_is_better
        self.source = whole.source
        self.slow_to_score = getattr(whole, "slow_to_score", False)
        self.item_ids = tuple(whole.item_ids[index] for index in self._indices)

    def requests(self, index: int) -> list[Request]:
        return self._whole.requests(self._indices[index])

    def score(self, index: int, outputs: Sequence[Output]) -> Score:
        return self._whole.score(self._indices[index], outputs)

    def report(self, scores: Sequence[Score]) -> dict[str, float]:
        """Nothing: what the field reports is over all items."""
        return {}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._whole.fingerprint()} {self._indices}".encode()).hexdigest()


def split_items(
    benchmarks: Sequence[Benchmark], share: float, seed: int
) -> tuple[list[Benchmark], list[Benchmark]]:
    """(what the search sees, what it does not): of every benchmark `share` of the items is held out.

    Which ones depends on the seed and on what is asked, so an item that is in a benchmark twice is on one side only.
    Raises ConfigError when a benchmark has too few different items to be on both sides.
    """
    kept: list[Benchmark] = []
    held: list[Benchmark] = []
    for benchmark in benchmarks:
        digests = [
            hashlib.sha256(f"{seed} {benchmark.name} {asked_by(benchmark, index)!r}".encode()).digest()
            for index in range(len(benchmark.item_ids))
        ]
        ranked = sorted(digests)
        last = ranked[max(round(share * len(ranked)), 1) - 1]
        inside = [index for index, digest in enumerate(digests) if digest <= last]
        outside = [index for index, digest in enumerate(digests) if digest > last]
        if not outside:
            raise ConfigError(
                f"a share of the items can be held out only of a benchmark with two different ones or more, but "
                f"{benchmark.name!r} has {len(set(digests))}: give it more items, or leave out --holdout-share"
            )
        kept.append(Subset(benchmark, outside))
        held.append(Subset(benchmark, inside))
    return kept, held


def asked_by(benchmark: Benchmark, index: int) -> list[Request]:
    """What an item asks, whatever its random numbers are: they differ between items that ask the same."""
    asked = benchmark.requests(index)
    return [replace(each, seed=0) if isinstance(each, Generate) else each for each in asked]
