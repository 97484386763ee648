"""One candidate as lm-evaluation-harness evaluates it, in a process of its own.

    python -m benchmarks.eval_peer CHECKPOINT TASKS MAX_MODEL_LEN OUT

lm-eval's own vLLM backend on a merged checkpoint, then `simple_evaluate` on the local tasks of the directory TASKS.
Writes what was answered to OUT, and prints one JSON object: the seconds until the backend stands, of simple_evaluate,
and of those the ones inside vLLM's `generate`.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.eval_items import CHOOSE, GENERATE


def answers(samples: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """By task, in the order of its items: the text, or which choice was the likeliest."""
    found: dict[str, list[Any]] = {}
    for name, rows in samples.items():
        rows = sorted(rows, key=lambda row: row["doc_id"])
        if name == GENERATE:
            found[name] = [row["filtered_resps"][0] for row in rows]
        else:
            logprobs = [[float(pair[0]) for pair in row["filtered_resps"]] for row in rows]
            found[name] = [
                row["doc"]["choices"][each.index(max(each))] for row, each in zip(rows, logprobs, strict=True)
            ]
    return found


def main() -> None:
    stdout = os.dup(1)  # vLLM prints on the real one
    os.dup2(2, 1)
    begin = time.perf_counter()
    checkpoint, tasks, max_model_len, out = sys.argv[1:]
    import torch
    import vllm
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    # lm-eval asks for the version of a distribution called vllm, which builds for CPUs are not.
    with patch(
        "importlib.metadata.version", lambda name: vllm.__version__ if name == "vllm" else version(name)
    ):
        from lm_eval.models.vllm_causallms import VLLM
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if on_cpu:  # as ours
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        torch.compiler.set_stance("force_eager")
    model = VLLM(
        pretrained=checkpoint,
        max_model_len=int(max_model_len),
        enforce_eager=on_cpu,
        generation_config="vllm",
    )
    started = time.perf_counter()
    generate, inside = model.model.generate, [0.0]

    def timed(*arguments: Any, **options: Any) -> Any:
        entered = time.perf_counter()
        try:
            return generate(*arguments, **options)
        finally:
            inside[0] += time.perf_counter() - entered

    model.model.generate = timed
    found = simple_evaluate(
        model=model,
        tasks=[GENERATE, CHOOSE],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        log_samples=True,
    )
    ended = time.perf_counter()
    Path(out).write_text(json.dumps(answers(found["samples"])))
    report = {"start_s": started - begin, "evaluate_s": ended - started, "generate_s": inside[0]}
    os.write(stdout, (json.dumps(report) + "\n").encode())
    os._exit(0)  # an interpreter with vLLM inside takes seconds to wind up


if __name__ == "__main__":
    main()
