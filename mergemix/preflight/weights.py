"""One pass over base and experts: how far each expert moved, where, and in which direction. Memory is bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mergemix.checkpoints.checkpoint import FLOATING
from mergemix.checkpoints.family import Family
from mergemix.checkpoints.header import DTYPE_BITS
from mergemix.checkpoints.ranges import OpenFiles
from mergemix.errors import ConfigError
from mergemix.merge.convert import widen
from mergemix.merge.factors import FactorCache
from mergemix.merge.plan import MergePlan, TensorTask, plan_merge
from mergemix.merge.resources import free_memory
from mergemix.mixture import Mixture
from mergemix.preflight.geometry import FamilyGeometry, TensorGeometry
from mergemix.units import size_text
from mergemix_kernels import cpu

# Elements that are computed on at a time: few enough for a core's cache.
CHUNK_ELEMENTS = 1 << 15
MAX_BLOCK_ELEMENTS = 1 << 21
# As many as cores, and one that waits for the disk.
EXTRA_WORKERS = 1
# Inputs that take more of the free memory than this are not left in the page cache.
CACHED_SHARE = 0.5


def measure_weights(
    family: Family, *, memory_bytes: int = 256 << 20, progress: Callable[[int], None] | None = None
) -> FamilyGeometry:
    """Norms and inner products of all task vectors (expert - base), from one read of every checkpoint.

    Tensors that are not floating point are left out. LoRA adapters count as what they add to the base, formed chunk by
    chunk. Differences are formed in fp32, and products summed in fp32 over at most 32,768 elements, then in fp64: a
    cosine is right to about 1e-6.
    memory_bytes: bound on the buffers. It decides how sums are grouped, which changes their last bits; the number of
    threads does not. progress: told, in this thread, the bytes that were read since the last call.
    Raises CheckpointError when a file is gone or not the one that was opened, ConfigError when memory_bytes is too
    small.
    """
    begin = time.perf_counter()
    plan = _plan(family)
    files = OpenFiles()
    try:
        tensors = tuple(_Pass(family, plan, files, memory_bytes).run(progress or (lambda nbytes: None)))
        files.check_unchanged()
    finally:
        files.close()
    return FamilyGeometry(
        names=family.names,
        has_base=family.base is not None,
        tensors=tensors,
        bytes_read=plan.bytes_read,
        seconds=time.perf_counter() - begin,
    )


def _plan(family: Family) -> MergePlan:
    """A merge plan whose outputs are the single experts, after the base where there is one: nothing is summed."""
    alone = [Mixture.one_hot(family.names, name) for name in family.names]
    return plan_merge(family, alone if family.base is None else [Mixture.base_only(family.names), *alone])


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements [begin, begin + count) of a tensor."""

    task: TensorTask
    begin: int
    count: int


