"""Many vLLM engines, two at a time: `python -m tests.serve.many_engines TASK.json DIRECTORY`.

An import of vLLM costs more than a start on a tiny model, and the clean-up after one more still. So vLLM is
imported once, and every engine runs in a fork that simply ends. What a case found, or its error, goes to
DIRECTORY/NAME.json when it is done, and what was printed to NAME.log; a case that crashes costs itself alone.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.serve.tiny_models import MAX_POSITIONS

CASE_LIMIT_S = 240
MAX_TOKENS = 8
PROMPTS = ("the cat 12", "a", "x = 3 + 4;", "def f(x): return", "<s>begin the end")
# Longer than a cache block: a prefix cache that outlives a swap shows.
LONG_PROMPT = "the cat 12 in the hat " * 10
PAIRS = (("the cat", " sat in the hat"), ("", "the end"), ("1 + 1 =", " 2"), (LONG_PROMPT, "w the in er 12"))
KV_CACHE_BYTES = 64 << 20
PRELOADED = (
    "compressed_tensors.quantization",
    "mergemix.serve.tokens",
    "mergemix.serve.vllm_host",
    "mergemix.serve.vllm_worker",
    "transformers.models.auto.modeling_auto",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models.transformers",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.mla.cpu_mla",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.sample.rejection_sampler",
    "vllm.v1.worker.cpu_worker",
)
_KEPT: list[object] = []  # engines that go with the process, since vLLM takes long to let go of one


@contextmanager
def as_engine_errors() -> Iterator[None]:
    """What the host raises, as a parent would get it."""
    from mergemix.errors import EngineError, MergeMixError
    from mergemix.serve.vllm_host import describe_error

    try:
        yield
    except MergeMixError:
        raise
    except Exception as error:
        raise EngineError(describe_error(error)) from error


class LocalProcess:
    """In place of the engine's own process: the same host, called here."""

    def __init__(self, log: object) -> None:
        from mergemix.serve.vllm_host import Host

        self.host: Any = Host()

    def call(self, method: str, *arguments: object) -> Any:
        with as_engine_errors():
            return getattr(self.host, method)(*arguments)

    def stream(self, method: str, *arguments: object) -> Generator[Any, None, Any]:
        parts = getattr(self.host, method)(*arguments)
        while True:
            with as_engine_errors():
                try:
                    part = next(parts)
                except StopIteration as end:
                    return end.value
            yield from part

    def note_memory(self) -> None:
        """What is not killed removes it itself."""

    def stop(self) -> None:
        """Let vLLM go, so that this process can start another engine."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        llm, self.host = self.host and self.host._llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def answers(
    engine: Any,
    prompts: Sequence[str] = (*PROMPTS, LONG_PROMPT),
    pairs: Sequence[tuple[str, str]] = PAIRS,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, list[Any]]:
    """Texts of the prompts, and log-probabilities of the pairs; `engine` has `submit`."""
    from mergemix.serve.engine import Generate, LogLikelihood

    texts = engine.submit([Generate(prompt, max_tokens) for prompt in prompts])
    logprobs = engine.submit([LogLikelihood(*pair) for pair in pairs])
    return {"texts": [each.text for each in texts], "logprobs": [each.logprob for each in logprobs]}


def plain(root: str, options: Mapping[str, Any], **asked: Any) -> dict[str, Any]:
    """What plain vLLM answers with the checkpoint at `root`. asked: see `answers`."""
    from vllm import LLM

    from mergemix.serve.tokens import RequestEncoder, end_tokens, load_tokenizer
    from mergemix.serve.vllm_host import Host

    tokenizer = load_tokenizer(Path(root))
    host: Any = Host()
    host._ends = list(end_tokens(Path(root), tokenizer))
    host._encoder = RequestEncoder(tokenizer, MAX_POSITIONS)
    host._llm = LLM(
        model=root, max_model_len=MAX_POSITIONS, generation_config="vllm", enforce_eager=True, **options
    )
    _KEPT.append(host)
    return {"answers": answers(host, **asked)}


def live(
    base: str,
    experts: Mapping[str, str],
    mixtures: Sequence[str],
    order: Sequence[int],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What the engine that a user gets answers after each swap, and what it says of itself.

    mixtures: keys. order: which of them the engine is swapped to in turn, from the uniform mixture.
    """
    from mergemix.checkpoints.family import open_family
    from mergemix.mixture import Mixture
    from mergemix.serve import open_engine, vllm_engine
    from mergemix.serve.engine import EngineSpec

    vllm_engine.EngineProcess = LocalProcess  # type: ignore[assignment, misc]
    family = open_family(base, dict(experts))
    options = dict(options)
    ranks = options.pop("tensor_parallel_size", 1)
    spec = EngineSpec(
        family, "vllm", max_model_len=MAX_POSITIONS, tensor_parallel_size=ranks, options=options
    )
    heard = io.StringIO()
    logging.getLogger("mergemix").addHandler(logging.StreamHandler(heard))
    engine: Any = open_engine(spec, Mixture.uniform(family.names))
    _KEPT.append(engine)
    found = []
    for index in order:
        engine.apply(Mixture.from_key(mixtures[index]))
        found.append(answers(engine))
    described = engine.describe() if hasattr(engine, "describe") else []
    return {"answers": found, "proven": engine.proven, "ranks": described, "warnings": heard.getvalue()}


