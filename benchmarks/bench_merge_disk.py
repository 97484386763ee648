"""How long a merge from disk to disk takes, against what the disk allows and against mergekit.

    python -m benchmarks.bench_merge_disk [--shape 1b] [--experts 4] [--mergekit PATH] [--scratch DIR] [--out FILE]

Prints the roofline (cold and cached reads, writes, memory copy), tables, what must be shown and whether it was, and
one JSON line. Every run is a process of its own, started as users start it, and its wall time counts whole. Nothing is
timed unless our result equals the fp32 reference bit for bit, and mergekit's within bf16's error. The defaults need
30 GB of disk; --quick needs 5 GB, and says nothing about models of gigabytes.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import peer
from benchmarks.children import BenchmarkError, ChildRun, in_turn
from benchmarks.common import conditions, format_table, memory_copy, time_side_by_side, write_results
from benchmarks.disk_job import Job
from benchmarks.merges import (
    BF16_ROUNDOFF,
    RATIO_COLUMNS,
    RUN_COLUMNS,
    Rows,
    differing_tensors,
    ratio_row,
    roofline_lines,
    run_row,
    uneven_weights,
    verdict,
    verdict_lines,
)
from benchmarks.models import SHAPES, write_model
from benchmarks.one_pass import measure_many
from benchmarks.storage import (
    DISK_READ,
    DISK_WRITE,
    PAGE_CACHE_READ,
    READ_AND_WRITE,
    best_row,
    disk_rooflines,
    make_cold,
    make_warm,
    read_rate,
    read_rate_beside_write,
    remove,
    scratch_directory,
    storage_conditions,
)
from mergemix.mixture import Mixture

START_SHAPE = "test"  # of a merge that only starts
QUICK = {"shape": "small", "repeats": 3, "many_repeats": 1}
COPY_BYTES = 1 << 29
OURS, PEER = "mergemix merge", "mergekit linear"


def correctness_gate(job: Job) -> list[str]:
    """What is wrong with the results, in words."""
    failures = []
    out, experts = job.scratch / "gate", list(job.experts.values())
    weights = Mixture.of(list(job.experts), job.weights).weights
    job.ours(out)
    if wrong := differing_tensors(out, experts, weights):
        failures.append(f"{OURS}: {len(wrong)} tensors differ from the fp32 reference, {wrong[0]} among them")
    remove(out)
    if job.mergekit is not None:
        job.peers(out)
        # Roundings of K weights' products and sums, of the weights, their sum, the division by it, and the last.
        bound = (len(experts) + 4) * BF16_ROUNDOFF
        if wrong := differing_tensors(out, experts, weights, bound=bound):
            failures.append(
                f"{PEER}: {len(wrong)} tensors are off by more than bf16's error, {wrong[0]} among them"
            )
        remove(out)
    return failures


def rooflines(job: Job) -> Rows:
    """What bounds a merge here: reads, writes, and a copy of memory (read + written)."""
    rows = disk_rooflines(job.files, job.scratch, job.written_bytes)
    with memory_copy(COPY_BYTES) as copy:
        timing = time_side_by_side({"copy": copy}, repeats=5)["copy"]
    return [
        *rows,
        {"case": "roofline", "provider": "memory copy", "gb_per_s": COPY_BYTES / timing.median_s / 1e9},
    ]


def floors_s(job: Job, rows: Rows) -> dict[str, float]:
    """Seconds below which no merge can be, warm and cold: reads and writes overlapped, nothing else to do."""
    rate = {
        key: best_row(rows, key)["gb_per_s"] * 1e9 for key in (PAGE_CACHE_READ, DISK_WRITE, READ_AND_WRITE)
    }
    warm = max(job.read_bytes / rate[PAGE_CACHE_READ], job.written_bytes / rate[DISK_WRITE])
    return {"warm": warm, "cold": job.read_bytes / rate[READ_AND_WRITE]}


def alternate(job: Job, prepare: Callable[[Sequence[Path]], None], repeats: int) -> dict[str, list[ChildRun]]:
    """Runs of ours and, where it is there, of the peer, in turn."""
    calls = {OURS: partial(job.measured, prepare, job.ours)}
    if job.mergekit is not None:
        calls[PEER] = partial(job.measured, prepare, job.peers)
    return in_turn(calls, repeats)


def measure_start(job: Job, repeats: int) -> tuple[Rows, Rows]:
    """(rows, no verdicts) of the same commands with next to nothing to merge."""
    runs = alternate(job, make_warm, repeats)
    return [
        run_row("start", name, found, job.read_bytes + job.written_bytes) for name, found in runs.items()
    ], []


def measure_warm(job: Job, repeats: int) -> tuple[Rows, Rows]:
    """(rows, verdicts) of merges whose inputs are in the page cache."""
    runs = alternate(job, make_warm, repeats)
    moved = job.read_bytes + job.written_bytes
    rows = [run_row("warm", name, finished, moved) for name, finished in runs.items()]
    peak_mb, what, speedup = rows[0]["peak_rss_mb"], f"seconds, {PEER} / {OURS}", None
    if PEER in runs:
        seconds = {name: [run.seconds for run in finished] for name, finished in runs.items()}
        rows.append(ratio_row("warm", what, seconds[PEER], seconds[OURS]))
        speedup = rows[-1]["median"]
    return rows, [
        verdict(f"warm: {what}", speedup, 10, at_least=True),
        verdict("warm: peak resident MB, interpreter included", peak_mb, 600, at_least=False),
    ]


def measure_cold(job: Job, repeats: int, roofline: Rows, start_s: float) -> tuple[Rows, Rows]:
    """(rows, verdicts) of merges whose inputs are on the disk only, in turn with reading these alone, and with
    reading them while as much is written as a merge writes.

    The rate of a merge is that of its reads, though it computes, and writes to the same disk, besides.
    start_s: what the command takes before it merges anything.
    """
    readers, writers = (best_row(roofline, key)["threads"] for key in (DISK_READ, DISK_WRITE))

    def read_all() -> float:
        make_cold(job.files)
        return read_rate(job.files, readers)

    def read_and_write() -> float:
        make_cold(job.files)
        return read_rate_beside_write(job.files, readers, job.scratch, job.written_bytes, writers)

    ours = partial(job.measured, make_cold, job.ours)
    calls: dict[str, Callable[[], Any]] = {OURS: ours, DISK_READ: read_all, READ_AND_WRITE: read_and_write}
    found = in_turn(calls, repeats)
    runs = found[OURS]
    rows, verdicts = [run_row("cold", OURS, runs, job.read_bytes + job.written_bytes)], []
    for limit, (part, less_s) in itertools.product(
        (DISK_READ, READ_AND_WRITE), (("whole command", 0.0), ("less its start", start_s))
    ):
        what, share = f"share of: {limit}; {part}", None
        if all(run.seconds > less_s for run in runs):  # else the models are too small for this
            rates = [job.read_bytes / (run.seconds - less_s) for run in runs]
            rows.append(ratio_row("cold", what, rates, found[limit]))
            share = rows[-1]["median"]
        if limit == DISK_READ:
            verdicts.append(verdict(f"cold: {what}", share, 0.85, at_least=True))
    return rows, verdicts


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--mixtures", type=int, default=8, help="outputs of the one pass")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many-repeats", type=int, default=3, help="repeats of the many mixtures")
    parser.add_argument("--mergekit", type=Path, help="the command mergekit-yaml; without it: not measured")
    parser.add_argument("--scratch", type=Path, help="where to put the models, on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help=f"small models: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    return options


def make_job(options: argparse.Namespace, scratch: Path, shape: str) -> Job:
    names = [f"e{k}" for k in range(options.experts)]
    experts = {
        name: write_model(scratch / f"{shape}-{name}", SHAPES[shape], seed) for seed, name in enumerate(names)
    }
    return Job(scratch, experts, uneven_weights(names), options.memory, options.mergekit)


def measure(options: argparse.Namespace, scratch: Path) -> tuple[Rows, Rows, dict[str, float]]:
    """(rows, verdicts, floors in seconds), printed as they come."""
    job = make_job(options, scratch, options.shape)
    rows = rooflines(job)
    floors = floors_s(job, rows)
    print(roofline_lines(rows))
    print(", ".join(f"no merge of these files in less than {s:.2f} s {case}" for case, s in floors.items()))
    if failures := correctness_gate(job):
        raise BenchmarkError("\n  ".join(["wrong results, so nothing was timed:", *failures]))
    start = measure_start(make_job(options, scratch / "start", START_SHAPE), options.repeats)
    start_s = start[0][0]["median_s"]
    verdicts: Rows = []
    for part in (
        lambda: start,
        partial(measure_warm, job, options.repeats),
        partial(measure_cold, job, options.repeats, rows, start_s),
        partial(measure_many, job, options.mixtures, options.many_repeats),
    ):
        found, shown = part()
        print(format_table([row for row in found if "median_s" in row], RUN_COLUMNS), flush=True)
        rows, verdicts = rows + found, verdicts + shown
    print(format_table([row for row in rows if "median" in row], RATIO_COLUMNS))
    print(verdict_lines(verdicts))
    return rows, verdicts, floors


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    model_bytes = SHAPES[options.shape].nbytes
    try:
        with scratch_directory(
            options.scratch, (options.experts + options.mixtures + 2) * model_bytes
        ) as scratch:
            taken_under = conditions(["mergemix", "numpy", "numba", "torch", "safetensors"])
            taken_under |= storage_conditions(scratch) | {
                "shape": options.shape, "model_bytes": model_bytes, "experts": options.experts,
                "memory": options.memory, "mergekit": options.mergekit and peer.version(options.mergekit),
            }  # fmt: skip
            print(json.dumps(taken_under))
            rows, verdicts, floors = measure(options, scratch)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        write_results(options.out, rows + verdicts, taken_under | {"floor_s": floors})
    shown = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "merge_disk", "shape": options.shape, "floor_s": floors, "shown": shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
