"""The vLLM engine: real vLLM in a process of its own, its parameters rewritten in place for every mixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from mergemix.errors import ConfigError, EngineError, MergeMixError, PoisonedEngineError
from mergemix.merge.delta_cache import TIERS, remove_stale
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import check_mixture
from mergemix.serve.engine import Engine, EngineSpec, Output, Request, Swap
from mergemix.serve.engine_log import EngineLog
from mergemix.serve.pipe import CANCEL, DONE, FAILED, PART, SentRequests
from mergemix.serve.session_memory import mapped_by, remove
from mergemix.serve.vllm_plugin import LOAD_FORMAT

WORKER_EXTENSION = "mergemix.serve.vllm_worker.MergeWorker"
STOP_S = 15.0
TERMINATE_S = 5.0
CANCEL_S = 10.0  # a step of vLLM takes less
POLL_S = 0.02
SHOWN_PROBLEMS = 3
# What mergemix_swap compares, by verify_swaps.
CHECKS = {"every": "all", "first": "sample", "never": "none"}
CHILD_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # A bounded spin at the end of a parallel region: threads that spin for ever take the cores from whoever computes.
    "GOMP_SPINCOUNT": "1000",
}


class VllmEngine(Engine):
    """vLLM with `load_format="mergemix"`: the first load is the initial mixture, swaps replay it.

    Requests that do not fit lose tokens on the left, as `RequestEncoder` says. An engine whose process died, or
    whose swap failed at any point, is poisoned.
    """

    kind = "vllm"

    def __init__(self, spec: EngineSpec, initial: Mixture) -> None:
        """Start vLLM on `initial`.

        Raises ConfigError for a mixture that the family cannot give, EngineError with vLLM's own reason when it
        does not start, CheckpointError when files are not those that the family was opened from; no process is left.
        """
        remove_stale()  # of processes that had to be killed
        check_mixture(spec.family, initial)
        self._family = spec.family
        self._check = CHECKS[spec.verify_swaps]
        self._shares_memory = spec.host_cache > 0
        self._sent = SentRequests()
        self._process: EngineProcess | None = EngineProcess(EngineLog(spec.log))
        try:
            started = self._process.call("start", engine_args(spec, initial))
            self._process.note_memory()
        except BaseException as error:
            self.close()
            if isinstance(error, MergeMixError):
                raise EngineError(f"vLLM did not start: {error}") from error
            raise
        try:
            spec.family.check_unchanged()  # vLLM opened the files anew
        except BaseException:
            self.close()
            raise
        self.version: str = started["version"]
        self.max_model_len: int = started["max_model_len"]

    def apply(self, mixture: Mixture) -> Swap:
        """As Engine.apply. What it wrote is compared with the reference: how much of it verify_swaps says."""
        begin = time.perf_counter()
        reports = self._swap(mixture, self._check)
        seconds = time.perf_counter() - begin
        if problems := [problem for report in reports for problem in report["problems"]]:
            self.poisoned = True
            raise PoisonedEngineError(
                f"the swap to {mixture} did not give its weights: {'; '.join(problems[:SHOWN_PROBLEMS])}"
            )
        return Swap(
            seconds,
            bytes_written=sum(report["bytes_written"] for report in reports),
            bytes_read={tier: sum(report["bytes_read"][tier] for report in reports) for tier in TIERS},
            destinations=sum(report["destinations"] for report in reports),
            skipped=sum(report["skipped"] for report in reports),
            process_s=max(report["process_s"] for report in reports),
        )

    def apply_checked(self, mixture: Mixture, *, thorough: bool) -> list[str]:
        """As `apply`; then what of the swap did not work on any rank, empty when all is well.

        Destinations are compared bit for bit with the fp32 reference (all of them, or a sample unless `thorough`), and
        every module that vLLM transforms after loading must have been transformed anew.
        """
        reports = self._swap(mixture, "all" if thorough else "sample")
        return [problem for report in reports for problem in report["problems"]]

    def describe(self) -> list[dict[str, Any]]:
        """What a swap does on each rank, and why it would be wrong; see MergeWorker.mergemix_describe."""
        return self._usable_process().call("call_workers", "mergemix_describe")

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        outputs = dict(self.stream(requests))
        return [outputs[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Output]]:
        """As Engine.stream. Whoever takes no more of it (and closes it) leaves the engine as it was."""
        process = self._usable_process()
        if not requests:
            return
        try:
            self.generate_s = yield from self._sent.stream(partial(process.stream, "stream"), requests)
        except (ConfigError, GeneratorExit):  # of a request: nothing was asked; or no more is wanted
            raise
        except BaseException:  # whatever else it was, Ctrl-C too, vLLM may still be at it
            self.poisoned = True
            raise

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stop()
            if self._shares_memory:
                remove_stale()  # of processes that had to be killed

    def _swap(self, mixture: Mixture, check: str) -> list[dict[str, Any]]:
        process = self._usable_process()
        check_mixture(self._family, mixture)
        self.poisoned = True  # until all of it has worked
        try:
            reports = process.call("swap", mixture.key(), check)
        except EngineError as error:
            raise PoisonedEngineError(f"the swap to {mixture} failed halfway: {error}") from error
        self.poisoned = False
        return reports

    def _usable_process(self) -> EngineProcess:
        if self.poisoned:
            raise PoisonedEngineError(
                "an earlier swap failed halfway, or vLLM died: this engine must be rebuilt"
            )
        if self._process is None:
            raise EngineError("this engine is closed")
        return self._process


class EngineProcess:
    """A child that runs `host_module`, with its own session: Ctrl-C reaches the caller alone."""

    _memory: Mapping[Path, int] = {}  # of its session

    def __init__(self, log: EngineLog, host_module: str = "mergemix.serve.vllm_host") -> None:
        self._log = log
        self._busy = False  # a call was made whose answer has not come, perhaps because of Ctrl-C
        self._connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            command = [sys.executable, "-P", "-m", host_module, str(descriptor), str(os.getpid())]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log.fileno,
                stderr=log.fileno,
                pass_fds=[descriptor],
                env={**CHILD_ENVIRONMENT, **os.environ},
                start_new_session=True,
            )
        log.release()

    def call(self, method: str, *arguments: object) -> Any:
        """Raises what the child raised, or PoisonedEngineError when it died, or still owes an earlier answer."""
        self._ask(method, arguments)
        _, result = self._receive()
        return result

    def stream(self, method: str, *arguments: object) -> Generator[Any, None, Any]:
        """The elements of the lists that the method yields; what it returns. Closed early, it ends the method, too.

        Raises as `call`.
        """
        self._ask(method, arguments)
        try:
            while (reply := self._receive())[0] == PART:
                yield from reply[1]
        except GeneratorExit:
            self._cancel()
            raise
        return reply[1]

    def _ask(self, method: str, arguments: tuple[object, ...]) -> None:
        if self._busy:
            raise PoisonedEngineError("an earlier call was interrupted: this engine must be rebuilt")
        self._busy = True
        try:
            self._connection.send((method, arguments))
        except OSError as error:
            raise self._died() from error

    def _receive(self) -> tuple[str, Any]:
        """The next part (PART, list), or in the end (DONE, result)."""
        try:
            kind, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        self._busy = kind == PART
        if kind != FAILED:
            return kind, result
        if "initialization failed" in str(result):  # of another process, which said why in the log
            raise EngineError(self._log.reason() or str(result)) from result
        if "EngineDeadError" in str(result):  # vLLM's own words point to a trace that is not there
            raise PoisonedEngineError(f"a process of vLLM died: {self._reason()}") from result
        raise result

    def _cancel(self) -> None:
        """End what the child is at. Where it does not listen it stays busy, and can only be stopped."""
        with suppress(OSError, MergeMixError):
            self._connection.send(CANCEL)
            deadline = time.monotonic() + CANCEL_S
            while self._connection.poll(max(deadline - time.monotonic(), 0)):
                if self._receive()[0] == DONE:
                    return

    def _died(self) -> PoisonedEngineError:
        status = self._child.wait(STOP_S)
        return PoisonedEngineError(f"vLLM's process died ({_exit(status)}): {self._reason()}")

    def _reason(self) -> str:
        return f"{self._log.reason() or 'its log does not say why'}; {self._log.where}"

    def stop(self) -> None:
        """End the child and everything that it started, gracefully if it listens; safe to call twice.

        Shared memory that vLLM then leaves behind is removed.
        """
        self._memory = {**self._memory, **mapped_by(self._child.pid)}
        if not self._busy:
            with suppress(OSError, subprocess.TimeoutExpired):
                self._connection.send(("stop", ()))
                self._child.wait(STOP_S)
        self._connection.close()
        # multiprocessing's resource trackers ignore SIGTERM: they free shared memory when all others are gone.
        for number, patience in ((signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, STOP_S)):
            deadline = time.monotonic() + patience
            if not self._signal_session(number):
                break
            while self._signal_session(0) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        remove(self._memory)

    def note_memory(self) -> None:
        """Remember the shared memory that is in use now: `stop` removes it even if all who know of it were killed."""
        self._memory = mapped_by(self._child.pid)

    def _signal_session(self, number: int) -> bool:
        """Send a signal to whoever is left of the child's session; whether there was anybody."""
        self._child.poll()  # a zombie would count as somebody
        try:
            os.killpg(self._child.pid, number)
        except ProcessLookupError:
            return False
        return True


def engine_args(spec: EngineSpec, initial: Mixture) -> dict[str, Any]:
    """vLLM's EngineArgs for a spec; those in `spec.options` win."""
    family = spec.family
    return {
        "model": str(family.template.root),
        "tokenizer": str(family.template.root),
        "load_format": LOAD_FORMAT,
        "model_loader_extra_config": {
            "experts": {expert.name: str(expert.root) for expert in family.experts},
            "base": None if family.base is None else str(family.base.root),
            "weights": initial.as_dict(),
            **{key: value for key, value in initial.describe().items() if key == "groups"},
            "device_cache": spec.device_cache,
            "host_cache": spec.host_cache,
        },
        "worker_extension_cls": WORKER_EXTENSION,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "max_model_len": spec.max_model_len,
        "seed": spec.seed,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # A checkpoint's generation_config.json must not change greedy decoding; its end tokens are given explicitly.
        "generation_config": "vllm",
        **spec.options,
    }


def _exit(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
