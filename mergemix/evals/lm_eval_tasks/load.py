"""From specs to benchmarks: finds lm-eval's tasks, loads their data, builds their requests once."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergemix.errors import BenchmarkError
from mergemix.evals.lm_eval_tasks.spec import LmEvalSpec

if TYPE_CHECKING:
    from mergemix.evals.lm_eval_tasks.task import LmEvalBenchmark


def load_lm_eval(
    spec: LmEvalSpec,
    include_paths: Sequence[Path],
    root: Path,
    max_model_len: int | None,
    engine: Literal["hf", "vllm"] = "vllm",
) -> list[LmEvalBenchmark]:
    """One benchmark for each leaf task of the spec's task, group or tag, in lm-eval's order.

    include_paths: directories with task YAMLs, which go before lm-eval's own. root: the checkpoint whose tokenizer and
    chat template are used. max_model_len: None takes the model's. engine: which will answer; texts that are longer than
    the model are cut into other windows for vLLM.
    Raises BenchmarkError when lm-eval is not installed, there is no such task, its data are not to be had, it is broken
    or it asks for what no engine does, and CheckpointError for a tokenizer that cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise BenchmarkError(
            f"{spec.source}: needs lm-evaluation-harness: pip install 'mergemix[lm-eval]', or give benchmark files of "
            "your own"
        )
    from mergemix.evals.lm_eval_tasks.adapter import EngineLM
    from mergemix.evals.lm_eval_tasks.build import built_tasks
    from mergemix.evals.lm_eval_tasks.task import LmEvalBenchmark

    for path in include_paths:
        if not path.is_dir():
            raise BenchmarkError(f"--include-path must be a directory with task YAMLs, but {path} is none")
    lm = EngineLM(root, engine, max_model_len)
    if spec.chat_template and not getattr(lm.tokenizer, "chat_template", None):
        raise BenchmarkError(
            f"{spec.source}: chat_template needs a tokenizer with a chat template, but that of {root} has none: leave "
            "it out, or take a base with one"
        )
    with built_tasks(spec, include_paths, lm) as (title, tasks):
        if spec.name is not None and len(tasks) > 1:
            raise BenchmarkError(
                f"{spec.source}: name is for a single task, but {spec.task} holds {len(tasks)}: leave it out"
            )
        named = replace(spec, capability=spec.capability or title)
        return [LmEvalBenchmark(task, named, lm) for task in tasks]
