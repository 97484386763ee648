"""The slow safe path: a fresh engine for every mixture, for models whose live swaps are not right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from mergemix.errors import EngineError
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Output, Request, Swap


class RestartingEngine(Engine):
    """Serves each mixture from an engine that was started on it. Never `proven`: nothing is swapped.

    start: gives an engine that holds the mixture. It may raise EngineError; the next `apply` then tries again.
    """

    def __init__(self, start: Callable[[Mixture], Engine], initial: Mixture) -> None:
        self._start = start
        self._mixture = initial
        self._engine: Engine | None = start(initial)
        self.kind = self._engine.kind

    def apply(self, mixture: Mixture) -> Swap:
        begin = time.perf_counter()
        if self._engine is None or self._engine.poisoned or mixture != self._mixture:
            self.close()  # first: two engines may not fit into memory
            self._engine = self._start(mixture)
            self._mixture = mixture
        return Swap(time.perf_counter() - begin, 0)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        return self._running().submit(requests)

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        engine = self._running()
        yield from engine.stream(requests)
        self.generate_s = engine.generate_s

    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineError("no engine is running: the last start failed, or it was closed")
        return self._engine

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
