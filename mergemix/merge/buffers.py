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
# Larger ones gain nothing any more; smaller ones cost calls.
MAX_BLOCK_BYTES = 4 << 20
# A range read over a network costs a round trip.
MAX_REMOTE_BLOCK_BYTES = 16 << 20
WORTHWHILE_BLOCK_BYTES = 256 << 10
# More workers than cores, so that some wait for the disk while others compute.
WORKERS_PER_CORE = 4
MAX_WORKERS = 32
# Of the memory given: the rest is for threads, tables of tensors and what the libraries hold.
BUFFER_SHARE = 7 / 8
# More memory makes no merge of local files faster, however many checkpoints it reads.
USEFUL_BYTES = 128 << 20


@dataclass(frozen=True)
class Buffers:
    """block_bytes: of each buffer; every worker has one per dense operand and one per output.

    factor_bytes: for the low-rank factors of the tensors in progress. total_bytes: of all buffers together.
    """

    workers: int
    block_bytes: int
    factor_bytes: int
    total_bytes: int


def divide_memory(plan: MergePlan, memory_bytes: int) -> Buffers:
    """The fastest division that stays within `memory_bytes`; no division changes a bit of the result.

    Raises ConfigError when not even one worker with the smallest blocks fits, naming what would.
    """
    per_worker = len(plan.dense_members) + plan.num_outputs
    # Twice: an adapter's own bytes are held beside their widened copy while they are converted.
    factors = 2 * max((task.factor_bytes for task in plan.tasks), default=0)
    minimum = factors + per_worker * BLOCK_ALIGNMENT
    if memory_bytes < minimum:
        raise ConfigError(
            f"merging {len(plan.dense_members)} checkpoints into {plan.num_outputs} needs at least {minimum} "
            f"bytes ({size_text(minimum)}) of memory for its buffers, but only {memory_bytes} were given: use "
            f"--memory {minimum} or more"
        )
    remote = any(isinstance(t.file, HubFile) for task in plan.tasks for t in task.operands)
    limit = MAX_REMOTE_BLOCK_BYTES if remote else MAX_BLOCK_BYTES
    budget = max(int(memory_bytes * BUFFER_SHARE), minimum)
    if not remote:
        budget = min(budget, max(USEFUL_BYTES, minimum))
    useful = min(limit, max(_aligned_up(plan.bytes_written // plan.num_outputs), BLOCK_ALIGNMENT))
    wanted = min(max(4, WORKERS_PER_CORE * thread_count()), MAX_WORKERS)
    workers, block_bytes = 1, BLOCK_ALIGNMENT
    for workers in range(wanted, 0, -1):
        share = (budget - workers * factors) // (workers * per_worker)
        block_bytes = min(useful, share // BLOCK_ALIGNMENT * BLOCK_ALIGNMENT)
        if block_bytes >= min(useful, WORTHWHILE_BLOCK_BYTES):
            break
    block_bytes = max(block_bytes, BLOCK_ALIGNMENT)
    return Buffers(
        workers=workers,
        block_bytes=block_bytes,
        factor_bytes=workers * factors,
        total_bytes=workers * (per_worker * block_bytes + factors),
    )


def _aligned_up(nbytes: int) -> int:
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