class _Pass:
    """The blocks, and the buffers of the threads that work on them."""

    def __init__(self, family: Family, plan: MergePlan, files: OpenFiles, memory_bytes: int) -> None:
        self._has_base = family.base is not None
        self._num_experts = len(family.names)
        self._tasks = [task for task in plan.tasks if task.dtype in FLOATING]
        self._operands = max((len(task.members) for task in self._tasks), default=0)
        self._files = files
        self._factors = FactorCache(files)
        self._own = threading.local()
        factor_bytes = 2 * max((task.factor_bytes for task in self._tasks), default=0)
        self.workers, self.block_elements = self._divide(memory_bytes, factor_bytes)
        free_bytes = free_memory()
        self._forget = free_bytes is not None and plan.bytes_read > CACHED_SHARE * free_bytes

    def _divide(self, memory_bytes: int, factor_bytes: int) -> tuple[int, int]:
        """Threads, and elements of a block: as many as fit. A block lies there as it was read, a chunk as fp32."""
        rows = self._num_experts + 4  # and the reference, a product of factors, what comparisons need
        chunks = 4 * CHUNK_ELEMENTS * rows + factor_bytes
        element = 4 * max(self._operands, 1)
        wanted = cpu.thread_count() + EXTRA_WORKERS
        for workers in range(wanted, 0, -1):
            count = (memory_bytes // workers - chunks) // element // CHUNK_ELEMENTS * CHUNK_ELEMENTS
            if count >= CHUNK_ELEMENTS:
                return workers, min(count, MAX_BLOCK_ELEMENTS)
        least = chunks + element * CHUNK_ELEMENTS
        raise ConfigError(
            f"comparing {self._operands} checkpoints needs at least {least} bytes ({size_text(least)}) of memory for "
            f"its buffers, but only {memory_bytes} were given: use --memory {least} or more"
        )

    def run(self, progress: Callable[[int], None]) -> Iterator[TensorGeometry]:
        """Every tensor in turn. Blocks are added up in their order, so that threads change no bit."""
        rows = 1 + self._num_experts
        # Workers already keep all cores busy: BLAS must not start threads for each of their small products.
        with (
            threadpool_limits(1, user_api="blas"),
            ThreadPoolExecutor(self.workers, thread_name_prefix="mergemix-preflight") as pool,
        ):
            try:
                blocks = self._blocks()
                for block, (gram, moved) in zip(blocks, pool.map(self._measure, blocks), strict=True):
                    if block.begin == 0:
                        total, count = np.zeros((rows, rows)), np.zeros(self._num_experts, np.int64)
                    total += gram
                    count += moved
                    progress(block.count * DTYPE_BITS[block.task.dtype] // 8 * len(block.task.operands))
                    elements = block.begin + block.count
                    if elements == _elements(block.task):
                        is_matrix = len(block.task.shape) > 1
                        yield TensorGeometry(block.task.name, is_matrix, elements, total, count)
            except BaseException:
                self._files.interrupt()
                pool.shutdown(cancel_futures=True)
                raise

    def _blocks(self) -> list[_Block]:
        step = self.block_elements
        return [
            _Block(task, begin, min(step, _elements(task) - begin))
            for task in self._tasks
            for begin in range(0, max(_elements(task), 1), step)
        ]

    def _measure(self, block: _Block) -> tuple[np.ndarray, np.ndarray]:
        """Gram matrix and counts of a block's elements."""
        gram = np.zeros((1 + self._num_experts, 1 + self._num_experts))
        moved = np.zeros(self._num_experts, np.int64)
        raw = self._read(block)
        for begin in range(0, block.count, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, block.count - begin)
            vectors = self._vectors(block, raw, begin, count)
            gram += _gram(vectors)
            moved += [np.count_nonzero(vector) for vector in vectors[1:] != 0.0]
        return gram, moved

    def _buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Of this thread: bytes [operands, block], and vectors in fp32 [1 + K, chunk]."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = (
                np.empty((self._operands, 4 * self.block_elements), np.uint8),
                np.empty((1 + self._num_experts, CHUNK_ELEMENTS), np.float32),
            )
        return self._own.buffers

    def _read(self, block: _Block) -> np.ndarray:
        """Each operand's bytes of the block, at the beginning of its row."""
        raw = self._buffers()[0]
        for row, tensor in zip(raw, block.task.operands, strict=False):
            size = DTYPE_BITS[tensor.dtype] // 8  # an adapter's whole tensor may be of another type
            part = row[: block.count * size]
            self._files.read_into(tensor, block.begin * size, part.data, last=self._forget)
        return raw

    def _fill(self, task: TensorTask, raw: np.ndarray, begin: int, rows: np.ndarray) -> None:
        """rows = the values of the outputs, from element `begin` of the block on."""
        sources = [weights.index(1.0) for weights in task.coefficients]
        dtypes, count = [tensor.dtype for tensor in task.operands], rows.shape[1]
        if (
            sources == list(range(len(dtypes))) and len(set(dtypes)) == 1
        ):  # whole checkpoints: all rows in one go
            size = DTYPE_BITS[dtypes[0]] // 8
            widen(raw[: len(dtypes), begin * size : (begin + count) * size], dtypes[0], rows)
            return
        for k, (row, source) in enumerate(zip(rows, sources, strict=True)):
            if (same := sources.index(source)) < k:  # an adapter that does not bring this tensor: the base
                np.copyto(row, rows[same])
                continue
            size = DTYPE_BITS[dtypes[source]] // 8
            widen(raw[source, begin * size : (begin + count) * size], dtypes[source], row)

    def _vectors(self, block: _Block, raw: np.ndarray, begin: int, count: int) -> np.ndarray:
        """fp32 [1 + K, count]: the reference and the task vectors, of `count` elements from the block's `begin` on."""
        task, vectors = block.task, self._buffers()[1][:, :count]
        experts, first = vectors[1:], int(not self._has_base)  # without a base, row 0 is the experts' mean
        self._fill(task, raw, begin, vectors[first:])
        if not self._has_base:
            _mean(experts, vectors[0])
        experts -= vectors[0]
        if task.low_rank:
            low_rank = self._factors.load(task, block.begin + begin, lambda nbytes: None)
            for expert, scales in zip(experts, low_rank.scales[-self._num_experts :], strict=True):
                if scales.any():
                    expert += _product(low_rank, scales, count)
        return vectors


def _elements(task: TensorTask) -> int:
    return task.nbytes * 8 // DTYPE_BITS[task.dtype]


def _mean(experts: np.ndarray, out: np.ndarray) -> None:
    """The experts' mean, and of an element that is NaN or Inf in some that of the others: so it is told in which."""
    with np.errstate(over="ignore", invalid="ignore"):
        experts.mean(axis=0, out=out)
        if not np.isfinite(out).all():
            finite = np.isfinite(experts)
            total = np.sum(experts, axis=0, dtype=np.float64, where=finite)
            out[:] = total / np.maximum(finite.sum(axis=0), 1)


def _gram(vectors: np.ndarray) -> np.ndarray:
    """float64 [R, R] of the rows' inner products.

    Sums in fp32 that overflow are repeated in fp64: what is then not finite holds a NaN or Inf.
    """
    gram = np.empty((len(vectors), len(vectors)))
    with np.errstate(over="ignore", invalid="ignore"):
        # Not vectors @ vectors.T: numpy takes BLAS's syrk for that, which is 4 times as slow for so few rows.
        gram[:, 1:] = vectors @ vectors[1:].T
        gram[1:, 0], gram[0, 0] = gram[0, 1:], np.dot(vectors[0], vectors[0])
        if not np.isfinite(gram).all():
            exact = vectors.astype(np.float64)
            gram = exact @ exact.T
    return gram


def _product(low_rank: cpu.LowRank, scales: np.ndarray, count: int) -> np.ndarray:
    """fp32 [count]: left @ diag(scales) @ right, `count` elements from element `first` of the matrix on."""
    columns = low_rank.right.shape[1]
    top, begin = divmod(low_rank.first, columns)
    bottom = -(-(low_rank.first + count) // columns)
    used = np.flatnonzero(scales)
    product = (low_rank.left[top:bottom, used] * scales[used]) @ low_rank.right[used]
    return product.reshape(-1)[begin : begin + count]
