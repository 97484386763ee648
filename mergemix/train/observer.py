"""What a training tells while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepProgress:
    """After a step. loss: nats a learned token. tokens_per_s: of this process's run so far, all processes together."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_s: float


class Observer(Protocol):
    def stage(self, text: str) -> None:
        """What is done now: reading, training, writing."""

    def corpus(self, domain: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a corpus are tokenised."""

    def repeats(self, domain: str, epochs: float, tokens: int) -> None:
        """Before the first step: the `tokens` tokens of a corpus will be read `epochs` > 1 times."""

    def step(self, progress: StepProgress) -> None: ...


class Silent:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        pass

    def corpus(self, domain: str, done: int, total: int) -> None:
        pass

    def repeats(self, domain: str, epochs: float, tokens: int) -> None:
        pass

    def step(self, progress: StepProgress) -> None:
        pass
