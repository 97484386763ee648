"""What a check concluded: fine, doubtful, do not trust, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["fine", "doubtful", "do not trust"]
VERDICTS: tuple[Verdict, ...] = ("fine", "doubtful", "do not trust")


@dataclass(frozen=True)
class Check:
    """value: what was measured, in the unit that `why` says. threshold: beyond which the verdict is worse than fine.

    value is None where it is no number (a file that differs), threshold too.
    """

    name: str
    verdict: Verdict
    why: str
    value: float | None = None
    threshold: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def graded(value: float, doubtful: float, distrusted: float) -> Verdict:
    """By two thresholds. distrusted >= doubtful: more is worse; the other way round: less is worse."""
    sign = 1 if distrusted >= doubtful else -1
    if not sign * value < sign * distrusted:  # a NaN too
        return "do not trust"
    return "fine" if sign * value < sign * doubtful else "doubtful"


def worst(verdicts: Iterable[str]) -> Verdict:
    """The worst of them; fine without any."""
    return VERDICTS[max((VERDICTS.index(verdict) for verdict in verdicts), default=0)]  # type: ignore[arg-type]
