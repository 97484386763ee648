"""`mergemix demo`, whole, in its quick form and with the best engine installed here: the README's first command."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def mergemix(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "mergemix", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "stdout carries one JSON object and nothing else"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    summary = mergemix("demo", "--quick", f"--out={out}", "--budget=9")
    assert summary["engine"] == ("vllm" if importlib.util.find_spec("vllm") else "hf")
    assert summary["swaps"]["proven"] is True
    repeats = len(
        {tuple(summary["best"]["mixture"].values()), (0.2,) * 5}
    )  # best and uniform, for the noise floor
    assert summary["swaps"]["count"] == 9 + repeats
    assert summary["candidates"] == 9
    assert summary["failed"] == 0
    assert {"uniform", "base", "spam"} < set(summary["baselines"])
    assert set(summary["holdout"]["utility"]) == {"best", *summary["baselines"]}
    assert json.loads((out / "study" / "mixture.json").read_text())["best"] == summary["best"]

    # The same command finds everything made; the configuration it shows is one that `run` takes.
    assert mergemix("demo", "--quick", f"--out={out}", "--budget=9") == summary
    again = mergemix("run", f"--config={out / 'study.yaml'}", "--budget=9")
    assert again["best"] == summary["best"]
