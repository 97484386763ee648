"""What a merge takes of this machine and how long, foretold before any of it is done; whether it fits at all."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.family import Family
from mergemix.checkpoints.files import FileIdentity
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.writer import check_output, index_json, shard_layout, side_files
from mergemix.errors import ConfigError, OutputError
from mergemix.merge import bandwidth
from mergemix.merge.bandwidth import Rate
from mergemix.merge.buffers import Buffers, divide_memory
from mergemix.merge.delta_cache import TIERS, aligned, assign_tiers
from mergemix.merge.plan import MergePlan, TensorTask, plan_merge
from mergemix.merge.request import MergeRequest
from mergemix.merge.resources import free_disk, free_memory, process_memory
from mergemix.mixture import Mixture
from mergemix.units import size_text
from mergemix_kernels.cpu import thread_count

SAMPLES, SAMPLE_BYTES = 8, 16 << 20  # of the inputs: longer than what systems read ahead
FREE_SHARE = 0.5  # of the free space, what the measurement of writing may take


@dataclass(frozen=True)
class Needs:
    """What the merge takes and what there is, in bytes. buffers: None when the memory given is too small.

    memory_free, disk_free: None where they are not known.
    """

    buffers: Buffers | None
    memory_free: int | None
    disk: int
    disk_free: int | None
    reasons: tuple[str, ...]


def check_fits(request: MergeRequest) -> None:
    """Raise ConfigError, saying what would fit, when the merge cannot be done; reads no byte of a tensor."""
    if reasons := assess(request).reasons:
        raise ConfigError("; ".join(reasons))


def assess(request: MergeRequest) -> Needs:
    """Compare what the merge takes with what there is. reasons: why it cannot be done; empty when it can."""
    reasons = []
    buffers = disk_free = None
    try:
        check_output(request.out)
    except OutputError as error:
        reasons.append(str(error))
    try:
        buffers = divide_memory(request.plan, request.memory_bytes)
    except ConfigError as error:
        reasons.append(str(error))
    memory_free = free_memory()
    if buffers is not None and memory_free is not None and buffers.total_bytes > memory_free:
        reasons.append(
            f"buffers of {size_text(buffers.total_bytes)} do not fit in the {size_text(memory_free)} of memory that "
            f"are free: use --memory {max(memory_free, 0) >> 20}MiB or less"
        )
    one = _output_bytes(request)
    disk = one * len(request.recipes)
    parent = Path(os.path.abspath(request.out)).parent
    if parent.is_dir():
        disk_free = free_disk(request.out)
        if disk > disk_free:
            reasons.append(
                f"{request.out} needs {size_text(disk)} on disk, but {size_text(disk_free)} are free"
                f"{_how_many(disk_free // one, request)}; free some space or give a directory on another disk"
            )
    return Needs(buffers, memory_free, disk, disk_free, tuple(reasons))


def _how_many(fitting: int, request: MergeRequest) -> str:
    return f": at most {fitting} of the {len(request.recipes)} mixtures fit" if request.many else ""


def _output_bytes(request: MergeRequest) -> int:
    """Bytes of one merged directory."""
    template = request.family.template
    shards = shard_layout(template)
    tensor_bytes = request.plan.bytes_written // len(request.recipes)
    index = len(index_json(shards, tensor_bytes)) if len(shards) > 1 else 0
    side = sum(path.stat().st_size for path in side_files(template.root))
    return index + side + sum(shard.nbytes for shard in shards)


def estimate(request: MergeRequest, *, device_cache: int = 0, host_cache: int = 0) -> dict[str, Any]:
    """Everything that `mergemix plan` shows. Measures bandwidths for a few seconds; leaves nothing behind.

    device_cache, host_cache: bytes, of an engine that swaps in mixtures of these experts.

    Raises CheckpointError when an input cannot be read.
    """
    plan = request.plan
    needs = assess(request)
    start_s = bandwidth.kernel_start()
    rates, cached = _measure(request, needs)
    process = process_memory()  # after the kernels were loaded
    stages = _stages(plan, rates)
    # Reading, summing and writing overlap: the slowest decides, or the cores where all of them need these.
    known = {name: seconds for name, seconds in stages.items() if seconds is not None}
    bound = max(known, key=lambda name: known[name]) if len(known) == len(stages) else None
    buffers = None if needs.buffers is None else needs.buffers.total_bytes
    return {
        **request.as_dict(),
        "fits": not needs.reasons,
        "reasons": list(needs.reasons),
        "tensors": len(plan.tasks),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "reads": _reads(request),
        "host_memory": {
            "process_bytes": process,
            "buffers_bytes": buffers,
            "peak_bytes": None if buffers is None else process + buffers,
            "free_bytes": needs.memory_free,
        },
        "device_memory_bytes": 0,  # the processor merges
        "disk": {"needed_bytes": needs.disk, "free_bytes": needs.disk_free},
        "bandwidths": {
            **{f"{name}_bytes_per_s": rate and rate.bytes_per_s for name, rate in rates.items()},
            "cached_share": cached,
        },
        "stages": {"start": start_s, **stages},
        "seconds": None if bound is None else start_s + known[bound],
        "bound_by": bound,
        "swap": _swap(request.family, device_cache, host_cache),
    }


def _reads(request: MergeRequest) -> list[dict[str, Any]]:
    """Bytes by operand, in the order of summation."""
    plan, nbytes, remote = request.plan, Counter[int](), set()
    for task in plan.tasks:
        for member, tensors in _inputs(task):
            nbytes[member] += sum(tensor.nbytes for tensor in tensors)
            remote |= {member for tensor in tensors if not _is_local(tensor)}
    return [
        {
            "name": member.name,
            "source": member.source,
            "bytes": nbytes[index],
            "from": "hub" if index in remote else "disk",
        }
        for index, member in enumerate(request.family.members)
        if index in nbytes
    ]


def _inputs(task: TensorTask) -> Iterable[tuple[int, tuple[TensorInfo, ...]]]:
    """(member, tensors read from it) of a task."""
    yield from ((member, (tensor,)) for member, tensor in zip(task.members, task.operands, strict=True))
    yield from ((term.member, (term.delta.down, term.delta.up)) for term in task.low_rank)


def _is_local(tensor: TensorInfo) -> bool:
    return isinstance(tensor.file, FileIdentity)


def _measure(request: MergeRequest, needs: Needs) -> tuple[dict[str, Rate | None], float | None]:
    """Rates by stage, None where one cannot be measured, and the share of the inputs that is in the page cache."""
    plan, rates, cached = request.plan, dict[str, Rate | None](), None
    for name, tensors in _by_place(plan).items():
        # Elsewhere each time: the places of the last measurement may be in some cache by now.
        ranges = bandwidth.spread_ranges(tensors, SAMPLES, SAMPLE_BYTES, random.random())
        rates[name], share = bandwidth.read_rate(ranges)
        cached = share if name == "disk_read" else cached
    parent = Path(os.path.abspath(request.out)).parent
    nbytes = min(bandwidth.WRITE_BYTES, plan.bytes_written, int((needs.disk_free or 0) * FREE_SHARE))
    try:
        rates["disk_write"] = bandwidth.write_rate(parent, max(nbytes, 1))
    except OSError:
        rates["disk_write"] = None
    dense, low_rank, rank = _sums(plan)
    dtypes = Counter(task.dtype for task in (*dense, *low_rank))
    if dtypes:
        dtype = dtypes.most_common(1)[0][0]
        sources = max(len(task.operands) for task in (*dense, *low_rank))
        for name, tasks, ranks in (("kernel", dense, 0), ("low_rank_kernel", low_rank, rank)):
            if tasks:
                rates[name] = bandwidth.kernel_rate(sources, plan.num_outputs, dtype, rank=ranks)
    return rates, cached


def _by_place(plan: MergePlan) -> dict[str, list[TensorInfo]]:
    """All that is read: from local files, and from the Hub."""
    places: dict[str, list[TensorInfo]] = {}
    for task in plan.tasks:
        for _, tensors in _inputs(task):
            for tensor in tensors:
                places.setdefault("disk_read" if _is_local(tensor) else "hub_read", []).append(tensor)
    return places


def _sums(plan: MergePlan) -> tuple[list[TensorTask], list[TensorTask], int]:
    """Tasks that are summed without and with low-rank products, and the latter's mean rank (by bytes)."""
    dense = [task for task in plan.tasks if not task.is_copy and not task.low_rank]
    low_rank = [task for task in plan.tasks if task.low_rank and task.nbytes]
    ranks = [sum(term.delta.rank for term in task.low_rank) * task.nbytes for task in low_rank]
    return dense, low_rank, round(sum(ranks) / max(sum(task.nbytes for task in low_rank), 1)) or 1


