"""What a study holds, as it is read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from mergemix.mixture import Mixture


class ItemResult(Protocol):
    """One item's answer, as the evaluation gives it. text: what the model wrote, where it is to be kept.

    score: None where `error` says why the item could not be scored. cut, unfinished: tokens of prompts that did not
    fit, and answers that were ended by their limit.
    """

    @property
    def benchmark(self) -> str: ...
    @property
    def item(self) -> str: ...
    @property
    def score(self) -> float | None: ...
    @property
    def text(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cut(self) -> int: ...
    @property
    def unfinished(self) -> int: ...


VERIFICATION = "verify"  # the origin of what was only measured to be compared with trained models


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One item's stored result, with the fields of an ItemResult: statistics are computed from either."""

    benchmark: str
    item: str
    score: float | None
    text: str | None
    error: str | None = None
    cut: int = 0
    unfinished: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a candidate that was stopped early would have scored on all items, from those it answered.

    stderr: standard error of its utility. benchmarks: (mean score, its standard error) of those that count.
    """

    utility: float
    stderr: float
    benchmarks: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class CandidateRecord:
    """One evaluated mixture.

    id: 1, 2, ... in the order of evaluation. repeat: 0, or n for its n-th evaluation over again (the noise floor).
    origin: who proposed it ("uniform", "expert:math", "base", "prior", "cma" ...). status: "stopped" early, when it was
    clearly worse than others; its item results stand for themselves. reason: why it failed or was stopped, None when
    done. estimate: of a stopped one. proven: the weights were swapped in by an engine whose self-test had passed.
    timings: seconds by stage. swap: what the swap to it moved, as `serve.engine.Swap` counts it, empty when failed.
    scores: mean over the items by benchmark, metrics: what benchmarks report besides; empty unless done. items: how
    many it answered.
    """

    id: int
    mixture: Mixture
    repeat: int
    origin: str
    status: Literal["done", "failed", "stopped"]
    reason: str | None
    proven: bool
    timings: Mapping[str, float]
    swap: Mapping[str, Any]
    scores: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    estimate: Estimate | None = None
    items: int = 0

    @property
    def done(self) -> bool:
        return self.status == "done"
