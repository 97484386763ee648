"""Evaluators: candidates in, per-item scores and timings out, in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mergemix.errors import EngineError
from mergemix.evals.suite import ItemResult, Suite
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Swap


@dataclass(frozen=True)
class Evaluation:
    """What one candidate gave. timings: seconds by stage (swap_s, generate_s, score_s). swap: what the swap moved.

    start_s: seconds that an engine took to start for it, mostly 0. failure: why there are no results.
    """

    mixture: Mixture
    results: tuple[ItemResult, ...]
    timings: dict[str, float]
    proven: bool
    start_s: float = 0.0
    failure: str | None = None
    swap: Swap | None = None


class LocalEvaluator:
    """A pool of one: a single engine on this machine, started at the first candidate that needs it.

    A study that is complete therefore resumes without starting an engine. An engine that fails on a
    candidate is rebuilt and the candidate is tried once more; failing twice makes a failed candidate.
    An engine that cannot start at all raises: no candidate could do better.
    """

    def __init__(self, start_engine: Callable[[], Engine]) -> None:
        self._start_engine = start_engine
        self._engine: Engine | None = None

    def evaluate(self, mixtures: Sequence[Mixture], suite: Suite) -> Iterator[Evaluation]:
        for mixture in mixtures:
            evaluation = self._attempt(mixture, suite)
            if evaluation.failure is not None:
                self.close()
                evaluation = self._attempt(mixture, suite)
            if evaluation.failure is not None:
                self.close()
            yield evaluation

    def _attempt(self, mixture: Mixture, suite: Suite) -> Evaluation:
        begin = time.perf_counter()
        engine = self._ready()  # outside the try: an engine that cannot start ends the run
        start_s = time.perf_counter() - begin
        try:
            swap = engine.apply(mixture)
            swapped = time.perf_counter()
            outputs = engine.submit(suite.requests)
            answered = time.perf_counter()
            results = suite.score(outputs)
        except EngineError as error:
            return Evaluation(mixture, (), {}, engine.proven, start_s, failure=str(error))
        timings = {
            "swap_s": swap.seconds,
            "generate_s": answered - swapped,
            "score_s": time.perf_counter() - answered,
        }
        return Evaluation(mixture, tuple(results), timings, engine.proven, start_s, swap=swap)

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
