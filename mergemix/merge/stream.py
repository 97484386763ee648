"""The merge loop: workers read K operands block by block, sum them, and hand each output to a sink. Memory is bounded.

Each worker takes the next block and does all of it by itself, so that reading, summing and writing of different blocks
overlap.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import numpy as np

from mergemix.checkpoints.checkpoint import FLOATING
from mergemix.checkpoints.header import DTYPE_BITS
from mergemix.checkpoints.ranges import OpenFiles
from mergemix.merge.blocks import Block, Piece, Range, ranges, runs
from mergemix.merge.buffers import Buffers, divide_memory
from mergemix.merge.convert import narrow, widen
from mergemix.merge.factors import FactorCache
from mergemix.merge.non_finite import non_finite_error
from mergemix.merge.plan import Coefficients, MergePlan, TensorTask
from mergemix.merge.resources import free_memory
from mergemix.merge.sinks import Sink
from mergemix_kernels import cpu
from mergemix_kernels.cpu_tiles import STEP_BYTES

HEAD_BYTES = 64
CONVERTED_ELEMENTS = 1 << 14
# Smaller blocks are not worth the look at what they hold.
CACHED_BLOCK_BYTES = STEP_BYTES
# Inputs that take more of the free memory than this are not left in the page cache.
CACHED_SHARE = 0.5


@dataclass(frozen=True)
class MergeStats:
    """bytes_read: tensor bytes really read. bytes_written: tensor bytes of the result. seconds: wall time."""

    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


def stream(
    plan: MergePlan,
    sink: Sink,
    *,
    memory_bytes: int = 256 << 20,
    progress: Callable[[int], None] | None = None,
) -> MergeStats:
    """Merge every tensor of the plan into the sink.

    memory_bytes: bound on the buffers; it does not change a bit of the result, nor does the number of threads.
    progress: called, in this thread, with the bytes of the results that were done since the last call.
    Raises NonFiniteError naming tensor and expert, CheckpointError when a file is gone or no longer the one
    that was opened, ConfigError when memory_bytes is too small, and what the sink raises.
    """
    begin_time = time.perf_counter()
    buffers = divide_memory(plan, memory_bytes)
    files = OpenFiles()
    try:
        merge = _Merge(plan, sink, buffers, files)
        _run(merge, buffers.workers, progress)
        merge.settle()
        files.check_unchanged()
    finally:
        files.close()
    seconds = time.perf_counter() - begin_time
    return MergeStats(len(plan.tasks), merge.bytes_read, plan.bytes_written, seconds)


def _run(merge: _Merge, workers: int, progress: Callable[[int], None] | None) -> None:
    """Let workers take blocks until none is left. The first error, or Ctrl-C, stops all of them."""
    reports: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for nbytes in merge.work():
                reports.put(nbytes)
        except BaseException as error:
            reports.put(error)
        finally:
            reports.put(None)

    with ThreadPoolExecutor(workers, thread_name_prefix="mergemix-merge") as pool:
        for _ in range(workers):
            pool.submit(work)
        try:
            while workers:  # that have not ended yet
                report = reports.get()
                if isinstance(report, BaseException):
                    raise report
                if report is None:
                    workers -= 1
                elif progress is not None:
                    progress(report)
        except BaseException:
            merge.stop()
            raise


@dataclass(frozen=True)
class _Copied:
    """A piece whose operands are equal, and whose weighted sum is not: right only if the whole tensor is equal."""

    piece: Piece
    output: int


class _Merge:
    """What the workers share: the blocks that are left, the open files, and what was found on the way."""

    def __init__(self, plan: MergePlan, sink: Sink, buffers: Buffers, files: OpenFiles) -> None:
        self.bytes_read = 0
        self._plan = plan
        self._sink = sink
        self._buffers = buffers
        self._files = files
        self._factors = FactorCache(files)
        self._slots = {member: slot for slot, member in enumerate(plan.dense_members)}
        self._blocks = sink.blocks(buffers.block_bytes)
        self._lock = threading.Lock()
        self._stopped = False
        free_bytes = free_memory()
        self._forget = free_bytes is not None and plan.bytes_read > CACHED_SHARE * free_bytes
        self._sums: dict[Coefficients, cpu.WeightedSums] = {}
        self._copied: list[_Copied] = []
        self._differing: set[tuple[str, int]] = set()  # (tensor, output) whose operands are not all equal

    def stop(self) -> None:
        """Give out no more blocks, and let waiting reads fail."""
        self._stopped = True
        self._files.interrupt()

    def work(self) -> Iterator[int]:
        """Merge blocks until none is left; yields the bytes of the results of each."""
        block_bytes = self._buffers.block_bytes
        num_operands = len(self._slots)
        buffers = _page_aligned(num_operands + self._plan.num_outputs, block_bytes)
        operands, results = buffers[:num_operands], buffers[num_operands:]
        while (block := self._next()) is not None:
            self._merge_block(block, operands, results)
            yield block.nbytes * len(results)

    def _next(self) -> Block | None:
        with self._lock:
            return None if self._stopped else next(self._blocks, None)

    def _merge_block(self, block: Block, operands: list[np.ndarray], results: list[np.ndarray]) -> None:
        targets = [self._sink.target(block, output) for output in range(len(results))]
        outs = [
            buffer[: block.nbytes] if target is None else target
            for buffer, target in zip(results, targets, strict=True)
        ]
        if not self._sum_cached(block, operands, outs):
            self._read_block(block, operands)
            for pieces in runs(block.pieces):
                self._merge_run(pieces, operands, outs)
        for output, target in enumerate(targets):
            if target is None:
                self._sink.write(block, output, outs[output])

    def _sum_cached(self, block: Block, operands: list[np.ndarray], outs: Sequence[np.ndarray]) -> bool:
        """Read and sum a usual block in one native call, if its operands are in the page cache.

        False, with nothing kept of it, where anything is unusual: low ranks, equal operands, a sum that is not
        finite, a read that fails. The long way then finds out what is wrong.
        """
        task = block.pieces[0].task
        if not hasattr(os, "RWF_NOWAIT") or self._forget or block.nbytes < CACHED_BLOCK_BYTES:
            return False
        if task.dtype not in FLOATING or task.low_rank or task.is_copy or len(list(runs(block.pieces))) > 1:
            return False
        parts = [list(ranges(block, member)) for member in task.members]
        if any(len(each) > 1 or each[0].tensor.dtype != each[0].dtype for each in parts):
            return False
        with ExitStack() as opened:
            files = [opened.enter_context(self._files.using(part.tensor)) for [part] in parts]
            descriptors = [file.descriptor for file in files if file.descriptor is not None]
            if len(descriptors) < len(files) or not _heads_differ(block.pieces, descriptors):
                return False
            positions = [part.tensor.offset + part.begin for [part] in parts]
            buffers = [operands[self._slots[member]] for member in task.members]
            kind = cpu.numpy_dtype(task.dtype)
            sums = self._sums_of(task)
            if not sums.of_cached_files(
                descriptors, positions, buffers, [o.view(kind) for o in outs], task.dtype
            ):
                return False
        for piece in block.pieces:
            for output in range(len(outs)):
                self._differing.add((piece.task.name, output))
        self._count(block.nbytes * len(parts))
        return True

    def _read_block(self, block: Block, operands: list[np.ndarray]) -> None:
        """Every operand's bytes, each at the place in its buffer that they have in the block."""
        for member, slot in self._slots.items():
            for part in ranges(block, member):
                self._read(part, operands[slot][part.at : part.at + part.nbytes])

    def _read(self, part: Range, into: np.ndarray) -> None:
        if part.tensor.dtype == part.dtype:
            self._files.read_into(part.tensor, part.begin, into.data, last=self._forget)
            self._count(part.nbytes)
            return
        # An adapter's whole tensor of another floating type, as an expert saved in the base's type would hold it.
        size, given = DTYPE_BITS[part.dtype] // 8, DTYPE_BITS[part.tensor.dtype] // 8
        for begin in range(0, part.nbytes // size, CONVERTED_ELEMENTS):
            count = min(CONVERTED_ELEMENTS, part.nbytes // size - begin)
            data, values = np.empty(count * given, np.uint8), np.empty(count, np.float32)
            self._files.read_into(part.tensor, (part.begin // size + begin) * given, data.data)
            widen(data, part.tensor.dtype, values)
            narrow(values, part.dtype, into[begin * size : (begin + count) * size])
            self._count(data.nbytes)

    def _merge_run(
        self, pieces: Sequence[Piece], operands: list[np.ndarray], outs: Sequence[np.ndarray]
    ) -> None:
        """Sum or copy adjacent pieces that are computed alike."""
        task, begin = pieces[0].task, pieces[0].at
        end = pieces[-1].at + pieces[-1].nbytes
        sources = [operands[self._slots[member]][begin:end] for member in task.members]
        parts = [out[begin:end] for out in outs]
        if task.dtype not in FLOATING:
            for part, weights in zip(parts, task.coefficients, strict=True):
                np.copyto(part, sources[weights.index(1.0)])
            return
        low_rank = None
        if task.low_rank:
            first = pieces[0].begin // cpu.numpy_dtype(task.dtype).itemsize
            low_rank = self._factors.load(task, first, self._count)
        finite = self._sum(task, sources, parts, low_rank)
        for piece in pieces:
            here = slice(piece.at - begin, piece.at - begin + piece.nbytes)
            own_sources, own_parts = [s[here] for s in sources], [p[here] for p in parts]
            if not finite:
                self._check_finite(piece, own_sources, own_parts)
            if not task.is_copy:
                self._keep_equal(piece, own_sources, own_parts)

    def _sum(
        self,
        task: TensorTask,
        sources: Sequence[np.ndarray],
        outs: Sequence[np.ndarray],
        low_rank: cpu.LowRank | None = None,
    ) -> bool:
        """Whether all of the weighted sums are finite."""
        kind = cpu.numpy_dtype(task.dtype)
        return self._sums_of(task)(
            [source.view(kind) for source in sources],
            [out.view(kind) for out in outs],
            task.dtype,
            low_rank=low_rank,
            threads=1,
        )

    def _sums_of(self, task: TensorTask) -> cpu.WeightedSums:
        sums = self._sums.get(task.coefficients)
        if sums is None:
            sums = self._sums[task.coefficients] = cpu.WeightedSums(task.coefficients, len(task.operands))
        return sums

    def _keep_equal(self, piece: Piece, sources: list[np.ndarray], outs: list[np.ndarray]) -> None:
        """Tensors whose operands are bitwise equal are copied, since fp32 sums of K equal values may differ from it.

        Of one piece only this can be said: where its operands are equal and their sum is not, it is copied for now.
        """
        for output, (weights, out) in enumerate(zip(piece.task.coefficients, outs, strict=True)):
            if any(term.scales[output] != 0.0 for term in piece.task.low_rank):
                continue
            first, *others = [s for s, weight in zip(sources, weights, strict=True) if weight != 0.0]
            if not others:
                continue
            head = first[:HEAD_BYTES].tobytes()
            equal = all(other[:HEAD_BYTES].tobytes() == head for other in others)
            if not (equal and cpu.bitwise_equal([first, *others])):
                self._differing.add((piece.task.name, output))
            elif not cpu.bitwise_equal([first, out]):
                np.copyto(out, first)
                self._copied.append(_Copied(piece, output))

    def settle(self) -> None:
        """Sum what was copied of tensors that turned out to differ elsewhere."""
        for copied in self._copied:
            piece, task = copied.piece, copied.piece.task
            if (task.name, copied.output) not in self._differing:
                continue
            weights = task.coefficients[copied.output]
            tensor = next(t for t, weight in zip(task.operands, weights, strict=True) if weight != 0.0)
            source, result = np.empty(piece.nbytes, np.uint8), np.empty(piece.nbytes, np.uint8)
            self._read(Range(tensor, task.dtype, piece.begin, 0, piece.nbytes), source)
            kind = cpu.numpy_dtype(task.dtype)
            sums = cpu.WeightedSums([weights], len(weights))
            if not sums([source.view(kind)] * len(weights), [result.view(kind)], task.dtype, threads=1):
                self._check_finite(piece, [source] * len(weights), [result])
            self._sink.rewrite(piece, copied.output, result)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

    def _check_finite(self, piece: Piece, sources: list[np.ndarray], outs: list[np.ndarray]) -> None:
        kind = cpu.numpy_dtype(piece.task.dtype)
        if not all(cpu.all_finite(out.view(kind), piece.task.dtype) for out in outs):
            raise non_finite_error(self._plan, piece.task, sources, outs)


def _heads_differ(pieces: Sequence[Piece], descriptors: Sequence[int]) -> bool:
    """Whether the first bytes already show, for every output of every piece, that its operands are not equal.

    descriptors: of the open files of the operands. False too where that would have to be waited for.
    """
    for piece in pieces:
        heads = []
        for tensor, descriptor in zip(piece.task.operands, descriptors, strict=True):
            head = bytearray(min(HEAD_BYTES, piece.nbytes))
            try:
                count = os.preadv(descriptor, [head], tensor.offset + piece.begin, os.RWF_NOWAIT)
            except OSError:
                return False
            if count != len(head):  # the rest is on a page that is not there
                return False
            heads.append(bytes(head))
        for weights in piece.task.coefficients:
            used = {head for head, weight in zip(heads, weights, strict=True) if weight != 0.0}
            if len(used) == 1 and np.count_nonzero(weights) > 1:
                return False
    return True


def _page_aligned(count: int, nbytes: int) -> list[np.ndarray]:
    """Zeroed uint8 buffers (nbytes,), each from a page's beginning on, as direct writes need it.

    In one piece of memory, in large pages where the system has them: reads are then a tenth, sums a third faster.
    """
    memory = mmap.mmap(-1, count * nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    return [buffer[begin : begin + nbytes] for begin in range(0, buffer.size, nbytes)]
