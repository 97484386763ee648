"""The self-test of every start: are live swaps right with this model, on this engine, today?

A round trip alone is not enough: a module that stays stale on the way there and on the way back looks fine. So
what was written is compared bit for bit with the reference, and modules that vLLM transforms after loading must show
that they were transformed anew (`apply_checked`, where the engine has it).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, LogLikelihood

log = logging.getLogger(__name__)

# Log-probabilities may differ by this many times what repeating the same question makes them differ.
NOISE_FACTOR = 4.0
# Few and short: on a CPU a large model takes seconds for them, four times.
PROBES = (
    LogLikelihood("The quick brown fox", " jumps over the lazy dog"),
    LogLikelihood("1 + 2 =", " 3"),
    LogLikelihood("def add(a, b):", "\n    return a + b"),
)


@dataclass(frozen=True)
class Evidence:
    """problems: why swaps must not be trusted; empty when they may be.

    initial: log-probabilities of the probes after the initial load, natural. noise: how much repeating them changed
    any, in nats. moved: how much the swap to one expert changed any; None when there was nothing to swap to.
    """

    problems: tuple[str, ...]
    initial: tuple[float, ...]
    noise: float
    moved: float | None

    @property
    def tolerance(self) -> float:
        return NOISE_FACTOR * self.noise


def prove(engine: Any, initial: Mixture) -> Evidence:
    """Swap the engine, which holds `initial`, to a single expert and back, and examine every step.

    What the engine offers beyond the protocol is used: `apply_checked` and `describe` (vllm), `checksum` (hf).
    The engine holds `initial` again afterwards. Raises EngineError when the engine fails.
    """
    described = _described(engine)
    problems = _problems(described)
    for name, nbytes in described[0]["uncovered"].items() if described else ():
        log.info("%d bytes of %s are in no checkpoint (padding, as a rule)", nbytes, name)
    first = probe(engine)
    noise = distance(first, probe(engine))
    tolerance = NOISE_FACTOR * noise
    marks = [_checksum(engine)]
    other = next((m for n in initial.names if (m := Mixture.one_hot(initial.names, n)) != initial), None)
    moved = None
    if other is not None:
        problems += [f"{problem} (swap to {other})" for problem in _apply(engine, other, thorough=True)]
        marks.append(_checksum(engine))
        moved = distance(first, probe(engine))
        if moved <= tolerance and (unseen := [name for rank in described for name in rank["unseen"]]):
            problems.append(
                f"the swap to {other} changed no answer, and of {unseen[0]} nothing else can be seen"
            )
        elif moved <= tolerance:  # experts may well answer alike: what was written has been compared
            log.info("the probes cannot tell %s from %s", other, initial)
    problems += [f"{problem} (swap back to {initial})" for problem in _apply(engine, initial, thorough=True)]
    off = distance(first, probe(engine))
    if off > tolerance:
        problems.append(
            f"after a swap there and back the same weights answer differently: by {off:.3g} nats, "
            f"while repeating a question makes {noise:.3g}"
        )
    if _checksum(engine) != marks[0]:
        problems.append("after a swap there and back the weights are not the same")
    return Evidence(tuple(problems), first, noise, moved)


def known_problems(engine: Any) -> list[str]:
    """Why a swap would be wrong, as far as the load showed it: nothing is tried."""
    return _problems(_described(engine))


def probe(engine: Engine) -> tuple[float, ...]:
    """Log-probabilities of the probes under the weights that the engine holds."""
    return tuple(output.logprob for output in engine.loglikelihood(PROBES))


def distance(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest difference; infinite where only one of two values is a number."""
    return max(_difference(a, b) for a, b in zip(left, right, strict=True))


def _difference(left: float, right: float) -> float:
    if left == right or (math.isnan(left) and math.isnan(right)):
        return 0.0
    difference = abs(left - right)
    return math.inf if math.isnan(difference) else difference


def _apply(engine: Any, mixture: Mixture, *, thorough: bool) -> list[str]:
    if hasattr(engine, "apply_checked"):
        return engine.apply_checked(mixture, thorough=thorough)
    engine.apply(mixture)
    return []


def _described(engine: Any) -> list[dict[str, Any]]:
    return engine.describe() if hasattr(engine, "describe") else []


def _problems(described: Sequence[dict[str, Any]]) -> list[str]:
    return [problem for rank in described for problem in rank["problems"]]


def _checksum(engine: Any) -> str | None:
    return engine.checksum() if hasattr(engine, "checksum") else None
