"""How fast the weighted sum is, against what the memory allows and against what others do.

    python -m benchmarks.bench_kernel [--device cpu|cuda] [--sources 2,5,8] [--elements 65536,16777216] [--out FILE]

Prints the roofline (the best large memory copy), a table, and one JSON line. Shares of it above 1 are
arrays that fit in a cache. No figure is given for a kernel that is not bit-equal to the reference.
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
from mergemix_kernels import reference
from mergemix_kernels.dispatch import DTYPE_NAMES, GroupedWeightedSum
from mergemix_kernels.weights import MAX_SOURCES, active_weights

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WORDS = {2: torch.int16, 4: torch.int32}  # by bytes: what bit patterns are compared as
CHUNK_ELEMENTS = 1 << 20
LARGE_COPY_BYTES = 1 << 29
COLUMNS = ["device", "provider", "dtype", "sources", "elements", "median_ms", "p20_ms", "p80_ms"]
COLUMNS += ["gb_per_s", "share_of_roofline"]
COPY = "memory_copy"

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
    active, values = active_weights(weights, len(sources))
    (first, first_weight), *others = zip([sources[k] for k in active], values.tolist(), strict=True)

    def call() -> None:
        for begin in range(0, out.numel(), CHUNK_ELEMENTS):
            part = slice(begin, min(begin + CHUNK_ELEMENTS, out.numel()))
            count = part.stop - begin
            total[:count].copy_(first[part]).mul_(first_weight)
            for source, weight in others:
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


def awkward_sources(count: int, elements: int, dtype: str, device: str) -> list[torch.Tensor]:
    """Uniform bit patterns of finite numbers, huge ones among them, after an eighth of -0.0 and one of subnormals."""
    generator = torch.Generator().manual_seed(0)
    word = WORDS[DTYPES[dtype].itemsize]
    least_normal = torch.tensor(torch.finfo(DTYPES[dtype]).tiny, dtype=DTYPES[dtype]).view(word)
    eighth = -(-elements // 8)
    sources = []
    for _ in range(count):
        info = torch.iinfo(word)
        bits = torch.randint(info.min, info.max + 1, (elements,), generator=generator, dtype=word)
        bits[eighth : 2 * eighth] %= least_normal
        values = bits.view(DTYPES[dtype])
        values[:eighth] = -0.0
        sources.append(torch.where(values.isfinite(), values, -0.0).to(device))
    return sources


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    word = WORDS[left.itemsize]
    return torch.equal(left.view(word), right.view(word))


def uneven_weights(count: int) -> list[float]:
    return [2 * (k + 1) / (count * (count + 1)) for k in range(count)]


def correctness_gate(device: str) -> list[str]:
    """What is not bit-equal to the reference on this device, among those that promise to be."""
    failures = []
    for dtype in DTYPES:
        for count, elements in ((1, 1), (2, 4097), (3, 100_003), (5, CHUNK_ELEMENTS + 1), (MAX_SOURCES, 999)):
            for make in (random_sources, awkward_sources):
                sources = make(count, elements, dtype, device)
                for weights in (uneven_weights(count), [1.0] + [0.0] * (count - 1)):
                    expected = reference.weighted_sum(sources, weights)
                    for name in providers(device).keys() - {"stack_and_sum"}:
                        out = torch.full_like(expected, float("nan"))
                        providers(device)[name](sources, weights, out)()
                        if not same_bits(out, expected):
                            failures.append(f"{name} on {device}, {dtype}, {count} sources of {elements}")
    return failures


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


def as_row(device: str, provider: str, case: tuple[str, int, int], timing: Timing) -> dict[str, Any]:
    """One long-form row, without its share of the roofline, which is known at the end."""
    dtype, sources, elements = case
    nbytes_moved = (sources + 1) * elements * DTYPES[dtype].itemsize
    row: dict[str, Any] = {"kernel": "weighted_sum", "device": device, "provider": provider, "dtype": dtype}
    row |= {"sources": sources, "elements": elements, "bytes_moved": nbytes_moved}
    for quantile in ("median", "p20", "p80"):
        row[f"{quantile}_ms"] = 1e3 * getattr(timing, f"{quantile}_s")
    row["gb_per_s"] = nbytes_moved / timing.median_s / 1e9
    return row


def measure(device: str, case: tuple[str, int, int], repeats: int) -> list[dict[str, Any]]:
    """All providers and a copy of as many bytes, timed in turn on the same sources."""
    dtype, count, elements = case
    sources = random_sources(count, elements, dtype, device)
    out = torch.full_like(sources[0], float("nan"))
    nbytes_moved = (count + 1) * elements * out.element_size()
    others = {name: make(sources, uneven_weights(count), out) for name, make in providers(device).items()}
    with device_copy(device, nbytes_moved) as copy:
        calls = {COPY: copy, **others}
        timings = time_side_by_side(calls, repeats=repeats, synchronize=partial(synchronize, device))
    return [as_row(device, name, case, timing) for name, timing in timings.items()]


def roofline_gb_per_s(device: str, rows: Sequence[dict[str, Any]], repeats: int) -> float:
    """The best median of a copy too large for any cache: one of LARGE_COPY_BYTES, and those among `rows`."""
    with device_copy(device, LARGE_COPY_BYTES) as copy:
        calls = {COPY: copy}
        timing = time_side_by_side(calls, repeats=repeats, synchronize=partial(synchronize, device))[COPY]
    large = [row for row in rows if row["provider"] == COPY and row["bytes_moved"] >= LARGE_COPY_BYTES // 4]
    return max([LARGE_COPY_BYTES / timing.median_s / 1e9, *(row["gb_per_s"] for row in large)])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sources", type=numbers, default=[2, 5, 8], help="numbers of sources K")
    parser.add_argument("--elements", type=numbers, default=[1 << 16, 1 << 20, 1 << 24])
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["BF16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs an NVIDIA GPU that torch can use; torch sees none", file=sys.stderr)
        return 1
    taken_under = conditions(
        ["mergemix", "numpy", "numba", "torch", "triton"],
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
    )
    print(json.dumps(taken_under))
    if failures := correctness_gate(device):
        print("not bit-equal to the reference, so nothing was timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    cases = [(d, k, n) for d in options.dtypes for k in options.sources for n in options.elements]
    rows = [row for case in cases for row in measure(device, case, options.repeats)]
    roofline = roofline_gb_per_s(device, rows, options.repeats)
    for row in rows:
        row["share_of_roofline"] = row["gb_per_s"] / roofline
    print(f"roofline {device}: memory copy, read + written, {roofline:.1f} GB/s")
    print(format_table(rows, COLUMNS))
    if options.out:
        write_results(options.out, rows, taken_under | {"roofline_gb_per_s": {device: roofline}})
    largest = max(cases, key=lambda case: (case[2], case[1]))
    headline = [row for row in rows if (row["dtype"], row["sources"], row["elements"]) == largest]
    summary = {row["provider"]: [row["gb_per_s"], row["share_of_roofline"]] for row in headline}
    print(
        json.dumps(
            {"bench": "kernel", "case": largest, "roofline_gb_per_s": roofline, "largest_case": summary}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
