"""The vLLM engine: real vLLM in processes of its own, its parameters rewritten in place for every mixture."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import psutil

from mergemix.errors import ConfigError, EngineError, PoisonedEngineError
from mergemix.mixture import Mixture
from mergemix.serve.engine import (
    Engine,
    EngineSpec,
    Generate,
    Generated,
    Likelihood,
    LogLikelihood,
    Output,
    Request,
    Swap,
)
from mergemix.serve.engine_log import EngineLog
from mergemix.serve.operands import coefficients
from mergemix.serve.tokens import RequestEncoder, end_tokens, load_tokenizer
from mergemix.serve.vllm_plugin import LOAD_FORMAT

WORKER_EXTENSION = "mergemix.serve.vllm_worker.MergeWorker"
CPU_KVCACHE_GIB = "1"
RESET_ATTEMPTS = 20
RESET_PAUSE_S = 0.05
SHUTDOWN_S = 15.0


class VllmEngine(Engine):
    """vLLM with `load_format="mergemix"`: the first load is the initial mixture, swaps replay it.

    Requests that do not fit lose tokens on the left, as `RequestEncoder` says. An engine whose processes died, or
    whose swap failed at any point, is poisoned.
    """

    kind = "vllm"

    def __init__(self, spec: EngineSpec, initial: Mixture) -> None:
        """Start vLLM on `initial`.

        Raises ConfigError for a mixture that the family cannot give, EngineError with vLLM's own reason when it
        does not start; no process is then left.
        """
        coefficients(spec.family, initial)
        self._family = spec.family
        self._closed = False
        root = spec.family.template.root
        self._tokenizer = load_tokenizer(root)
        self._ends = list(end_tokens(root, self._tokenizer))
        self._log = EngineLog(spec.log)
        self._llm, self._processes = _start(spec, initial, self._log)
        max_model_len = self._llm.llm_engine.vllm_config.model_config.max_model_len
        self._encoder = RequestEncoder(self._tokenizer, max_model_len)

    def apply(self, mixture: Mixture) -> Swap:
        begin = time.perf_counter()
        reports = self._swap(mixture, "none")
        written = sum(report["bytes_written"] for report in reports)
        return Swap(time.perf_counter() - begin, written)

    def apply_checked(self, mixture: Mixture, *, thorough: bool) -> list[str]:
        """As `apply`; then what of the swap did not work on any rank, empty when all is well.

        Destinations are compared bit for bit with the fp32 reference (all of them, or a sample of each unless
        `thorough`), and every module that vLLM transforms after loading must have been transformed anew.
        """
        reports = self._swap(mixture, "all" if thorough else "sample")
        return [problem for report in reports for problem in report["problems"]]

    def describe(self) -> list[dict[str, Any]]:
        """What a swap does on each rank, and why it would be wrong; see MergeWorker.mergemix_describe."""
        self._check_usable()
        return self._call("mergemix_describe")

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        self._check_usable()
        if not requests:
            return []
        from vllm import SamplingParams

        encoded = [self._encoder.encode(request) for request in requests]
        params = [_sampling(SamplingParams, request, self._ends) for request in requests]
        prompts = [{"prompt_token_ids": list(each.ids)} for each in encoded]
        try:
            answers = self._llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            raise self._failure("vLLM failed to answer", error) from error
        return [
            _generated(answer) if isinstance(request, Generate) else _likelihood(answer, each.num_scored)
            for request, each, answer in zip(requests, encoded, answers, strict=True)
        ]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _stop(self._llm, self._processes)
            self._log.close()

    def _swap(self, mixture: Mixture, check: str) -> list[dict[str, Any]]:
        self._check_usable()
        weights = coefficients(self._family, mixture)
        self.poisoned = True  # until all of it has worked
        try:
            reports = self._call("mergemix_swap", weights, check)
        except EngineError as error:
            raise PoisonedEngineError(f"the swap to {mixture} failed halfway: {error}") from error
        self._reset_prefix_cache()
        self.poisoned = False
        return reports

    def _reset_prefix_cache(self) -> None:
        """Cached attention of the old weights must not answer for the new ones."""
        for _ in range(RESET_ATTEMPTS):
            try:
                if self._llm.reset_prefix_cache() is True:
                    return
            except Exception as error:
                raise PoisonedEngineError(f"vLLM's prefix cache could not be reset: {error}") from error
            time.sleep(RESET_PAUSE_S)
        raise PoisonedEngineError("vLLM would not reset its prefix cache, which holds the old weights' results")

    def _call(self, method: str, *args: object) -> list[dict[str, Any]]:
        try:
            return self._llm.collective_rpc(method, args=args)
        except Exception as error:
            raise self._failure(f"{method} failed", error) from error

    def _failure(self, what: str, error: Exception) -> EngineError:
        dead = type(error).__name__ == "EngineDeadError" or not all(p.is_running() for p in self._processes)
        if not dead:
            return EngineError(f"{what}: {error}")
        self.poisoned = True
        return PoisonedEngineError(f"{what}: vLLM's engine died ({self._log.reason() or error})")

    def _check_usable(self) -> None:
        if self.poisoned:
            raise PoisonedEngineError("an earlier swap failed halfway, or vLLM died: this engine must be rebuilt")
        if self._closed:
            raise EngineError("this engine is closed")


def engine_args(spec: EngineSpec, initial: Mixture, *, on_cpu: bool) -> dict[str, Any]:
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
        },
        "worker_extension_cls": WORKER_EXTENSION,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "max_model_len": spec.max_model_len,
        "seed": spec.seed,
        "enforce_eager": on_cpu,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        # A checkpoint's generation_config.json must not change greedy decoding; its end tokens are given explicitly.
        "generation_config": "vllm",
        **spec.options,
    }


def _start(spec: EngineSpec, initial: Mixture, log: EngineLog) -> tuple[Any, list[psutil.Process]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KVCACHE_GIB)
    before = set(_children())
    try:
        with log.redirected():
            from vllm import LLM
            from vllm.platforms import current_platform

            llm = LLM(**engine_args(spec, initial, on_cpu=current_platform.is_cpu()))
            log.adopt_logger("vllm")
    except BaseException as error:
        _kill([process for process in _children() if process not in before])
        if isinstance(error, Exception):
            raise EngineError(f"vLLM did not start: {_reason(error, log)}") from error
        raise
    return llm, [process for process in _children() if process not in before]


def _reason(error: Exception, log: EngineLog) -> str:
    """What vLLM raised in this process, unless that only says that another process failed."""
    text = str(error).strip()
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return f"{text}: not an argument of this vLLM"
    said_elsewhere = not text or "See root cause" in text or "initialization failed" in text
    return (log.reason() if said_elsewhere else None) or text or type(error).__name__


def _stop(llm: Any, processes: Sequence[psutil.Process]) -> None:
    """Ask vLLM to stop, then see that every process of it is gone."""
    for process in processes[::-1]:  # workers first: the engine core waits for them
        if "resource_tracker" not in _command(process) and process.is_running():
            process.terminate()
    try:
        llm.llm_engine.engine_core.shutdown(timeout=SHUTDOWN_S)
    finally:
        _kill(processes)


def _kill(processes: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=0.5)
    for process in alive:
        if process.is_running():
            process.kill()
    psutil.wait_procs(alive, timeout=SHUTDOWN_S)


def _children() -> list[psutil.Process]:
    """All processes below this one, but the resource tracker that multiprocessing keeps for them."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "resource_tracker" not in _command(process)
    ]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _sampling(sampling_params: Any, request: Request, ends: list[int]) -> Any:
    if isinstance(request, Generate):
        return sampling_params(
            temperature=0.0,
            max_tokens=request.max_tokens,
            stop=[stop for stop in request.stop if stop] or None,
            stop_token_ids=ends,
        )
    # One token of logprobs beside the prompt's own, to tell ties from better tokens; vLLM must generate one token.
    return sampling_params(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)


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
