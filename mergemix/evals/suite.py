"""All benchmarks of a study: their items as requests, and the answers as results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.threads import Threads
from mergemix.evals.utility import mean_score
from mergemix.serve.engine import Generate, Generated, Output, Request


@dataclass(frozen=True, slots=True)
class Score:
    """What one item's answers are worth. value: None for an item that could not be scored, `error` says why.

    text: what was answered, None where nothing is written.
    """

    value: float | None
    text: str | None = None
    error: str | None = None


class Benchmark(Protocol):
    """Items with one way of asking and scoring them.

    metric: what the mean of the items' scores is called. higher_is_better: its direction. source: where it came from,
    for messages. item_ids: unique.
    """

    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def source(self) -> str: ...
    @property
    def item_ids(self) -> tuple[str, ...]: ...

    def requests(self, index: int) -> list[Request]:
        """What an engine is asked for item `index`: at least one request."""

    def score(self, index: int, outputs: Sequence[Output]) -> Score:
        """From the outputs of `requests(index)`, in their order. Raises EngineError for outputs that fail a candidate.

        Any other exception is an error of this item.
        """

    def report(self, scores: Sequence[Score]) -> dict[str, float]:
        """What else is reported for all items together, by name; scores in the order of the items."""

    def fingerprint(self) -> str:
        """Hex digest of all that determines the scores, and of nothing else: paths may change."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What a candidate got on one item.

    score: in the metric's unit; None with `error`. text: the answer, None where none is made. cut: tokens of its
    prompts that did not fit the model. unfinished: how many of its answers were ended by max_tokens.
    """

    benchmark: str
    item: str
    score: float | None
    text: str | None = None
    error: str | None = None
    cut: int = 0
    unfinished: int = 0


class Scored(Protocol):
    """What statistics need of an item's result, be it an ItemResult or a row of the study's store."""

    @property
    def benchmark(self) -> str: ...
    @property
    def item(self) -> str: ...
    @property
    def score(self) -> float | None: ...


class Suite:
    """Benchmarks in the order of their names, so that the order of the options changes nothing.

    Items are numbered 0, 1, ... through all benchmarks. capabilities: names of the benchmarks of each capability.
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
        self._places = [(b, index) for b in self.benchmarks for index in range(len(b.item_ids))]
        self._requests: dict[int, tuple[Request, ...]] = {}
        self._whole: Batch | None = None

    @property
    def num_items(self) -> int:
        return len(self._places)

    @property
    def item_counts(self) -> dict[str, int]:
        """Number of items of each benchmark."""
        return {benchmark.name: len(benchmark.item_ids) for benchmark in self.benchmarks}

    @property
    def directions(self) -> dict[str, int]:
        """By benchmark: 1 where a higher score is better, else -1."""
        return {benchmark.name: 1 if benchmark.higher_is_better else -1 for benchmark in self.benchmarks}

    def numbers(self, indices: Mapping[str, Sequence[int] | np.ndarray]) -> list[int]:
        """Numbers of items, ascending, that are given by benchmark and index in it."""
        begins, begin = {}, 0
        for benchmark in self.benchmarks:
            begins[benchmark.name] = begin
            begin += len(benchmark.item_ids)
        return sorted(begins[name] + int(index) for name, chosen in indices.items() for index in chosen)

    def batch(self, items: Sequence[int] | None = None) -> Batch:
        """The requests for the items of these numbers, by default all. Requests are built once for all candidates."""
        if items is None:
            if self._whole is None:
                self._whole = self.batch(range(self.num_items))
            return self._whole
        return Batch(items, [self._asked(number) for number in items], self._result, self._is_slow)

    def _asked(self, number: int) -> tuple[Request, ...]:
        if number not in self._requests:
            benchmark, index = self._places[number]
            self._requests[number] = tuple(benchmark.requests(index))
        return self._requests[number]

    def _is_slow(self, number: int) -> bool:
        return getattr(self._places[number][0], "slow_to_score", False)

    def _result(self, number: int, outputs: Sequence[Output]) -> ItemResult:
        benchmark, index = self._places[number]
        try:
            score = benchmark.score(index, outputs)
        except EngineError:
            raise
        except Exception as error:  # a grader that fails says nothing about the candidate: no zero
            score = Score(None, None, f"{type(error).__name__}: {error}")
        if score.value is not None and not math.isfinite(score.value):
            score = Score(None, score.text, f"the score must be a finite number, but is {score.value}")
        return ItemResult(
            benchmark.name,
            benchmark.item_ids[index],
            score.value,
            score.text,
            score.error,
            cut=sum(output.cut for output in outputs),
            unfinished=sum(isinstance(output, Generated) and not output.finished for output in outputs),
        )

    def check_scored(self, results: Iterable[ItemResult]) -> None:
        """Raise EngineError for a benchmark of which no item could be scored: it has no mean, and is no zero."""
        reasons: dict[str, str | None] = {}
        for result in results:
            if result.score is not None:
                reasons[result.benchmark] = None
            else:
                reasons.setdefault(result.benchmark, result.error)
        for name, reason in reasons.items():
            if reason is not None:
                raise EngineError(f"no item of {name} could be scored, the first one because of {reason}")

    def in_order(self, results: Iterable[ItemResult]) -> list[ItemResult]:
        """Results in the order of the suite's items."""
        by_item = {(result.benchmark, result.item): result for result in results}
        order = ((benchmark.name, item) for benchmark in self.benchmarks for item in benchmark.item_ids)
        return [by_item[place] for place in order if place in by_item]

    def report(self, results: Sequence[ItemResult]) -> dict[str, dict[str, float]]:
        """What the benchmarks report besides means, from results of all items in their order; {} where nothing."""
        scores = iter(Score(result.score, result.text, result.error) for result in results)
        reports = {b.name: b.report([next(scores) for _ in b.item_ids]) for b in self.benchmarks}
        return {name: report for name, report in reports.items() if report}

    def item_scores(self, results: Iterable[Scored]) -> dict[str, np.ndarray]:
        """Scores per benchmark, float64 of shape (items,) in suite order, whatever the order of `results`.

        NaN for an item without a score: one that was not asked, or is an error. Common items stand at the same place
        for every candidate, so that comparisons can be paired.
        Raises ValueError for results of other items, or two of the same.
        """
        scores: dict[tuple[str, str], float | None] = {}
        for result in results:
            if (result.benchmark, result.item) in scores:
                raise ValueError(f"there are two results of item {result.item!r} of {result.benchmark!r}")
            scores[result.benchmark, result.item] = result.score
        found = {
            b.name: np.array([_value(scores.pop((b.name, item), None)) for item in b.item_ids])
            for b in self.benchmarks
        }
        if scores:
            raise ValueError(f"the suite has no item {next(iter(scores))}")
        return found

    def fingerprint(self) -> str:
        """Hex digest of all that determines scores (see Benchmark.fingerprint for each benchmark's own)."""
        digests = "\n".join(benchmark.fingerprint() for benchmark in self.benchmarks)
        return hashlib.sha256(digests.encode()).hexdigest()


