"""Evaluators: candidates in, per-item scores and timings out, in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mergemix.errors import EngineError
from mergemix.evals.suite import Batch, ItemResult, Suite
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Output, Swap
from mergemix.study import Estimate


@dataclass(frozen=True)
class Evaluation:
    """What one candidate gave. swap: what the swap moved. timings: seconds by stage: swap_s; generate_s inside the
    engine; score_s, what asking and grading took beyond that.

    start_s: seconds that an engine took to start for it, mostly 0. failure: why there are no results. together: how
    many were answered at once, this one among them. stopped: why it was stopped before it had answered all items, and
    the estimate of its utility.
    """

    mixture: Mixture
    results: tuple[ItemResult, ...]
    timings: dict[str, float]
    proven: bool
    start_s: float = 0.0
    failure: str | None = None
    swap: Swap | None = None
    together: int = 1
    stopped: tuple[str, Estimate] | None = None


class Course(Protocol):
    """The order in which one candidate is asked its items, and when that ends early."""

    blocks: Sequence[Sequence[int]]

    def stop(self, block: int, results: Sequence[ItemResult]) -> tuple[str, Estimate] | None:
        """Why, and its estimate, when the candidate is stopped after `block`. results: of all items asked so far."""


Courses = Callable[[Mixture], Course | None]


class LocalEvaluator:
    """A pool of one: a single engine on this machine, started at the first candidate that needs it.

    A study that is complete therefore resumes without starting an engine. Engines that can answer several mixtures at
    once get as many. An engine that fails on a candidate is rebuilt and the candidate is tried once more, alone;
    failing twice makes a failed candidate.
    An engine that cannot start at all raises: no candidate could do better.
    """

    def __init__(self, start_engine: Callable[[], Engine]) -> None:
        self._start_engine = start_engine
        self._engine: Engine | None = None

    def evaluate(
        self, mixtures: Sequence[Mixture], suite: Suite, courses: Courses | None = None
    ) -> Iterator[Evaluation]:
        """courses: how each mixture is asked its items; all at once where there is none, and where several mixtures are
        answered together.
        """
        remaining = list(mixtures)
        while remaining:
            begin = time.perf_counter()
            engine = self._ready()  # an engine that cannot start ends the run
            start_s = time.perf_counter() - begin
            together, remaining = remaining[: engine.in_flight], remaining[engine.in_flight :]
            evaluations = self._attempt(engine, together, suite, start_s, courses)
            if evaluations[0].failure is None:
                yield from evaluations
            else:
                self.close()
                yield from (self._again(mixture, suite, courses) for mixture in together)

    def _again(self, mixture: Mixture, suite: Suite, courses: Courses | None) -> Evaluation:
        """A candidate that failed once, alone and with another engine."""
        begin = time.perf_counter()
        engine = self._ready()
        [evaluation] = self._attempt(engine, [mixture], suite, time.perf_counter() - begin, courses)
        if evaluation.failure is not None:
            self.close()
        return evaluation

    def _attempt(
        self,
        engine: Engine,
        mixtures: Sequence[Mixture],
        suite: Suite,
        start_s: float,
        courses: Courses | None,
    ) -> list[Evaluation]:
        """Serve and score mixtures: one after a swap, or several at once. They fail together. start_s: of the first."""
        try:
            if len(mixtures) == 1:
                # Where several are answered together none can be raced, nor then one that is left over: what a study
                # holds must not depend on where it was interrupted.
                course = courses(mixtures[0]) if courses and engine.in_flight == 1 else None
                return [_evaluate_one(engine, mixtures[0], suite, course, start_s)]
            return _evaluate_together(engine, mixtures, suite, start_s)
        except EngineError as error:
            return [
                Evaluation(mixture, (), {}, engine.proven, start_s * (k == 0), failure=str(error))
                for k, mixture in enumerate(mixtures)
            ]

    def _ready(self) -> Engine:
        if self._engine is None:
            self._engine = self._start_engine()
        return self._engine

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> LocalEvaluator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _evaluate_one(
    engine: Engine, mixture: Mixture, suite: Suite, course: Course | None, start_s: float
) -> Evaluation:
    """Raises EngineError when the engine fails, or when what it answers fails the candidate."""
    swap = engine.apply(mixture)
    results: list[ItemResult] = []
    timings = {"swap_s": swap.seconds, "generate_s": 0.0, "score_s": 0.0}
    stopped = None
    blocks = [None] if course is None else course.blocks
    for block, items in enumerate(blocks):
        begin = time.perf_counter()
        answered, generate_s = answer(engine, suite.batch(items))
        results += answered
        timings["generate_s"] += generate_s
        timings["score_s"] += time.perf_counter() - begin - generate_s
        if course is not None and (stopped := course.stop(block, results)):
            break
    if stopped is None:
        suite.check_scored(results)
        results = suite.in_order(results)
    return Evaluation(mixture, tuple(results), timings, engine.proven, start_s, swap=swap, stopped=stopped)


def answer(engine: Engine, batch: Batch) -> tuple[list[ItemResult], float]:
    """The results of a batch under the weights that the engine holds, graded as they come; seconds of generation.

    These are the seconds inside the engine where it counts them, else those spent waiting for its answers.
    """
    outputs = _Waiting(engine.stream(batch.requests))
    results = batch.grade(outputs)
    return results, outputs.seconds if engine.generate_s is None else engine.generate_s


class _Waiting(Iterator[tuple[int, Output]]):
    """What another iterator gives. seconds: that it took for it."""

    def __init__(self, outputs: Iterator[tuple[int, Output]]) -> None:
        self._outputs = outputs
        self.seconds = 0.0

    def __next__(self) -> tuple[int, Output]:
        begin = time.perf_counter()
        try:
            return next(self._outputs)
        finally:
            self.seconds += time.perf_counter() - begin


def _evaluate_together(
    engine: Engine, mixtures: Sequence[Mixture], suite: Suite, start_s: float
) -> list[Evaluation]:
    """Several at once, without a swap. What they take together is shared out evenly. Raises as `_evaluate_one`."""
    begin = time.perf_counter()
    batch, count = suite.batch(), len(mixtures)
    outputs = engine.submit_each(mixtures, batch.requests)
    answered = time.perf_counter()
    scored = [batch.grade(enumerate(each)) for each in outputs]
    for results in scored:
        suite.check_scored(results)
    timings = {
        "swap_s": 0.0,
        "generate_s": (answered - begin) / count,
        "score_s": (time.perf_counter() - answered) / count,
    }
    return [
        Evaluation(mixture, tuple(results), timings, engine.proven, start_s * (k == 0), together=count)
        for k, (mixture, results) in enumerate(zip(mixtures, scored, strict=True))
    ]
