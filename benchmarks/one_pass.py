"""Many mixtures from one read of the experts, against a merge of its own for each."""

import filecmp
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.children import BenchmarkError, ChildRun, added, in_turn
from benchmarks.disk_job import Job
from benchmarks.merges import Rows, ratio_row, run_row, verdict
from benchmarks.models import weight_files
from benchmarks.storage import make_cold, remove

ONE_PASS, MANY_PASSES = "one pass", "a pass each"


def rotated_mixtures(names: Sequence[str], count: int) -> dict[str, dict[str, float]]:
    """`count` different mixtures that all read every expert."""
    mixtures = {}
    for number in range(count):
        parts = {name: 1 + number // len(names) + (k + number) % len(names) for k, name in enumerate(names)}
        mixtures[f"m{number}"] = {name: part / sum(parts.values()) for name, part in parts.items()}
    return mixtures


def differing_mixtures(job: Job, mixtures: Mapping[str, Mapping[str, float]], file: Path) -> list[str]:
    """The mixtures whose files from the one pass are not those from a pass of their own, bit for bit."""
    together, alone = job.scratch / "together", job.scratch / "alone"
    job.ours_many(together, file)
    different = []
    for name, weights in mixtures.items():
        job.ours(alone, weights)
        files = [path.name for path in weight_files([alone])]
        equal, *_ = filecmp.cmpfiles(alone, together / name, files, shallow=False)
        if not files or equal != files:
            different.append(name)
        remove(alone)
    remove(together)
    return different


def measure_many(job: Job, count: int, repeats: int) -> tuple[Rows, Rows]:
    """(rows, verdicts) of `count` mixtures in one pass and in a pass each, cold."""
    mixtures = rotated_mixtures(list(job.experts), count)
    file = job.scratch / "mixtures.jsonl"
    lines = [json.dumps({"name": name, "weights": weights}) for name, weights in mixtures.items()]
    file.write_text("\n".join(lines) + "\n")
    if different := differing_mixtures(job, mixtures, file):
        raise BenchmarkError(
            f"one pass and a pass each differ in {', '.join(different)}: nothing more was timed"
        )

    def each() -> ChildRun:
        return added([job.measured(make_cold, partial(job.ours, weights=w)) for w in mixtures.values()])

    runs = in_turn(
        {ONE_PASS: lambda: job.measured(make_cold, partial(job.ours_many, mixtures=file)), MANY_PASSES: each},
        repeats,
    )
    case = f"{count} mixtures, cold"
    moved = {ONE_PASS: job.read_bytes, MANY_PASSES: count * job.read_bytes}
    rows = [
        run_row(case, name, found, moved[name] + count * job.written_bytes) for name, found in runs.items()
    ]
    what = f"seconds, {ONE_PASS} / {MANY_PASSES}"
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    rows.append(ratio_row(case, what, seconds[ONE_PASS], seconds[MANY_PASSES]))
    return rows, [verdict(f"{case}: {what}", rows[-1]["median"], 1 / 3, at_least=False)]
