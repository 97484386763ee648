"""What bench_kernel measures on a GPU only: a whole model in one launch, operands streamed from the host, tilings.

Without a GPU: what the kernel compiled ahead of time shows.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import Timing, time_side_by_side
from benchmarks.kernel_cases import DTYPES, poisoned_like, same_bits, uneven_weights
from benchmarks.models import SHAPES
from mergemix_kernels import ahead_of_time, reference
from mergemix_kernels.dispatch import Group, pieces
from mergemix_kernels.pinned import CudaLanes, Ring, StreamedSum
from mergemix_kernels.tiles import Tiling
from mergemix_kernels.weights import MAX_OUTPUTS

MODEL = SHAPES["16gb"]  # Llama 3 8B: 291 tensors
DEVICE = torch.device("cuda", 0)
STREAMED_BYTES = 1 << 29  # of each source on the host
STREAMED_SOURCES = 4
CHECKED_ELEMENTS = 1 << 24  # at a time
TUNED_LAYERS = 4
time_calls = partial(time_side_by_side, synchronize=torch.cuda.synchronize)


def as_row(
    what: str, provider: str, case: dict[str, Any], nbytes_moved: int, timing: Timing, copy_gb_per_s: float
) -> dict[str, Any]:
    """One long-form row. copy_gb_per_s: the rate of the copy that it is measured against."""
    row = {"kernel": what, "device": "cuda", "provider": provider} | case | {"bytes_moved": nbytes_moved}
    for quantile in ("median", "p20", "p80"):
        row[f"{quantile}_ms"] = 1e3 * getattr(timing, f"{quantile}_s")
    row["gb_per_s"] = nbytes_moved / timing.median_s / 1e9
    return row | {"share_of_roofline": row["gb_per_s"] / copy_gb_per_s}


def model_groups(sources: int, outputs: int, dtype: str, most_layers: int) -> tuple[list[Group], int]:
    """A Llama 3 8B's tensors, with at most so many layers and as many as fit; and how many layers those are.

    The sources are windows into one pool, each beginning elsewhere, because K whole models would not fit. No
    two tensors that are summed together share memory, and what is read again is so long after that no cache
    still holds it.
    """
    free = 0.9 * torch.cuda.mem_get_info(DEVICE)[0]
    for layers in range(most_layers, 0, -1):
        counts = [math.prod(shape) for shape in replace(MODEL, layers=layers).tensors().values()]
        places = list(itertools.accumulate((-(-count // 128) * 128 for count in counts), initial=0))
        window = max(counts)  # at least so far apart
        pool_elements = places[-1] + sources * window
        if (pool_elements + outputs * places[-1]) * DTYPES[dtype].itemsize <= free:
            break
    pool = torch.empty(pool_elements, dtype=DTYPES[dtype], device=DEVICE).normal_()
    merged = poisoned_like(pool[: places[-1]], outputs)
    groups: list[Group] = [
        (
            [pool[place + k * window :][:count] for k in range(sources)],
            [out[place : place + count] for out in merged],
        )
        for place, count in zip(places, counts, strict=False)
    ]
    return groups, layers


def measure_model(
    dtype: str,
    sources: int,
    outputs: int,
    roofline: float,
    repeats: int,
    *,
    tilings: Sequence[Tiling] = (),
    most_layers: int = MODEL.layers,
) -> list[dict[str, Any]]:
    """One launch over the whole tensor list, by each tiling (by default the one in use), timed in turn.

    Raises RuntimeError when a tensor is not bit-equal to the reference.
    """
    from mergemix_kernels.triton_kernels import GroupedWeightedSum, tiling_of

    groups, layers = model_groups(sources, outputs, dtype, most_layers)
    weights = uneven_weights(sources, outputs)
    elements = sum(outs[0].numel() for _, outs in groups)
    case = {"dtype": dtype, "sources": sources, "outputs": outputs, "elements": elements}
    case |= {"tensors": len(groups), "layers": layers}
    nbytes_moved = (sources + outputs) * elements * DTYPES[dtype].itemsize
    calls = {}
    for tiling in tilings or [tiling_of(DEVICE, outputs)]:
        calls[tiling] = partial(GroupedWeightedSum(groups, tiling), weights)
        for _, outs in groups:
            for out in outs:
                out.fill_(float("nan"))
        calls[tiling]()
        check_sums(groups, weights)
    timings = time_calls({str(tiling): call for tiling, call in calls.items()}, repeats=repeats)
    return [
        as_row("model", "triton", case | _as_columns(tiling), nbytes_moved, timings[str(tiling)], roofline)
        for tiling in calls
    ]


def _as_columns(tiling: Tiling) -> dict[str, Any]:
    return {"tile_elements": tiling.elements, "warps": tiling.warps, "programs": tiling.programs}


def check_sums(groups: Sequence[Group], weights: Sequence[Sequence[float]]) -> None:
    """RuntimeError unless every group holds what the reference gives."""
    for sources, outs in groups:
        for parts in pieces([*sources, *outs], CHECKED_ELEMENTS):
            for p, of_output in enumerate(weights):
                out = parts[len(sources) + p]
                expected = reference.weighted_sum(parts[: len(sources)], of_output)
                if not same_bits(out, expected.to(out.device)):
                    raise RuntimeError(
                        f"a sum of {len(sources)} {out.dtype} sources differs from the reference"
                    )


def measure_streamed(dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Pinned sources summed on the GPU, into results there or on the host, against a plain copy to the device.

    The bytes that count are those that cross from the host to the device.
    """
    count = STREAMED_BYTES // DTYPES[dtype].itemsize
    hosts = [
        torch.empty(count, dtype=DTYPES[dtype], pin_memory=True).normal_() for _ in range(STREAMED_SOURCES)
    ]
    target = torch.empty(count, dtype=DTYPES[dtype], device=DEVICE)
    outs = {
        "streamed": torch.empty_like(target),
        "streamed_and_back": torch.empty(count, dtype=DTYPES[dtype], pin_memory=True),
    }
    ring, weights = Ring(CudaLanes(DEVICE)), uneven_weights(STREAMED_SOURCES)

    def copy() -> None:
        for host in hosts:
            target.copy_(host, non_blocking=True)

    calls: dict[str, Any] = {"host_to_device_copy": copy}
    for name, out in outs.items():
        out.fill_(float("nan"))
        streamed = StreamedSum([(hosts, [out])], ring)
        streamed(weights)
        torch.cuda.synchronize()
        check_sums([(hosts, [out])], weights)
        calls[name] = partial(streamed, weights)
    timings = time_calls(calls, repeats=repeats)
    nbytes_moved = STREAMED_SOURCES * STREAMED_BYTES
    rate = nbytes_moved / timings["host_to_device_copy"].median_s / 1e9
    case = {"dtype": dtype, "sources": STREAMED_SOURCES, "outputs": 1, "elements": count}
    return [as_row("streamed", name, case, nbytes_moved, timing, rate) for name, timing in timings.items()]


