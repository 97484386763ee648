"""What a study holds, as it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mergemix.mixture import Mixture


class ItemResult(Protocol):
    """One item's answer, as the evaluation gives it. text: what the model wrote, where it is to be kept."""

    @property
    def benchmark(self) -> str: ...
    @property
    def item(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def text(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One item's stored result, with the fields of an ItemResult: statistics are computed from either."""

    benchmark: str
    item: str
    score: float
    text: str | None


@dataclass(frozen=True)
class CandidateRecord:
    """One evaluated mixture.

    id: 1, 2, ... in the order of evaluation. repeat: 0, or n for its n-th evaluation over again (the
    noise floor). origin: who proposed it ("uniform", "expert:math", "base", "prior", "cma" ...).
    reason: why it failed, None when done. proven: the weights were swapped in by an engine whose self-test
    had passed. timings: seconds by stage. swap: what the swap to it moved, as `serve.engine.Swap` counts it, empty
    when failed. scores: mean over the items by benchmark, empty when failed.
    """

    id: int
    mixture: Mixture
    repeat: int
    origin: str
    status: Literal["done", "failed"]
    reason: str | None
    proven: bool
    timings: Mapping[str, float]
    swap: Mapping[str, Any]
    scores: Mapping[str, float]

    @property
    def done(self) -> bool:
        return self.status == "done"
