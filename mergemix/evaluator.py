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

    start_s: seconds that an engine took to start for it, mostly 0. failure: why there are no results. together: how
    many were answered at once, this one among them.
    """

    mixture: Mixture
    results: tuple[ItemResult, ...]
    timings: dict[str, float]
    proven: bool
    start_s: float = 0.0
    failure: str | None = None
    swap: Swap | None = None
    together: int = 1


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

    def evaluate(self, mixtures: Sequence[Mixture], suite: Suite) -> Iterator[Evaluation]:
        remaining = list(mixtures)
        while remaining:
            begin = time.perf_counter()
            engine = self._ready()  # an engine that cannot start ends the run
            start_s = time.perf_counter() - begin
            together, remaining = remaining[: engine.in_flight], remaining[engine.in_flight :]
            evaluations = _attempt(engine, together, suite, start_s)
            if evaluations[0].failure is None:
                yield from evaluations
            else:
                self.close()
                yield from (self._again(mixture, suite) for mixture in together)

    def _again(self, mixture: Mixture, suite: Suite) -> Evaluation:
        """A candidate that failed once, alone and with another engine."""
        begin = time.perf_counter()
        engine = self._ready()
        [evaluation] = _attempt(engine, [mixture], suite, time.perf_counter() - begin)
        if evaluation.failure is not None:
            self.close()
        return evaluation

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


def _attempt(engine: Engine, mixtures: Sequence[Mixture], suite: Suite, start_s: float) -> list[Evaluation]:
    """Serve and score mixtures: one after a swap, or several at once. They fail together.

    start_s: goes to the first. What several take together is shared out evenly.
    """
    begin = time.perf_counter()
    try:
        swap = engine.apply(mixtures[0]) if len(mixtures) == 1 else None
        swapped = time.perf_counter()
        outputs = [engine.submit(suite.requests)] if swap else engine.submit_each(mixtures, suite.requests)
        answered = time.perf_counter()
        scored = [suite.score(each) for each in outputs]
    except EngineError as error:
        return [
            Evaluation(mixture, (), {}, engine.proven, start_s * (k == 0), failure=str(error))
            for k, mixture in enumerate(mixtures)
        ]
    count = len(mixtures)
    timings = {
        "swap_s": swap.seconds if swap else (swapped - begin) / count,
        "generate_s": (answered - swapped) / count,
        "score_s": (time.perf_counter() - answered) / count,
    }
    return [
        Evaluation(
            mixture, tuple(results), timings, engine.proven, start_s * (k == 0), swap=swap, together=count
        )
        for k, (mixture, results) in enumerate(zip(mixtures, scored, strict=True))
    ]
