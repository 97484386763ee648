"""How fast the weighted sum is, against what the memory allows and against what others do.

    python -m benchmarks.bench_kernel [--sources 2,5,8] [--elements 65536,16777216] [--out FILE]

Prints the roofline (a memory copy), a table, and one JSON line. No figure is given for a kernel that is
not bit-equal to the reference.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergemix_kernels import reference
from mergemix_kernels.dispatch import DTYPE_NAMES, GroupedWeightedSum

from benchmarks.common import Timing, conditions, format_table, memory_copy, time_side_by_side, write_results

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_ELEMENTS = 1 << 20
COLUMNS = ["device", "provider", "dtype", "sources", "elements", "median_ms", "p20_ms", "p80_ms"]
COLUMNS += ["gb_per_s", "share_of_roofline"]
ROOFLINE = "memory_copy"

Provider = Callable[[Sequence[torch.Tensor], Sequence[float], torch.Tensor], Callable[[], None]]


def stack_and_sum(
    sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor
) -> Callable[[], None]:
    """The incumbent's way: all sources stacked, weights and products in the sources' dtype. Not exact."""

    def call() -> None:
        stacked = torch.stack(list(sources))
        factors = torch.tensor(weights, dtype=out.dtype, device=out.device)
        out.copy_((stacked * factors.view(-1, *[1] * out.dim())).sum(0))

    return call


def torch_chunked(
    sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor
) -> Callable[[], None]:
    """The best that eager torch does: chunks small enough for the cache, accumulated in fp32 scratch."""
    total, product = (torch.empty(CHUNK_ELEMENTS, dtype=torch.float32, device=out.device) for _ in range(2))
    rounded = torch.tensor(weights, dtype=torch.float32).tolist()

    def call() -> None:
        for begin in range(0, out.numel(), CHUNK_ELEMENTS):
            part = slice(begin, min(begin + CHUNK_ELEMENTS, out.numel()))
            count = part.stop - begin
            torch.mul(total[:count].copy_(sources[0][part]), rounded[0], out=total[:count])
            for source, weight in zip(sources[1:], rounded[1:], strict=True):
                total[:count].add_(product[:count].copy_(source[part]).mul_(weight))
            out[part] = total[:count]

    return call


def ours(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> Callable[[], None]:
    grouped = GroupedWeightedSum([(sources, out)])
    return lambda: grouped(weights)


def providers(device: str) -> dict[str, Provider]:
    """By name; ours is "numba" on a CPU and "triton" on a GPU."""
    others: dict[str, Provider] = {"stack_and_sum": stack_and_sum, "torch_chunked": torch_chunked}
    return others | {"numba" if device == "cpu" else "triton": ours}


def random_sources(count: int, elements: int, dtype: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(elements, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(count)]


def uneven_weights(count: int) -> list[float]:
    return [2 * (k + 1) / (count * (count + 1)) for k in range(count)]


def correctness_gate(device: str) -> list[str]:
    """What is not bit-equal to the reference on this device, among those that promise to be."""
    failures = []
    for dtype in DTYPES:
        for count, elements in ((1, 1), (2, 4097), (3, 100_003), (5, CHUNK_ELEMENTS + 1), (64, 999)):
            sources = random_sources(count, elements, dtype, device)
            for weights in (uneven_weights(count), [1.0] + [0.0] * (count - 1)):
                expected = reference.weighted_sum(sources, weights)
                for name in providers(device).keys() - {"stack_and_sum"}:
                    out = torch.full_like(expected, float("nan"))
                    providers(device)[name](sources, weights, out)()
                    if not torch.equal(out, expected):
                        failures.append(f"{name} on {device}, {dtype}, {count} sources of {elements}")
    return failures


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_roofline(device: str, nbytes_moved: int) -> Callable[[], None]:
    if device == "cpu":
        return memory_copy(nbytes_moved)
    source = torch.ones(nbytes_moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return copy


def as_row(device: str, provider: str, case: tuple[str, int, int], timing: Timing | None) -> dict[str, Any]:
    """One long-form row; figures of a case that was not measured are None."""
    dtype, sources, elements = case
    nbytes_moved = (sources + 1) * elements * DTYPES[dtype].itemsize
    row: dict[str, Any] = {"kernel": "weighted_sum", "device": device, "provider": provider, "dtype": dtype}
    row |= {"sources": sources, "elements": elements, "bytes_moved": nbytes_moved}
    for quantile in ("median", "p20", "p80"):
        row[f"{quantile}_ms"] = 1e3 * getattr(timing, f"{quantile}_s") if timing else None
    row["gb_per_s"] = nbytes_moved / timing.median_s / 1e9 if timing else None
    row["share_of_roofline"] = None
    return row


def measure(device: str, case: tuple[str, int, int], repeats: int) -> list[dict[str, Any]]:
    """All providers and a copy of as many bytes, timed in turn on the same sources."""
    dtype, count, elements = case
    sources = random_sources(count, elements, dtype, device)
    out = torch.full_like(sources[0], float("nan"))
    nbytes_moved = (count + 1) * elements * out.element_size()
    calls = {ROOFLINE: copy_roofline(device, nbytes_moved)}
    calls |= {name: make(sources, uneven_weights(count), out) for name, make in providers(device).items()}
    timings = time_side_by_side(calls, repeats=repeats, synchronize=partial(synchronize, device))
    rows = [as_row(device, name, case, timing) for name, timing in timings.items()]
    for row in rows:
        row["share_of_roofline"] = row["gb_per_s"] / rows[0]["gb_per_s"]
    return rows


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sources", type=numbers, default=[2, 5, 8], help="numbers of sources K")
    parser.add_argument("--elements", type=numbers, default=[1 << 16, 1 << 20, 1 << 24])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["BF16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    taken_under = conditions(
        ["mergemix", "numpy", "numba", "torch", "triton"],
        gpu=torch.cuda.get_device_name() if "cuda" in devices else None,
    )
    print(json.dumps(taken_under))
    failures = [failure for device in devices for failure in correctness_gate(device)]
    if failures:
        print("not bit-equal to the reference, so nothing was timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    roofline: dict[str, float | None] = {"cpu": None, "cuda": None}
    for device in devices:
        copy = {ROOFLINE: copy_roofline(device, 1 << 29)}
        timing = time_side_by_side(copy, repeats=options.repeats, synchronize=partial(synchronize, device))
        roofline[device] = (1 << 29) / timing[ROOFLINE].median_s / 1e9
        print(f"roofline {device}: memory copy, read + written, {roofline[device]:.1f} GB/s", flush=True)

    cases = [(d, k, n) for d in options.dtypes for k in options.sources for n in options.elements]
    rows = [row for device in devices for case in cases for row in measure(device, case, options.repeats)]
    if "cuda" not in devices:
        rows += [as_row("cuda", "triton", case, None) for case in cases]
    print(format_table(rows, COLUMNS))
    if options.out:
        write_results(options.out, rows, taken_under | {"roofline_gb_per_s": roofline})
    largest = max(cases, key=lambda case: (case[2], case[1]))
    headline = {
        row["provider"]: row for row in rows if (row["dtype"], row["sources"], row["elements"]) == largest
    }
    summary = {name: [row["gb_per_s"], row["share_of_roofline"]] for name, row in headline.items()}
    print(
        json.dumps(
            {"bench": "kernel", "case": largest, "roofline_gb_per_s": roofline, "largest_case": summary}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