def _stages(plan: MergePlan, rates: dict[str, Rate | None]) -> dict[str, float | None]:
    """Seconds by stage, if nothing else took any time; None where a rate is unknown."""
    dense, low_rank, _ = _sums(plan)
    moved = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in _by_place(plan).items()}
    moved["disk_write"] = plan.bytes_written
    for name, tasks in (("kernel", dense), ("low_rank_kernel", low_rank)):
        moved[name] = sum(task.nbytes * (len(task.operands) + plan.num_outputs) for task in tasks)
    stages: dict[str, float | None] = {}
    processor_s = 0.0
    for name, nbytes in moved.items():
        if nbytes:
            rate = rates[name]
            stages[name] = None if rate is None else nbytes / rate.bytes_per_s
            processor_s += 0.0 if rate is None else nbytes * rate.processor_s_per_byte
    return {**stages, "processor": processor_s / thread_count()}


def _swap(family: Family, device_cache: int, host_cache: int) -> dict[str, Any]:
    """What `mergemix run` moves when it swaps in a mixture of all experts, and what its engine holds on a CPU.

    tiers: bytes of the experts by where the delta cache keeps them. Tensor by tensor: ranks cut them, all alike.
    """
    plan = plan_merge(family, [Mixture.uniform(family.names)])
    parts = len(family.members)  # a share for the base, too, where there is one: it has slots
    everyone = plan_merge(family, [Mixture(family.names, tuple(1 / parts for _ in family.names))])
    slots = [sum(aligned(t.nbytes) for t in task.operands) for task in everyone.tasks if not task.is_copy]
    tiers: Counter[str] = Counter(dict.fromkeys(TIERS, 0))
    for nbytes, tier in zip(slots, assign_tiers(slots, device_cache, host_cache), strict=True):
        tiers[tier] += nbytes
    return {
        "tiers": dict(tiers),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "cpu_parameter_bytes": 2 * plan.bytes_written,  # raw, to be rewritten, beside prepacked
    }
