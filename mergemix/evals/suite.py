"""All benchmarks of a study as one batch of requests, built once and asked of every candidate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.benchmark import Benchmark
from mergemix.evals.utility import mean_score
from mergemix.serve.engine import Output, Request


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What a candidate got on one item.

    score: 0 or 1, or nats. text: the answer, None where none is made.
    """

    benchmark: str
    item: str
    score: float
    text: str | None


class Scored(Protocol):
    """What statistics need of an item's result, be it an ItemResult or a row of the study's store."""

    @property
    def benchmark(self) -> str: ...
    @property
    def item(self) -> str: ...
    @property
    def score(self) -> float: ...


class Suite:
    """Benchmarks in the order of their names, so that the order of the options changes nothing.

    requests: one flat list for all items of all benchmarks, the batch for the engine.
    capabilities: names of the benchmarks of each capability.
    Raises BenchmarkError without benchmarks, or when two have the same name.
    """

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = sorted(benchmarks, key=lambda benchmark: benchmark.name)
        names = [benchmark.name for benchmark in self.benchmarks]
        if not names or len(set(names)) < len(names):
            raise BenchmarkError(f"a suite needs benchmarks with different names, but has {names}")
        self.capabilities: dict[str, list[str]] = {}
        for benchmark in self.benchmarks:
            self.capabilities.setdefault(benchmark.capability, []).append(benchmark.name)
        self.requests: list[Request] = []
        self._spans: list[range] = []  # of each item's requests, in the order of benchmarks and items
        for benchmark in self.benchmarks:
            for item in benchmark.items:
                begin = len(self.requests)
                self.requests.extend(benchmark.requests(item))
                self._spans.append(range(begin, len(self.requests)))

    @property
    def num_items(self) -> int:
        return len(self._spans)

    @property
    def item_counts(self) -> dict[str, int]:
        """Number of items of each benchmark."""
        return {benchmark.name: len(benchmark.items) for benchmark in self.benchmarks}

    def score(self, outputs: Sequence[Output]) -> list[ItemResult]:
        """Results of all items, in suite order, from the outputs of `requests`, in their order.

        Raises EngineError when an answer is missing, of the wrong kind, or not finite.
        """
        if len(outputs) != len(self.requests):
            raise EngineError(
                f"the engine must answer each of {len(self.requests)} requests, but gave {len(outputs)}"
            )
        results = []
        spans = iter(self._spans)
        for benchmark in self.benchmarks:
            for item in benchmark.items:
                span = next(spans)
                score, text = benchmark.score(item, outputs[span.start : span.stop])
                results.append(ItemResult(benchmark.name, item.id, score, text))
        return results

    def item_scores(self, results: Iterable[Scored]) -> dict[str, np.ndarray]:
        """Scores per benchmark, float64 of shape (items,) in suite order, whatever the order of `results`.

        Common items stand at the same place for every candidate, so that comparisons can be paired.
        Raises ValueError when the results are not exactly those of all items, each once.
        """
        given = list(results)
        scores = {(result.benchmark, result.item): result.score for result in given}
        expected = {benchmark.name: [item.id for item in benchmark.items] for benchmark in self.benchmarks}
        if len(given) != self.num_items or scores.keys() != {
            (n, i) for n, ids in expected.items() for i in ids
        }:
            raise ValueError(
                f"{len(given)} results are not one for each of the suite's {self.num_items} items"
            )
        return {name: np.array([scores[name, item] for item in ids]) for name, ids in expected.items()}

    def fingerprint(self) -> str:
        """Hex digest of all that determines scores (see Benchmark.fingerprint for each benchmark's own)."""
        digests = "\n".join(benchmark.fingerprint() for benchmark in self.benchmarks)
        return hashlib.sha256(digests.encode()).hexdigest()


def benchmark_scores(results: Iterable[Scored]) -> dict[str, float]:
    """Mean score of each benchmark; the order of the results does not matter."""
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result.benchmark, []).append(result.score)
    return {name: mean_score(np.array(values)) for name, values in sorted(scores.items())}
