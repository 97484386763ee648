"""The engine protocol: a served model whose weights can become any mixture of the experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mergemix.checkpoints.family import Family
from mergemix.config import VERIFICATIONS
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture

# Text, which an engine tokenises as lm-evaluation-harness does, or token ids, which it takes as they are.
Text = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue `prompt` for at most `max_tokens` tokens, up to (not including) a stop string.

    temperature: 0 is greedy; above, tokens are drawn, from the most probable ones that make up `top_p`, with `seed`.
    as_lm_eval: to all digits as lm-evaluation-harness's own model for this engine answers, which may take longer.
    """

    prompt: Text
    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    as_lm_eval: bool = False


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely is `continuation` after `context`? Both are text, or both are ids. as_lm_eval: see Generate."""

    context: Text
    continuation: Text
    as_lm_eval: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """num_tokens: of the answer. finished: not ended by max_tokens. cut: tokens of the prompt that did not fit."""

    text: str
    num_tokens: int
    finished: bool = True
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Likelihood:
    """logprob: natural log-probability of the whole continuation, summed over its `num_tokens` tokens.

    is_greedy: every token of the continuation was the most probable one. cut: tokens of the context that did not fit.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool
    cut: int = 0


Request = Generate | LogLikelihood
Output = Generated | Likelihood


@dataclass(frozen=True)
class Swap:
    """What one `apply` did, all ranks together.

    seconds: wall time. bytes_written: into live parameters. bytes_read: of operands, by where they were (device, host,
    disk). destinations: parts of parameters that a swap can change; skipped: those of them that held the right weights
    already. process_s: of seconds, what the engine needed to process its weights anew.
    """

    seconds: float
    bytes_written: int
    bytes_read: Mapping[str, int] = field(default_factory=dict)
    destinations: int = 0
    skipped: int = 0
    process_s: float = 0.0


@dataclass(frozen=True)
class EngineSpec:
    """What an engine serves and how.

    kind: "auto" is vllm where it is installed, else hf. max_model_len: tokens of prompt plus answer;
    None takes the model's own limit. log: file that receives the engine's own output; None leaves it on stderr.
    device_cache, host_cache: bytes of operands that vLLM keeps for later swaps, in the memory of its devices and in
    memory that all engines of the machine share. verify_swaps: what is compared with the reference, "first" the
    swaps of the self-test at start and a small sample of each later one, "every" all of each later one too, "never"
    nothing: the engine is then not `proven`.
    lora_in_flight: 0 folds LoRA adapters among the experts into the weights. N >= 1 serves N mixtures at once, beside
    the base, through vLLM's multi-LoRA: then all experts must be adapters of low-rank factors only.
    Raises ConfigError for a value that is out of range, or that does not go with the family or another value.
    """

    family: Family
    kind: Literal["auto", "vllm", "hf"] = "auto"
    seed: int = 0
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    log: Path | None = None
    options: dict[str, object] = field(default_factory=dict)  # passed to vLLM's EngineArgs unchanged
    device_cache: int = 0
    host_cache: int = 0
    verify_swaps: str = "first"
    lora_in_flight: int = 0

    def __post_init__(self) -> None:
        check_cache_bytes("device_cache", self.device_cache)
        check_cache_bytes("host_cache", self.host_cache)
        if self.verify_swaps not in VERIFICATIONS:
            raise ConfigError(
                f"verify_swaps must be one of {', '.join(VERIFICATIONS)}, but is {self.verify_swaps!r}"
            )
        if self.lora_in_flight < 0:
            raise ConfigError(
                "lora_in_flight must be at least 1, or 0 to fold adapters into the weights, but is "
                f"{self.lora_in_flight}"
            )
        if self.kind == "hf":
            for key, default in (("tensor_parallel_size", 1), ("device_cache", 0), ("host_cache", 0)):
                if getattr(self, key) != default:
                    raise ConfigError(
                        f"{key} is for vLLM, and with the engine hf it must be {default}, but is "
                        f"{getattr(self, key)}: leave it out, or take --engine vllm"
                    )
        if self.lora_in_flight:
            self._check_multi_lora()

    def _check_multi_lora(self) -> None:
        from mergemix.serve.multi_lora_adapter import check_low_rank

        if self.kind == "hf":
            raise ConfigError(
                f"lora_in_flight {self.lora_in_flight} needs vLLM's multi-LoRA, but the engine is hf: take --engine "
                "vllm, or lora_in_flight 0, which folds adapters into the weights"
            )
        for key in ("device_cache", "host_cache"):
            if getattr(self, key):
                raise ConfigError(
                    f"{key} keeps weights for swaps, and with lora_in_flight {self.lora_in_flight} there are none: "
                    "leave one of the two out"
                )
        check_low_rank(self.family)


def check_cache_bytes(name: str, value: object) -> int:
    """The value; ConfigError unless it is a number of bytes."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} must be a whole number of bytes, 0 for none, but is {value!r}")
    return value


class Engine(ABC):
    """A live model. `apply` changes its weights; `submit` answers with the weights applied last.

    proven: the self-test at start passed, so that a score may be taken from swapped weights.
    poisoned: a swap failed halfway; `submit` and `apply` raise PoisonedEngineError from then on.
    in_flight: mixtures that it answers at once, in `submit_each`. generate_s: seconds that the last answers took inside
    the engine, where it counts them.
    """

    kind: str
    proven: bool = False
    poisoned: bool = False
    in_flight: int = 1
    generate_s: float | None = None

    @abstractmethod
    def apply(self, mixture: Mixture) -> Swap:
        """Make the live weights base + sum_k a_k (expert_k - base).

        Raises PoisonedEngineError when it fails halfway, or when what it wrote is not what it should be; ConfigError
        when the base is needed but absent, or a layer group matches no tensor.
        """

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> list[Output]:
        """Answer a mixed batch of requests, in their order."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and its processes; safe to call twice."""

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """As `submit`: (index of the request, its output), each as soon as it is known."""
        yield from enumerate(self.submit(requests))

    def submit_each(self, mixtures: Sequence[Mixture], requests: Sequence[Request]) -> list[list[Output]]:
        """Every mixture's answers to all of the requests; outputs by mixture, then by request."""
        outputs = []
        for mixture in mixtures:
            self.apply(mixture)
            outputs.append(self.submit(requests))
        return outputs

    def generate(self, requests: Sequence[Generate]) -> list[Generated]:
        return self.submit(requests)  # type: ignore[return-value]

    def loglikelihood(self, requests: Sequence[LogLikelihood]) -> list[Likelihood]:
        return self.submit(requests)  # type: ignore[return-value]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
