"""What every benchmark needs: conditions, timing of calls side by side, the roofline, tables and results."""

import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mergemix_kernels.cpu import thread_count

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one call: the median and the 20th and 80th percentiles of the repeats."""

    median_s: float
    p20_s: float
    p80_s: float


def time_side_by_side(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every call `repeats` times in turn, after one untimed round.

    In turn, because the machine is rarely ours alone: what slows one round down slows all calls down, and
    ratios between them survive. `synchronize` waits for work that a call only started (a GPU's).
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - started)
    quantiles = {name: np.quantile(values, [0.5, 0.2, 0.8]).tolist() for name, values in seconds.items()}
    return {name: Timing(*values) for name, values in quantiles.items()}


def timing_of(seconds: Sequence[float]) -> Timing:
    """What repeats that were timed elsewhere come to."""
    return Timing(*np.quantile(seconds, [0.5, 0.2, 0.8]).tolist())


@contextmanager
def memory_copy(nbytes_moved: int) -> Iterator[Callable[[], None]]:
    """A call that copies memory on all threads of this process: the roofline of streaming kernels on a CPU.

    It reads `nbytes_moved` / 2 bytes and writes as many.
    """
    source = np.ones(nbytes_moved // 2, np.uint8)
    target = np.zeros_like(source)
    threads = thread_count()
    bounds = [source.size * i // threads for i in range(threads + 1)]
    ranges = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda part: np.copyto(target[part], source[part]), ranges))

        yield copy


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or None


def _commit() -> str | None:
    """The commit that was measured, marked when the tree differs from it; None where git does not know."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return finished.stdout.strip() or None


def conditions(packages: Sequence[str], gpu: str | None = None) -> dict[str, Any]:
    """Under which conditions figures were taken. What is unknown or absent is None."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": thread_count(),
        "gpu": gpu,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": _commit(),
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(columns), *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines
    )


def write_results(path: Path, rows: Sequence[Mapping[str, Any]], taken_under: Mapping[str, Any]) -> None:
    """Write long-form rows beside the conditions they were taken under, as JSON with one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"conditions": {json.dumps(taken_under)},\n "rows": [\n{body}\n]}}\n')