class Batch:
    """Items that are asked together. requests: those of all items, the longest first, so that no long one ends alone.

    numbers: of the items, in the order of the results.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        requests: Sequence[Sequence[Request]],
        result: Callable[[int, Sequence[Output]], ItemResult],
        is_slow: Callable[[int], bool],
    ) -> None:
        self.numbers = tuple(numbers)
        self._result = result
        self._slow = [is_slow(number) for number in numbers]
        self._places = sorted(
            ((row, column) for row, asked in enumerate(requests) for column in range(len(asked))),
            key=lambda place: -_length(requests[place[0]][place[1]]),
        )
        self._counts = [len(asked) for asked in requests]
        self.requests = tuple(requests[row][column] for row, column in self._places)

    def grade(self, outputs: Iterable[tuple[int, Output]]) -> list[ItemResult]:
        """Results of the items, in the order of `numbers`, from (index of a request, its output) in any order.

        An item is scored as soon as all of its outputs are there, while an engine may still answer the others; where
        that is slow, beside the engine, in threads. Raises the first EngineError: for an answer that is missing, of the
        wrong kind, or not finite.
        """
        given: list[dict[int, Output]] = [{} for _ in self.numbers]
        results: list[ItemResult | None] = [None] * len(self.numbers)
        with Threads() as threads:
            for index, output in outputs:
                row, column = self._places[index]
                given[row][column] = output
                if len(given[row]) == self._counts[row]:
                    ordered = [given[row][place] for place in range(self._counts[row])]
                    given[row] = {}
                    result = partial(self._result, self.numbers[row], ordered)
                    if self._slow[row]:
                        threads.start(row, result)
                    else:
                        results[row] = result()
                threads.check()
            for row, slow in threads.results():
                results[row] = slow
        done = [result for result in results if result is not None]
        if len(done) < len(results):
            raise EngineError(
                f"the engine must answer each of {len(self.requests)} requests, but left {len(results) - len(done)} "
                "items without an answer"
            )
        return done


def benchmark_scores(results: Iterable[Scored]) -> dict[str, float]:
    """Mean score of each benchmark over the items that have one; the order of the results does not matter."""
    scores: dict[str, list[float]] = {}
    for result in results:
        if result.score is not None:
            scores.setdefault(result.benchmark, []).append(result.score)
    return {name: mean_score(np.array(values)) for name, values in sorted(scores.items())}


def _value(score: float | None) -> float:
    return math.nan if score is None else score


def _length(request: Request) -> int:
    """What a request costs, roughly: characters or tokens to read, and tokens to write at most."""
    if isinstance(request, Generate):
        return len(request.prompt) + 4 * request.max_tokens
    return len(request.context) + len(request.continuation)
