"""How a merge divides the memory it may use: worker threads, the block each works on, low-rank factors."""

from __future__ import annotations

from dataclasses import dataclass

from mergemix.checkpoints.files import HubFile
from mergemix.errors import ConfigError
from mergemix.merge.plan import MergePlan
from mergemix.units import size_text
from mergemix_kernels.cpu import thread_count

# Blocks begin and end at multiples of this, in memory and in the files written: what direct writes need.
BLOCK_ALIGNMENT = 4096
# What is written at a time: larger ones gain nothing any more; smaller ones cost calls.
MAX_BLOCK_BYTES = 4 << 20
# What is read and summed at a time: that of all workers together stays in a cache. Smaller ones cost calls.
STEP_BYTES = 512 << 10
# A range read over a network costs a round trip.
REMOTE_STEP_BYTES = 16 << 20
# More workers than cores, so that some wait for the disk while others compute.
WORKERS_PER_CORE = 4
MAX_WORKERS = 32
# Of the memory given: the rest is for threads, tables of tensors and what the libraries hold.
BUFFER_SHARE = 7 / 8
# More memory makes no merge of local files faster, however many checkpoints it reads.
USEFUL_BYTES = 128 << 20


@dataclass(frozen=True)
class Buffers:
    """block_bytes: what is written at a time; every worker has a buffer of so many for each output.

    step_bytes: what is read and summed at a time; every worker has one of so many for each dense operand.
    factor_bytes: for the low-rank factors of the tensors in progress. total_bytes: of all buffers together.
    """

    workers: int
    block_bytes: int
    step_bytes: int
    factor_bytes: int
    total_bytes: int


def divide_memory(plan: MergePlan, memory_bytes: int) -> Buffers:
    """The fastest division that stays within `memory_bytes`; no division changes a bit of the result.

    Raises ConfigError when not even one worker with the smallest blocks fits, naming what would.
    """
    operands, outputs = len(plan.dense_members), plan.num_outputs
    # Twice: an adapter's own bytes are held beside their widened copy while they are converted.
    factors = 2 * max((task.factor_bytes for task in plan.tasks), default=0)
    minimum = factors + (operands + outputs) * BLOCK_ALIGNMENT
    if memory_bytes < minimum:
        raise ConfigError(
            f"merging {operands} checkpoints into {outputs} needs at least {minimum} "
            f"bytes ({size_text(minimum)}) of memory for its buffers, but only {memory_bytes} were given: use "
            f"--memory {minimum} or more"
        )
    remote = any(isinstance(t.file, HubFile) for task in plan.tasks for t in task.operands)
    budget = max(int(memory_bytes * BUFFER_SHARE), minimum)
    if not remote:
        budget = min(budget, max(USEFUL_BYTES, minimum))
    useful = max(_aligned_up(plan.bytes_written // outputs), BLOCK_ALIGNMENT)
    # Low-rank factors are packed for the processor's caches anew in every step: then a step is a whole block.
    low_rank = any(task.low_rank for task in plan.tasks)
    most_step = min(useful, REMOTE_STEP_BYTES if remote else MAX_BLOCK_BYTES if low_rank else STEP_BYTES)
    wanted = min(max(4, WORKERS_PER_CORE * thread_count()), MAX_WORKERS)
    workers = share = step_bytes = 0
    for workers in range(wanted, 0, -1):
        share = (budget - workers * factors) // workers
        step_bytes = min(most_step, share // (operands + outputs) // BLOCK_ALIGNMENT * BLOCK_ALIGNMENT)
        if step_bytes >= min(useful, STEP_BYTES):
            break
    step_bytes = max(step_bytes, BLOCK_ALIGNMENT)
    # Whole steps, as many as there is room for.
    most_block = min(useful, max(MAX_BLOCK_BYTES, step_bytes), (share - operands * step_bytes) // outputs)
    block_bytes = max(most_block // step_bytes, 1) * step_bytes
    return Buffers(
        workers=workers,
        block_bytes=block_bytes,
        step_bytes=step_bytes,
        factor_bytes=workers * factors,
        total_bytes=workers * (operands * step_bytes + outputs * block_bytes + factors),
    )


def _aligned_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
