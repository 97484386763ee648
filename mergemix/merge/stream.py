"""The merge loop: read K operands chunk by chunk, sum them, hand the result to a sink. Memory is bounded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from mergemix.checkpoints.checkpoint import FLOATING, TensorInfo
from mergemix.checkpoints.files import check_unchanged
from mergemix.errors import CheckpointError, ConfigError, NonFiniteError
from mergemix.merge.plan import MergePlan, TensorTask
from mergemix.merge.sinks import Sink
from mergemix_kernels import cpu

CHUNK_ALIGNMENT = 64  # bytes: whole elements of every dtype, and whole cache lines
MAX_CHUNK_BYTES = 4 << 20


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

    memory_bytes: bound on the buffers, one per operand and one for the result; it does not change a bit of
    the result. progress: called with the bytes of the result that were done since the last call.
    Raises NonFiniteError naming tensor and expert, CheckpointError when a file is gone or no longer the one
    that was opened, ConfigError when memory_bytes is too small, and what the sink raises.
    """
    begin_time = time.perf_counter()
    with _Merger(plan, sink, memory_bytes) as merger:
        for task in plan.tasks:
            for done in merger.sum(task) if task.action == "sum" else merger.copy(task):
                if progress is not None:
                    progress(done)
        bytes_read = merger.reader.bytes_read
    return MergeStats(len(plan.tasks), bytes_read, plan.bytes_written, time.perf_counter() - begin_time)


