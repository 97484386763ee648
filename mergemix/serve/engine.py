"""The engine protocol: a served model whose weights can become any mixture of the experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mergemix.checkpoints.family import Family
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import operands


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue `prompt` greedily for at most `max_tokens` tokens, up to (not including) a stop string."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely is `continuation` after `context`?"""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Generated:
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """logprob: natural log-probability of the whole continuation, summed over its `num_tokens` tokens.

    is_greedy: every token of the continuation was the most probable one.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


Request = Generate | LogLikelihood
Output = Generated | Likelihood


@dataclass(frozen=True)
class Swap:
    """What one `apply` did: wall seconds, and bytes written into live parameters."""

    seconds: float
    bytes_written: int


@dataclass(frozen=True)
class EngineSpec:
    """What an engine serves and how.

    kind: "auto" is vllm where it is installed, else hf. max_model_len: tokens of prompt plus answer;
    None takes the model's own limit. log: file that receives the engine's own output; None leaves it on stderr.
    Raises ConfigError for an expert that is a LoRA adapter.
    """

    family: Family
    kind: Literal["auto", "vllm", "hf"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    log: Path | None = None
    options: dict[str, object] = field(default_factory=dict)  # passed to vLLM's EngineArgs unchanged

    def __post_init__(self) -> None:
        operands(self.family)  # refuses, before anything is started, what cannot be served


class Engine(ABC):
    """A live model. `apply` changes its weights; `submit` answers with the weights applied last.

    proven: the self-test at start passed, so that a score may be taken from swapped weights.
    poisoned: a swap failed halfway; `submit` and `apply` raise PoisonedEngineError from then on.
    """

    kind: str
    proven: bool = False
    poisoned: bool = False

    @abstractmethod
    def apply(self, mixture: Mixture) -> Swap:
        """Make the live weights base + sum_k a_k (expert_k - base).

        Raises PoisonedEngineError when it fails halfway, ConfigError when the base is needed but absent.
        """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> list[Output]:
        """Answer a mixed batch of requests, in their order."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and its processes; safe to call twice."""

    def generate(self, requests: Sequence[Generate]) -> list[Generated]:
        return self.submit(requests)  # type: ignore[return-value]

    def loglikelihood(self, requests: Sequence[LogLikelihood]) -> list[Likelihood]:
        return self.submit(requests)  # type: ignore[return-value]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
