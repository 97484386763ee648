"""Lanes of `mergemix_kernels.pinned` on CPU tensors, for tests: their work is real, and as late as can be."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Event:
    lane: str
    happened: bool = False


@dataclass
class Wait:
    event: Event


class LateLanes:
    """Lanes whose work is done as late as can be: when the host waits, and then by whichever lane chance picks.

    Some lanes are picked far more often than others, differently for each seed. `ignored`: pairs (who, lane) of
    waits that are not observed. `trace`: for each wait that would have blocked, such a pair.
    """

    def __init__(self, seed: int, ignored: frozenset[tuple[str, str]] = frozenset()) -> None:
        self._random = random.Random(seed)
        self._queues: dict[str, deque] = {lane: deque() for lane in ("caller", "in", "sum", "out")}
        self._speeds = {lane: self._random.choice([1, 30, 1000]) for lane in self._queues}
        self._ignored = ignored
        self._places: dict[int, str] = {}
        self._kept: list[torch.Tensor] = []
        self.allocated = 0

    def put(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        self._places[tensor.untyped_storage().data_ptr()] = place
        self._kept.append(tensor)
        return tensor

    def where(self, tensor: torch.Tensor) -> str:
        return self._places.get(tensor.untyped_storage().data_ptr(), "pageable")

    def on_device(self, nbytes: int) -> torch.Tensor:
        self.allocated += nbytes
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cpu")  # NaN in every format

    pinned = on_device

    def run(self, lane: str, work: Callable[[], None]) -> None:
        self._queues[lane].append(work)

    def record(self, lane: str) -> Event:
        self._queues[lane].append(Event(lane))
        return self._queues[lane][-1]

    def wait(self, lane: str, event: Event) -> None:
        if (lane, event.lane) not in self._ignored:
            self._queues[lane].append(Wait(event))

    def wait_on_host(self, event: Event) -> None:
        if ("host", event.lane) not in self._ignored:
            while not event.happened:
                self._step()

    def finish(self) -> None:
        while any(self._queues.values()):
            self._step()

    def _step(self) -> None:
        ready = [
            lane
            for lane, queue in self._queues.items()
            if queue and not (isinstance(queue[0], Wait) and not queue[0].event.happened)
        ]
        assert ready, "every lane waits for another"
        lane = self._random.choices(ready, [self._speeds[lane] for lane in ready])[0]
        item = self._queues[lane].popleft()
        if isinstance(item, Event):
            item.happened = True
        elif callable(item):
            item()
