"""A candidate's way to its first token without a live swap, in a process of its own.

    python -m benchmarks.swap_ways DIR < DIRS

Starts plain vLLM on the checkpoint DIR, then lets it reload every directory that it is told, a line each. Prints one
JSON object a line: seconds to the first token, and log-probabilities that show which weights answered.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mergemix.serve.engine import Generate, LogLikelihood
from mergemix.serve.tokens import RequestEncoder, end_tokens, load_tokenizer
from mergemix.serve.vllm_host import Host

MAX_MODEL_LEN = 256
FIRST_TOKEN = Generate("one + two =", 1)
PROBES = (
    LogLikelihood("a quick brown fox", " jumps over"),
    LogLikelihood("1 + 2 =", " 3"),
    LogLikelihood("water is", " wet and cold"),
)


def start(directory: str) -> Host:
    """A plain vLLM engine, as vLLM loads any checkpoint."""
    import torch
    from vllm import LLM
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        torch.compiler.set_stance("force_eager")
    host = Host()
    tokenizer = load_tokenizer(Path(directory))
    host._ends = list(end_tokens(Path(directory), tokenizer))
    host._llm = LLM(
        model=directory,
        enforce_eager=on_cpu,
        max_model_len=MAX_MODEL_LEN,
        disable_log_stats=True,
        enable_prefix_caching=True,
        generation_config="vllm",
    )
    host._encoder = RequestEncoder(tokenizer, MAX_MODEL_LEN)
    return host


def answers(host: Any) -> list[float]:
    return [answer.logprob for answer in host.submit(PROBES)]


def main() -> None:
    stdout = os.dup(1)  # vLLM prints on the real one
    os.dup2(2, 1)

    def report(**content: Any) -> None:
        os.write(stdout, (json.dumps(content) + "\n").encode())

    begin = time.perf_counter()
    host = start(sys.argv[1])
    started = time.perf_counter() - begin
    host.submit([FIRST_TOKEN])
    report(start_s=started, answers=answers(host))
    for line in sys.stdin:
        begin = time.perf_counter()
        # vLLM's own way to give a running engine other weights.
        host._llm.collective_rpc("reload_weights", kwargs={"weights_path": line.strip()})
        host._llm.reset_prefix_cache()
        reloaded = time.perf_counter() - begin
        host.submit([FIRST_TOKEN])
        report(reload_s=reloaded, seconds=time.perf_counter() - begin, answers=answers(host))
    host.stop()


if __name__ == "__main__":
    main()
