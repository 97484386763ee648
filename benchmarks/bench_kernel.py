"""How fast the weighted sums are, against what the memory allows and against what others do.

    python -m benchmarks.bench_kernel [--device cpu|cuda] [--sources 2,4,8,16] [--outputs 1,8]
                                      [--elements 65536,16777216] [--dtypes BF16,F32] [--out FILE]
    python -m benchmarks.bench_kernel --device cuda --tune [--out FILE]
    python -m benchmarks.bench_kernel --device cuda --ahead-of-time [--out FILE]

Prints the roofline (a large memory copy), a table, and one JSON line. On a GPU also a whole Llama 3 8B in one
launch, and operands streamed from pinned memory. Shares of the roofline above 1 are arrays that fit in a cache.
No figure is given for a kernel that is not bit-equal to the reference. --tune tries every tiling and names the
best; --ahead-of-time needs no GPU, measures nothing, and says what the machine code shows.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Timing, conditions, format_table, memory_copy, time_side_by_side, write_results
from benchmarks.kernel_cases import (
    DTYPES,
    correctness_gate,
    poisoned_like,
    providers,
    random_sources,
    uneven_weights,
)

LARGE_COPY_BYTES = 1 << 29
COLUMNS = ["kernel", "provider", "dtype", "sources", "outputs", "elements", "median_ms", "p20_ms", "p80_ms"]
COLUMNS += ["gb_per_s", "share_of_roofline"]
BEST = ["tile_elements", "warps", "programs", "worst_share"]
TUNED = ["dtype", "sources", "outputs", *BEST, "median_ms", "share_of_roofline"]
COPY = "memory_copy"
PACKAGES = ["mergemix", "numpy", "numba", "torch", "triton"]

Case = tuple[str, int, int, int]  # dtype, K, P, elements


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def device_copy(device: str, nbytes_moved: int) -> Iterator[Callable[[], object]]:
    """A call that copies memory on the device: reads `nbytes_moved` / 2 bytes and writes as many."""
    if device == "cpu":
        with memory_copy(nbytes_moved) as copy:
            yield copy
    else:
        source = torch.ones(nbytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        yield lambda: target.copy_(source)


def roofline_gb_per_s(device: str, repeats: int) -> float:
    """The median of a copy too large for any cache."""
    with device_copy(device, LARGE_COPY_BYTES) as copy:
        wait = partial(synchronize, device)
        timing = time_side_by_side({COPY: copy}, repeats=repeats, synchronize=wait)[COPY]
    return LARGE_COPY_BYTES / timing.median_s / 1e9


def as_row(
    device: str, provider: str, case: Case, timing: Timing, roofline: float, copy: Timing
) -> dict[str, Any]:
    """One long-form row. copy: of as many bytes as the kernel has to move, timed in turn with it."""
    dtype, sources, outputs, elements = case
    nbytes_moved = (sources + outputs) * elements * DTYPES[dtype].itemsize
    row: dict[str, Any] = {"kernel": "weighted_sum", "device": device, "provider": provider, "dtype": dtype}
    row |= {"sources": sources, "outputs": outputs, "elements": elements, "bytes_moved": nbytes_moved}
    for quantile in ("median", "p20", "p80"):
        row[f"{quantile}_ms"] = 1e3 * getattr(timing, f"{quantile}_s")
    row["gb_per_s"] = nbytes_moved / timing.median_s / 1e9
    row["share_of_roofline"] = row["gb_per_s"] / roofline
    return row | {"share_of_copy": copy.median_s / timing.median_s}


def measure(device: str, case: Case, roofline: float, repeats: int) -> list[dict[str, Any]]:
    """All providers and a copy of as many bytes, timed in turn on the same sources."""
    dtype, count, outputs, elements = case
    sources = random_sources(count, elements, dtype, device)
    outs, weights = poisoned_like(sources[0], outputs), uneven_weights(count, outputs)
    with device_copy(device, (count + outputs) * elements * DTYPES[dtype].itemsize) as copy:
        calls = {
            COPY: copy,
            **{name: make(sources, weights, outs) for name, make in providers(device, outputs).items()},
        }
        timings = time_side_by_side(calls, repeats=repeats, synchronize=partial(synchronize, device))
    return [as_row(device, name, case, timing, roofline, timings[COPY]) for name, timing in timings.items()]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sources", type=numbers, default=[2, 4, 8, 16], help="numbers of sources K")
    parser.add_argument("--outputs", type=numbers, default=[1, 8], help="numbers of outputs P")
    parser.add_argument("--elements", type=numbers, default=[1 << 16, 1 << 20, 1 << 24])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["BF16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    parser.add_argument("--tune", action="store_true", help="try every tiling of a whole model on this GPU")
    parser.add_argument(
        "--ahead-of-time", action="store_true", help="what the machine code shows; needs no GPU"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and (options.tune or options.ahead_of_time):
        parser.error("--tune and --ahead-of-time are for --device cuda")
    return options


def ahead_of_time(options: argparse.Namespace) -> int:
    """Write down that nothing was measured, and what can be known all the same."""
    from benchmarks.kernel_gpu import ahead_of_time_rows

    reason = "no GPU at hand: `--device cuda` measures on one; these are facts of the machine code"
    rows = ahead_of_time_rows()
    print(format_table(rows, list(rows[0])))
    if options.out:
        write_results(options.out, rows, conditions(PACKAGES) | {"measured": False, "reason": reason})
    print(json.dumps({"bench": "kernel", "device": "cuda", "measured": False, "reason": reason}))
    return 0


def measure_all(options: argparse.Namespace, roofline: float) -> list[dict[str, Any]]:
    if options.tune:
        from benchmarks import kernel_gpu

        rows = []
        for dtype in options.dtypes:
            rows += kernel_gpu.tune(dtype, options.sources, options.outputs, roofline, options.repeats)
        return rows
    cases = [
        (dtype, k, p, n)
        for dtype in options.dtypes
        for p in options.outputs
        for k in options.sources
        for n in options.elements
    ]
    rows = [row for case in cases for row in measure(options.device, case, roofline, options.repeats)]
    if options.device == "cuda":
        from benchmarks import kernel_gpu

        for dtype in options.dtypes:
            for p in options.outputs:
                for k in options.sources:
                    rows += kernel_gpu.measure_model(dtype, k, p, roofline, options.repeats)
            rows += kernel_gpu.measure_streamed(dtype, options.repeats)
    return rows


def summary(options: argparse.Namespace, rows: Sequence[dict[str, Any]], roofline: float) -> dict[str, Any]:
    """The last line: of every K and P the largest case of ours, and what a tuning found best."""
    line: dict[str, Any] = {"bench": "kernel", "device": options.device, "roofline_gb_per_s": roofline}
    if options.tune:
        best = {row["outputs"]: {name: row[name] for name in BEST} for row in reversed(rows)}
        return line | {"best_tiling": best}
    ours = [row for row in rows if row["provider"] in ("numba", "triton", "streamed", "streamed_and_back")]
    largest = {
        (row["kernel"], row["provider"], row["dtype"], row["sources"], row["outputs"]): row for row in ours
    }
    columns = ("kernel", "provider", "dtype", "sources", "outputs", "elements", "gb_per_s")
    shares = ("share_of_roofline", "share_of_copy")
    return line | {
        "largest": [{name: row.get(name) for name in (*columns, *shares)} for row in largest.values()]
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.ahead_of_time:
        return ahead_of_time(options)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        need = "--device cuda needs an NVIDIA GPU that torch can use, and torch sees none"
        print(f"{need}; --ahead-of-time says what can be known without", file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    taken_under = conditions(PACKAGES, gpu=gpu)
    print(json.dumps(taken_under))
    roofline = roofline_gb_per_s(device, options.repeats)
    print(f"roofline {device}: memory copy, read + written, {roofline:.1f} GB/s", flush=True)
    if failures := correctness_gate(device):
        print("not bit-equal to the reference, so nothing was timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    rows = measure_all(options, roofline)
    print(format_table(rows, TUNED if options.tune else COLUMNS))
    if options.out:
        write_results(
            options.out, rows, taken_under | {"measured": True, "roofline_gb_per_s": {device: roofline}}
        )
    print(json.dumps(summary(options, rows, roofline)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