def candidate_tilings() -> Iterator[Tiling]:
    """Those that give every thread 16 bytes of a source at least."""
    for elements, warps, programs in itertools.product(
        (1024, 2048, 4096, 8192), (2, 4, 8), (2, 4, 6, 8, 12, 16)
    ):
        if elements // 2 >= 32 * warps * 4 and warps * programs <= 64:
            yield Tiling(elements, warps, programs, "measured: bench_kernel --tune")


def tune(
    dtype: str, sources: Sequence[int], outputs: Sequence[int], roofline: float, repeats: int
) -> list[dict[str, Any]]:
    """Rows of every tiling for every K and P, best first within a P: by the least share of the roofline over K."""
    tilings = list(candidate_tilings())
    rows = []
    for p in outputs:
        by_source = [
            measure_model(dtype, k, p, roofline, repeats, tilings=tilings, most_layers=TUNED_LAYERS)
            for k in sources
        ]
        by_tiling = [
            [row | {"worst_share": min(row["share_of_roofline"] for row in alike)} for row in alike]
            for alike in zip(*by_source, strict=True)
        ]
        for alike in sorted(by_tiling, key=lambda alike: alike[0]["worst_share"], reverse=True):
            rows += alike
    return rows


def ahead_of_time_rows() -> list[dict[str, Any]]:
    """What machine code shows, for every GPU generation and number of outputs. Needs no GPU."""
    return [
        ahead_of_time.facts(capability, outputs)
        for capability in ahead_of_time.CAPABILITIES
        for outputs in range(1, MAX_OUTPUTS + 1)
    ]
