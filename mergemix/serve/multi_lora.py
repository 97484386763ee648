"""Several mixtures of LoRA adapters in flight in one vLLM engine, without any swap.

A mixture of adapters is itself an adapter (see multi_lora_adapter), and vLLM's multi-LoRA applies another one to each
request of a batch. So the engine serves the base, and a candidate is a directory of a few factors.
"""

from __future__ import annotations

import shutil
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mergemix.errors import CheckpointError, ConfigError, EngineError, MergeMixError, PoisonedEngineError
from mergemix.mixture import Mixture
from mergemix.serve import multi_lora_adapter as adapters
from mergemix.serve import scratch
from mergemix.serve.engine import Engine, EngineSpec, Output, Request, Swap
from mergemix.serve.engine_log import EngineLog
from mergemix.serve.pipe import SentRequests
from mergemix.serve.vllm_engine import EngineProcess, engine_args

HOST_MODULE = "mergemix.serve.multi_lora_host"
WORKER_EXTENSION = "mergemix.serve.multi_lora_host.LoraWorker"


@dataclass(frozen=True)
class _Loaded:
    """An adapter in vLLM. number: no other mixture ever has it."""

    number: int
    directory: Path

    @property
    def reference(self) -> tuple[int, str]:
        return self.number, str(self.directory)


class MultiLoraEngine(Engine):
    """vLLM on the base, with mixtures as adapters: `lora_in_flight` of its spec, at least one, share a step of vLLM.

    On a GPU each takes memory for factors of the largest rank that a mixture can have. More may be submitted together:
    they then wait for each other.
    Each adapter that vLLM loads is compared with what was written before any request uses it: an engine is `proven`
    while the numbers of all of them were, and not their names only (as with tensor parallelism).
    An engine whose process died is poisoned.
    """

    kind = "vllm"
    proven = True  # of no adapter at all

    def __init__(self, spec: EngineSpec, initial: Mixture) -> None:
        """Start vLLM on the base, and apply `initial`.

        Raises ConfigError for a mixture that is not over the family's experts, EngineError with vLLM's own reason
        when it does not start; no process is then left.
        """
        self._family, self.in_flight = spec.family, spec.lora_in_flight
        self._loaded: OrderedDict[Mixture, _Loaded] = OrderedDict()  # the one used last is at the end
        self._count = 0
        self._sent = SentRequests()
        self._mixture = initial
        scratch.remove_stale()
        self._scratch = scratch.Scratch()
        self._directory = self._scratch.path
        self._process: EngineProcess | None = None
        try:
            self._process = EngineProcess(EngineLog(spec.log), HOST_MODULE)
            started = self._process.call("start", multi_lora_args(spec, initial))
            self.apply(initial)
            self._family.check_unchanged()
        except BaseException as error:
            self.close()
            if isinstance(error, MergeMixError) and not isinstance(error, (ConfigError, CheckpointError)):
                raise EngineError(f"vLLM did not start: {error}") from error
            raise
        self.version: str = started["version"]
        self.max_model_len: int = started["max_model_len"]

    def apply(self, mixture: Mixture) -> Swap:
        """Let `submit` answer as `mixture`; what others are answered with stays as it is.

        Raises ConfigError as Family.terms and for a mixture that no adapter can hold; EngineError when vLLM would
        not apply the adapter as it was written: it is then not used.
        """
        begin = time.perf_counter()
        nbytes = self._load(mixture)
        self._mixture = mixture
        self._trim()
        return Swap(time.perf_counter() - begin, nbytes)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        [outputs] = self.submit_each([self._mixture], requests)
        return outputs

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """As Engine.stream. Whoever takes no more of it (and closes it) leaves the engine as it was."""
        yield from self._stream([self._mixture], requests)

    def submit_each(self, mixtures: Sequence[Mixture], requests: Sequence[Request]) -> list[list[Output]]:
        """Every mixture's answers to all of the requests, as one batch; outputs by mixture, then by request."""
        outputs = dict(self._stream(mixtures, requests))
        count = len(requests)
        return [[outputs[k * count + index] for index in range(count)] for k in range(len(mixtures))]

    def _stream(
        self, mixtures: Sequence[Mixture], requests: Sequence[Request]
    ) -> Generator[tuple[int, Output], None, None]:
        """Indices count the requests of the first mixture, then those of the second, and so on."""
        process = self._usable_process()
        for mixture in mixtures:
            self._load(mixture)
        held = [self._loaded[mixture].reference for mixture in mixtures]
        if held and requests:
            try:
                ask = partial(process.stream, "stream_with")
                self.generate_s = yield from self._sent.stream(ask, requests, held)
            except (ConfigError, GeneratorExit):  # of a request: nothing was asked; or no more is wanted
                raise
            except BaseException:  # whatever else it was, Ctrl-C too, vLLM may still be at it
                self.poisoned = True
                raise
        self._trim()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()
        self._scratch.close()

    def _load(self, mixture: Mixture) -> int:
        """Have vLLM hold the mixture's adapter; the bytes written for it, 0 where it held it already."""
        process = self._usable_process()
        if mixture in self._loaded:
            self._loaded.move_to_end(mixture)
            return 0
        self._count += 1
        number = self._count
        directory = self._directory / f"mixture-{number}"
        written = adapters.write_mixture(self._family, mixture, directory)
        problems, compared = self._call(process, "add_adapter", number, str(directory))
        if problems:
            shutil.rmtree(directory, ignore_errors=True)
            raise EngineError(
                f"vLLM does not apply the adapter of {mixture} as it is: {'; '.join(problems[:3])}"
            )
        self.proven = self.proven and compared
        self._loaded[mixture] = _Loaded(number, directory)
        return written.nbytes

    def _trim(self) -> None:
        """Forget the adapters that were not used for longest, down to `in_flight`; the current one stays."""
        self._loaded.move_to_end(self._mixture)
        while len(self._loaded) > self.in_flight:
            _, oldest = self._loaded.popitem(last=False)
            self._call(self._usable_process(), "remove_adapter", oldest.number)
            shutil.rmtree(oldest.directory, ignore_errors=True)

    def _call(self, process: EngineProcess, method: str, *arguments: object) -> Any:
        try:
            return process.call(method, *arguments)
        except PoisonedEngineError:
            self.poisoned = True
            raise

    def _usable_process(self) -> EngineProcess:
        if self.poisoned:
            raise PoisonedEngineError("vLLM died: this engine must be rebuilt")
        if self._process is None:
            raise EngineError("this engine is closed")
        return self._process


def multi_lora_args(spec: EngineSpec, initial: Mixture) -> dict[str, Any]:
    """vLLM's EngineArgs: the base as vLLM itself loads it, with room for adapters in the modules that have any."""
    swapping = ("load_format", "model_loader_extra_config")
    rank = adapters.total_rank(spec.family)
    return {
        **{key: value for key, value in engine_args(spec, initial).items() if key not in swapping},
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_lora": True,
        "max_loras": spec.lora_in_flight,
        "max_lora_rank": adapters.max_lora_rank(rank),
        "lora_target_modules": adapters.target_modules(spec.family),
        **spec.options,
    }
