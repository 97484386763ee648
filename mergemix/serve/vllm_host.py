"""The process that vLLM runs in: `python -m mergemix.serve.vllm_host FD`, started by `VllmEngine`.

A process of its own keeps the caller's stdout, signals and threads out of vLLM's hands, and can be ended for sure. On
CPU with a single rank vLLM runs inside this very process, instead of in two more that would import everything again:
that makes a start three times as quick.

It reads (method, arguments) and answers (ok, result or exception), both pickled, on the socket FD.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mergemix.errors import EngineError, MergeMixError, PoisonedEngineError
from mergemix.serve.engine import Generate, Generated, Likelihood, Output, Request

MEMORY_NODES = Path("/sys/devices/system/node")
PARENT_POLL_S = 0.5
RESET_ATTEMPTS = 20
RESET_PAUSE_S = 0.05
SHUTDOWN_S = 10.0


class Host:
    """The methods that the parent may call."""

    def __init__(self) -> None:
        self._llm: Any = None

    def start(self, args: dict[str, Any]) -> dict[str, Any]:
        """Start vLLM; returns its version and max_model_len. Raises EngineError with vLLM's reason."""
        from vllm import LLM, __version__
        from vllm.platforms import current_platform

        from mergemix.serve.tokens import RequestEncoder, end_tokens, load_tokenizer

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
        return self.answer(requests)

    def answer(self, requests: Sequence[Request], **options: Any) -> list[Output]:
        """As `submit`. options: passed to LLM.generate."""
        encoded = [self._encoder.encode(request) for request in requests]
        answers = self._llm.generate(
            [{"prompt_token_ids": list(each.ids)} for each in encoded],
            [self._sampling(request) for request in requests],
            use_tqdm=False,
            **options,
        )
        return [
            _generated(answer) if isinstance(request, Generate) else _likelihood(answer, each.num_scored)
            for request, each, answer in zip(requests, encoded, answers, strict=True)
        ]

    def stop(self) -> None:
        """Free shared memory, and let vLLM end its other processes, where it has any."""
        if self._llm is not None:
            with suppress(Exception):  # a worker that is gone holds nothing any more
                self.call_workers("mergemix_close")
        if self._llm is not None and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            self._llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)

    def _sampling(self, request: Request) -> Any:
        from vllm import SamplingParams

        if isinstance(request, Generate):
            return SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                stop=[stop for stop in request.stop if stop] or None,
                stop_token_ids=self._ends,
            )
        # The best token's logprob too, which tells a tie from a better token. vLLM must generate one token at least.
        return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)


def fits_one_process(args: dict[str, Any]) -> bool:
    """Whether vLLM needs no worker process: one rank, and no threads to be bound to cores or memory nodes."""
    ranks = [args.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline", "data")]
    bound = "VLLM_CPU_OMP_THREADS_BIND" in os.environ or len([*MEMORY_NODES.glob("node[0-9]*")]) > 1
    return ranks == [1, 1, 1] and not bound and not args.get("distributed_executor_backend")


def serve(connection: Connection, host: Any) -> None:
    """Answer calls until the connection closes or `stop` was answered."""
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(host, method)(*arguments)
        except MergeMixError as error:
            answer = False, error
        except Exception as error:
            sys.stderr.write(f"{method} failed\n")
            sys.excepthook(type(error), error, error.__traceback__)
            answer = False, EngineError(describe_error(error))
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


def _generated(answer: Any) -> Generated:
    completion = answer.outputs[0]
    return Generated(completion.text, len(completion.token_ids))


def _likelihood(answer: Any, num_scored: int) -> Likelihood:
    """The last `num_scored` tokens of the prompt. A token that ties with the most probable one counts as greedy."""
    ids = answer.prompt_token_ids
    total, greedy = 0.0, True
    for position in range(len(ids) - num_scored, len(ids)):
        known = answer.prompt_logprobs[position]
        logprob = known[ids[position]].logprob
        total += logprob
        greedy = greedy and logprob >= max(each.logprob for each in known.values())
    return Likelihood(total, num_scored, greedy)


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
