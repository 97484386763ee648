"""Measuring other processes: wall seconds, CPU seconds and peak resident memory of a command."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import REPOSITORY

Run = TypeVar("Run")

# A process of its own starts the command: Linux counts what the starting process holds at that moment into the
# peak (ru_maxrss) of the one that it starts, and this one has torch loaded.
LAUNCHER = """
import json, os, sys, time
report, *command = sys.argv[1:]
started = time.perf_counter()
child = os.posix_spawnp(command[0], command, os.environ)
_, status, used = os.wait4(child, 0)
found = {"seconds": time.perf_counter() - started, "cpu_s": used.ru_utime + used.ru_stime,
         "max_rss": used.ru_maxrss, "exit_code": os.waitstatus_to_exitcode(status)}
with open(report, "w") as file:
    json.dump(found, file)
"""
MAX_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class BenchmarkError(Exception):
    """A benchmark cannot be run, or what it runs failed."""


@dataclass(frozen=True)
class ChildRun:
    """One finished command. seconds: wall time from its start to its end. peak_rss_bytes: of the largest process
    of its tree, pages of mapped files included. reported: the JSON object on the last line of its output, if any.
    """

    seconds: float
    cpu_s: float
    peak_rss_bytes: int
    reported: dict[str, Any] = field(default_factory=dict)


def run_child(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> ChildRun:
    """Run `command` in the repository to its end. Raises BenchmarkError with what it said when it fails."""
    arguments = [str(part) for part in command]
    with tempfile.NamedTemporaryFile(mode="r", prefix="mergemix-bench-") as report:
        finished = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, report.name, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        text = report.read()
    found = json.loads(text) if text else {"exit_code": finished.returncode}
    if not text or found["exit_code"] != 0:
        said = (finished.stderr or finished.stdout).strip()[-2000:]
        raise BenchmarkError(f"exit code {found['exit_code']} of {' '.join(arguments)}:\n{said}")
    last = finished.stdout.strip().splitlines()[-1:] or [""]
    reported = json.loads(last[0]) if last[0].startswith("{") else {}
    return ChildRun(found["seconds"], found["cpu_s"], found["max_rss"] * MAX_RSS_UNIT, reported)


def merge(
    experts: Mapping[str, Path],
    out: Path,
    *,
    weights: Mapping[str, float] | None = None,
    mixtures: Path | None = None,
    base: Path | None = None,
    memory: str = "256MiB",
) -> ChildRun:
    """`mergemix merge` as users run it, in a process of its own."""
    command: list[str | Path] = [sys.executable, "-m", "mergemix", "merge", "--json", "--memory", memory]
    for name, path in experts.items():
        command += ["--experts", f"{name}={path}"]
    if weights is not None:
        command += ["--weights", ",".join(f"{name}={weight!r}" for name, weight in weights.items())]
    if mixtures is not None:
        command += ["--mixtures", mixtures]
    if base is not None:
        command += ["--base", base]
    return run_child([*command, "--out", out])


def added(runs: Sequence[ChildRun]) -> ChildRun:
    """Commands that do one job together, one after the other: times and byte counts add up, peaks do not."""
    numbers = [key for key, value in runs[0].reported.items() if isinstance(value, int | float)]
    reported = {key: sum(run.reported[key] for run in runs) for key in numbers if key != "peak_rss_bytes"}
    peak_rss_bytes = max(run.peak_rss_bytes for run in runs)
    return ChildRun(
        sum(run.seconds for run in runs), sum(run.cpu_s for run in runs), peak_rss_bytes, reported
    )


def in_turn(calls: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """Every call `repeats` times, one after the other, in the opposite order every second time."""
    results: dict[str, list[Run]] = {name: [] for name in calls}
    for number in range(repeats):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(calls[name]())
    return results
