"""The process that vLLM runs in: `python -m mergemix.serve.vllm_host FD`, started by `VllmEngine`.

A process of its own keeps the caller's stdout, signals and threads out of vLLM's hands, and can be ended for sure. On
CPU with a single rank vLLM runs inside this very process, instead of in two more that would import everything again:
that makes a start three times as quick.

How the two talk on the socket FD is in `mergemix.serve.pipe`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mergemix.errors import EngineError, MergeMixError, PoisonedEngineError
from mergemix.serve.engine import Output, Request
from mergemix.serve.pipe import CANCEL, DONE, FAILED, ParentGoneError, send_parts
from mergemix.serve.tokens import RequestEncoder, end_tokens, load_tokenizer
from mergemix.serve.vllm_answers import Answers, Asked, Stream, ask_for

MEMORY_NODES = Path("/sys/devices/system/node")
PARENT_POLL_S = 0.5
RESET_ATTEMPTS = 20
RESET_PAUSE_S = 0.05
SHUTDOWN_S = 10.0


class Host:
    """The methods that the parent may call."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._remembered: dict[int, Asked] = {}

    def start(self, args: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM; returns its version and max_model_len. Raises EngineError with vLLM's reason."""
        from vllm import LLM, __version__
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu and fits_one_process(args):
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        root = Path(args["tokenizer"])
        tokenizer = load_tokenizer(root)
        self._ends = list(end_tokens(root, tokenizer))
        args = {"enforce_eager": on_cpu, **args}
        self._llm = LLM(**args)
        if on_cpu and args["enforce_eager"]:
            self.call_workers("mergemix_compile_nothing")
        max_model_len = self._llm.llm_engine.vllm_config.model_config.max_model_len
        self._encoder = RequestEncoder(tokenizer, max_model_len)
        return {"version": __version__, "max_model_len": max_model_len}

    def call_workers(self, method: str, *arguments: object) -> list[Any]:
        """What each rank's MergeWorker method returns."""
        return self._llm.collective_rpc(method, args=arguments)

    def swap(self, key: str, check: str) -> list[dict[str, Any]]:
        """See MergeWorker.mergemix_swap; one entry per rank. Then the prefix cache, which is of the old weights, is
        dropped. Whatever is raised, the engine must not be used any more.
        """
        reports = self.call_workers("mergemix_swap", key, check)
        self.reset_prefix_cache()
        return reports

    def reset_prefix_cache(self) -> None:
        """Raises PoisonedEngineError when vLLM does not do it."""
        for _ in range(RESET_ATTEMPTS):
            if self._llm.reset_prefix_cache() is True:
                return
            time.sleep(RESET_PAUSE_S)
        raise PoisonedEngineError(
            "vLLM would not reset its prefix cache, which holds the old weights' results"
        )

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        """All requests as one batch, answered in their order. Raises ConfigError for one that cannot fit."""
        outputs = dict(output for part in self._answers.stream(self._encoded(requests)) for output in part)
        return [outputs[index] for index in range(len(requests))]

    def stream(self, forget: bool, new: Mapping[int, Request], numbers: Sequence[int]) -> Stream:
        """The requests of these numbers as one batch: (index, output) of those that each step of vLLM finished.

        new: requests to be remembered by number. forget: all others first. Returns the seconds spent inside vLLM.
        Raises ConfigError for a request that cannot fit; then none was asked.
        """
        return (yield from self._answers.stream(self._asked(forget, new, numbers)))

    def _asked(self, forget: bool, new: Mapping[int, Request], numbers: Sequence[int]) -> list[Asked]:
        if forget:
            self._remembered.clear()
        self._remembered |= dict(zip(new, self._encoded(new.values()), strict=True))
        return [self._remembered[number] for number in numbers]

    def _encoded(self, requests: Iterable[Request]) -> list[Asked]:
        return [ask_for(request, self._encoder, self._ends) for request in requests]

    @cached_property
    def _answers(self) -> Answers:
        return Answers(self._llm.llm_engine)

    def stop(self) -> None:
        """Free shared memory, and let vLLM end its other processes, where it has any."""
        if self._llm is not None:
            with suppress(Exception):  # a worker that is gone holds nothing any more
                self.call_workers("mergemix_close")
        if self._llm is not None and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            self._llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)


def fits_one_process(args: dict[str, Any]) -> bool:
    """Whether vLLM needs no worker process: one rank, and no threads to be bound to cores or memory nodes."""
    ranks = [args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
    bound = "VLLM_CPU_OMP_THREADS_BIND" in os.environ or len([*MEMORY_NODES.glob("node[0-9]*")]) > 1
    return ranks == [1, 1, 1] and not bound and not args.get("distributed_executor_backend")


def serve(connection: Connection, host: Any) -> None:
    """Answer calls until the connection closes or `stop` was answered."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message == CANCEL:  # of what has ended by itself
            continue
        method, arguments = message
        answer: tuple[str, Any]
        try:
            result = getattr(host, method)(*arguments)
            answer = DONE, send_parts(connection, result) if isinstance(result, Generator) else result
        except ParentGoneError:
            return
        except MergeMixError as error:
            answer = FAILED, error
        except Exception as error:
            sys.stderr.write(f"{method} failed\n")
            sys.excepthook(type(error), error, error.__traceback__)
            answer = FAILED, EngineError(describe_error(error))
        connection.send(answer)
        if method == "stop":
            return


def describe_error(error: Exception) -> str:
    """What to tell a user: our own message as it is; else the exception's class and text."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MergeMixError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def end_with_parent(parent: int) -> None:
    """End this process and all that it started when the parent is gone, whatever vLLM is doing then."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="mergemix-parent-watch", daemon=True).start()


def open_connection(descriptor: int) -> Connection:
    """The socket to the parent. Children that vLLM forks do not keep it: the parent would not see this process die."""
    os.register_at_fork(after_in_child=lambda: os.close(descriptor))
    return Connection(descriptor)


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    serve(open_connection(int(sys.argv[1])), Host())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # there is nothing to save, and an interpreter with vLLM inside takes seconds to wind up


if __name__ == "__main__":
    main()