def run_case(case: Mapping[str, Any], out: Path) -> None:
    """In a fork: write what the case finds, and end."""
    begin = time.perf_counter()
    os.environ.update(case["environment"])
    options = {"kv_cache_memory_bytes": KV_CACHE_BYTES, **case["options"]}
    try:
        role: Callable[..., dict[str, Any]] = {"plain": plain, "live": live}[case["role"]]
        found = role(**case["arguments"], options=options)
    except BaseException as error:
        traceback.print_exc()
        reasons = []
        cause: BaseException | None = error
        while cause is not None:
            reasons.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        found = {"error": "\n".join(reasons)}
    write(out, case["name"], found, begin)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def write(out: Path, name: str, found: Mapping[str, Any], begin: float) -> None:
    partial = out / f"{name}.partial"
    partial.write_text(
        json.dumps({**found, "seconds": time.perf_counter() - begin, "cpu": time.process_time()})
    )
    partial.replace(out / f"{name}.json")


def preload(architectures: Sequence[str]) -> None:
    """Import what every engine needs. Computes nothing: threads would not survive a fork."""
    import torch
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    from mergemix.serve import open_engine, vllm_engine  # noqa: F401

    torch.compiler.set_stance("force_eager")  # as the host does: compiled sampling gains nothing here
    for name in PRELOADED:
        importlib.import_module(name)
    # vLLM looks at a model's class in yet another process, for the sake of CUDA.
    registry._run_in_subprocess = lambda look: look()
    for name in architectures:
        registry.ModelRegistry._try_inspect_model_cls(name)
        registry.ModelRegistry._try_load_model_cls(name)
    load_general_plugins()
    current_platform.register_triton_kernel_overrides()
    # Once is enough, and later vLLM's search through all modules would meet those that break it.
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore
    # Workers of several ranks are forked likewise; vLLM would start them from nothing.
    executor = importlib.import_module("vllm.v1.executor.multiproc_executor")
    executor.get_mp_context = lambda: multiprocessing.get_context("fork")  # type: ignore[attr-defined]
    gc.freeze()


class Jobs:
    """Forks, as many at a time as there are cores, but at most two."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._cores = sorted(os.sched_getaffinity(0))[:2]
        self._running: dict[int, tuple[Mapping[str, Any], float]] = {}

    def start(self, case: Mapping[str, Any]) -> None:
        ranks = case["options"].get("tensor_parallel_size", 1)
        while len(self._running) >= (2 if ranks == 1 and len(self._cores) > 1 else 1):
            self.wait_for_one()
        pid = os.fork()
        if pid:
            self._running[pid] = case, time.perf_counter()
            return
        signal.alarm(CASE_LIMIT_S)
        log = os.open(self._out / f"{case['name']}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ranks > 1:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{self._cores[0]}|{self._cores[-1]}"
        run_case(case, self._out)

    def wait_for_one(self) -> None:
        pid, status = os.wait()
        case, begin = self._running.pop(pid)
        if not (self._out / f"{case['name']}.json").exists():
            code = os.waitstatus_to_exitcode(status)
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            write(self._out, case["name"], {"error": f"the process died: {reason}"}, begin)

    def finish(self) -> None:
        while self._running:
            self.wait_for_one()


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM's core then runs in the fork itself
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    preload(task["architectures"])
    jobs = Jobs(out)
    for case in task["cases"]:
        jobs.start(case)
    jobs.finish()


if __name__ == "__main__":
    main()