class OperandReader:
    """Reads ranges of the operands' tensors with pread, into one buffer per operand that is used again.

    One file per operand is open at a time: tensors come in file order, and K times all shards may be more
    files than a process may open.
    """

    def __init__(self, num_operands: int, chunk_bytes: int) -> None:
        self.bytes_read = 0
        self._buffers = [np.empty(chunk_bytes, np.uint8) for _ in range(num_operands)]
        self._files: list[tuple[str, int] | None] = [None] * num_operands

    def read(
        self, operand: int, tensor: TensorInfo, begin: int, nbytes: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Bytes [begin, begin + nbytes) of `tensor`, in `into` or else in the operand's buffer, as uint8."""
        data = self._buffers[operand][:nbytes] if into is None else into
        view = data.data
        try:
            file = self._open(operand, tensor)
            done = 0
            while done < nbytes:
                count = os.preadv(file, [view[done:]], tensor.offset + begin + done)
                if count == 0:
                    raise CheckpointError(
                        f"{tensor.path} was truncated while it was read: tensor {tensor.name!r} ends "
                        f"{nbytes - done} bytes early"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor {tensor.name!r} from {tensor.path}: {error.strerror}"
            ) from error
        self.bytes_read += nbytes
        return data

    def _open(self, operand: int, tensor: TensorInfo) -> int:
        path = str(tensor.path)
        current = self._files[operand]
        if current is not None and current[0] == path:
            return current[1]
        self._close(operand)
        file = os.open(path, os.O_RDONLY)
        self._files[operand] = (path, file)
        check_unchanged(tensor.path, file, tensor.file)
        return file

    def _close(self, operand: int) -> None:
        current, self._files[operand] = self._files[operand], None
        if current is not None:
            os.close(current[1])

    def close(self) -> None:
        for operand in range(len(self._files)):
            self._close(operand)


class _Merger:
    """One merge under way: the reader, the buffer for results, and what is done with a chunk."""

    def __init__(self, plan: MergePlan, sink: Sink, memory_bytes: int) -> None:
        num_operands = len(plan.operand_names)
        largest = max((task.nbytes for task in plan.tasks), default=0)
        self._chunk_bytes = _chunk_bytes(memory_bytes, num_operands + 1, largest)
        self._plan = plan
        self._sink = sink
        self._result = np.empty(self._chunk_bytes, np.uint8)
        self.reader = OperandReader(num_operands, self._chunk_bytes)

    def __enter__(self) -> _Merger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()

    def copy(self, task: TensorTask) -> Iterator[int]:
        """Copy the only operand, bit for bit. Yields the bytes of each chunk."""
        for begin, nbytes in self._chunks(task.nbytes):
            target = self._sink.target(task, begin, nbytes)
            data = self.reader.read(0, task.operands[0][0], begin, nbytes, into=target)
            if task.dtype in FLOATING:
                self._check_finite(task, data, [data])
            if target is None:
                self._sink.write(task, begin, data)
            yield nbytes

    def sum(self, task: TensorTask) -> Iterator[int]:
        """Sum the operands, or copy them if they are bitwise equal throughout. Yields each chunk's bytes.

        In fp32 the weighted sum of K equal values is not always that value. So chunks are copied for as long
        as all operands are equal; at the first difference the tensor is done again from its start.
        """
        equal = True
        for begin, nbytes in self._chunks(task.nbytes):
            sources = [
                self.reader.read(k, tensor, begin, nbytes) for k, (tensor, _) in enumerate(task.operands)
            ]
            if equal and not cpu.bitwise_equal([self._elements(task, source) for source in sources]):
                equal = False
                self._sum_equal_part(task, begin)
                if begin:
                    sources[0] = self.reader.read(0, task.operands[0][0], begin, nbytes)
            self._put(task, begin, sources, copied=equal)
            yield nbytes

    def _sum_equal_part(self, task: TensorTask, end: int) -> None:
        """Sum the bytes before `end`, which are the same in all operands: so only the first is read again."""
        for begin, nbytes in self._chunks(end):
            source = self.reader.read(0, task.operands[0][0], begin, nbytes)
            self._put(task, begin, [source] * len(task.operands), copied=False)

    def _put(self, task: TensorTask, begin: int, sources: list[np.ndarray], *, copied: bool) -> None:
        """Give the sink the weighted sum of the sources (a chunk of each operand, uint8), or the first."""
        nbytes = sources[0].size
        target = self._sink.target(task, begin, nbytes)
        result = self._result[:nbytes] if target is None else target
        if copied:
            np.copyto(result, sources[0])
        else:
            cpu.weighted_sum(
                [self._elements(task, source) for source in sources],
                [coefficient for _, coefficient in task.operands],
                self._elements(task, result),
                task.dtype,
            )
        self._check_finite(task, result, sources)
        if target is None:
            self._sink.write(task, begin, result)

    def _check_finite(self, task: TensorTask, result: np.ndarray, sources: list[np.ndarray]) -> None:
        if cpu.all_finite(self._elements(task, result), task.dtype):
            return
        holders = [
            f"{self._plan.operand_names[k]} ({task.operands[k][0].path})"
            for k, source in enumerate(sources)
            if not cpu.all_finite(self._elements(task, source), task.dtype)
        ]
        if holders:
            raise NonFiniteError(f"tensor {task.name!r} holds NaN or Inf in {', '.join(holders)}")
        weights = ", ".join(
            f"{name} {coefficient:g}"
            for name, (_, coefficient) in zip(self._plan.operand_names, task.operands, strict=True)
        )
        raise NonFiniteError(
            f"tensor {task.name!r}: the weighted sum is beyond the range of {task.dtype}, though all of its "
            f"inputs are finite; use smaller weights than {weights}"
        )

    def _elements(self, task: TensorTask, data: np.ndarray) -> np.ndarray:
        return data.view(cpu.numpy_dtype(task.dtype))

    def _chunks(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(begin, nbytes) of consecutive chunks that cover `nbytes`."""
        for begin in range(0, nbytes, self._chunk_bytes):
            yield begin, min(self._chunk_bytes, nbytes - begin)


def _chunk_bytes(memory_bytes: int, num_buffers: int, largest: int) -> int:
    """Bytes per buffer: the memory's share, no more than helps, no more than the largest tensor takes."""
    share = memory_bytes // num_buffers // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT
    if share == 0:
        raise ConfigError(
            f"merging {num_buffers - 1} checkpoints needs at least {num_buffers * CHUNK_ALIGNMENT} bytes of "
            f"memory for its buffers, but only {memory_bytes} were given"
        )
    needed = -(-largest // CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    return min(share, MAX_CHUNK_BYTES, max(needed, CHUNK_ALIGNMENT))
