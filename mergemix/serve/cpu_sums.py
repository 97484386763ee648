"""Weighted sums of operands into parameters on the host: read, summed and written piece by piece, on a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from mergemix.serve.copies import Copy, Numbers, memory_order, used_operands
from mergemix.serve.view_reader import ViewReader, as_array
from mergemix_kernels import cpu
from mergemix_kernels.dispatch import DTYPE_NAMES, pieces

# Of one operand.
PIECE_BYTES = 1 << 20
# Of all operands together; with very many each piece is smaller.
BUFFER_BYTES = 16 << 20
ALIGNMENT = 64

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One operand's elements of a copy, kept in memory. tensor: of the destination's shape. filled: it holds them."""

    tensor: torch.Tensor
    filled: bool


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """A destination to be written with these numbers. slots: by operand, of those that have one."""

    copy: Copy
    numbers: Numbers
    slots: dict[int, Slot]

    @property
    def weights(self) -> tuple[float, ...]:
        return self.numbers.weights

    def low_rank(self) -> cpu.LowRank | None:
        """What adapters add to it."""
        if self.copy.folded is None or not self.numbers.scales:
            return None
        factors = self.copy.folded.factors
        scales = factors.scales(self.numbers.scales)
        return cpu.LowRank(factors.left.numpy(), factors.right.numpy(), scales[None].numpy(), 0)

    def source(self, k: int) -> int:
        """The first operand that is equal to operand k."""
        return self.copy.origin.classes[k]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A piece of a destination; view, target and slots have one shape. low_rank: what adapters add to it."""

    sum: Sum
    view: torch.Tensor
    target: torch.Tensor
    slots: dict[int, Slot]
    low_rank: cpu.LowRank | None


class CpuSums:
    """Writes destinations that are in host memory."""

    def __init__(self, reader: ViewReader) -> None:
        self._reader = reader
        self._threads = cpu.thread_count()
        self._pool: ThreadPoolExecutor | None = None
        self._local = threading.local()

    def write(self, sums: Sequence[Sum], *, check: bool = False) -> bool:
        """Write every destination, and the slots it uses that are not filled. With `check`: are the sums finite?

        A sum is rounded to the operands' dtype, then converted to the destination's as `copy_` does.
        """
        totals: dict[tuple[float, ...], cpu.WeightedSums] = {}
        for each in sums:
            if each.weights not in totals:
                used = used_operands(each.weights)
                totals[each.weights] = cpu.WeightedSums([[each.weights[k] for k in used]], len(used))
        # Whole tensors where nothing needs a buffer: large results are then written past the cache.
        finite, others = [], []
        for each in sums:
            found = self._whole(each, totals[each.weights])
            others += [each] if found is None else []
            finite += [] if found is None else [found]
        self.each(
            (part for each in others for part in _parts(each)),
            lambda part: finite.append(self._sum(part, totals[part.sum.weights], check)),
        )
        return all(finite)

    def is_finite(self, copy: Copy, operand: int) -> bool:
        """Whether an operand's elements of a copy are all finite numbers."""
        finite: list[bool] = []
        name = DTYPE_NAMES[copy.view.dtype]

        def check(view: torch.Tensor) -> None:
            [data] = self._buffers(1, view.numel(), view.dtype)
            self._reader.read(copy.origin.tensors[operand], view, data.view(view.shape))
            finite.append(cpu.all_finite(as_array(data).view(cpu.numpy_dtype(name)), name))

        view = copy.view.permute(memory_order(copy.view))
        limit = PIECE_BYTES // view.element_size()
        self.each((part for [part] in pieces([view], limit)), check)
        return all(finite)

    def each(self, parts: Iterator[T], work: Callable[[T], object]) -> None:
        """Call `work` with each part, on several threads when there are many. The first error ends all."""
        first = list(islice(parts, 2))
        if len(first) < 2:
            for part in first:
                work(part)
            return
        lock, left = threading.Lock(), iter(first)
        failed: list[bool] = []

        def next_part() -> T | None:
            with lock:
                if failed:
                    return None
                part = next(left, None)
                return next(parts, None) if part is None else part

        def run() -> None:
            try:
                while (part := next_part()) is not None:
                    work(part)
            except BaseException:
                failed.append(True)
                raise

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mergemix-swap")
        runs = [self._pool.submit(run) for _ in range(self._threads)]
        try:
            errors = [error for each in runs if (error := each.exception()) is not None]
        except BaseException:
            failed.append(True)
            raise
        if errors:
            raise errors[0]

    def _whole(self, each: Sum, totals: cpu.WeightedSums) -> bool | None:
        """Write a destination at once, whose operands are all in memory as they are needed: is the sum finite?

        None where that is not so, and nothing was done.
        """
        copy = each.copy
        if not (copy.is_direct and copy.destination.is_contiguous()):
            return None
        dtype = DTYPE_NAMES[copy.view.dtype]
        data: list[np.ndarray] = []
        borrowed: list[torch.Tensor] = []
        for k in map(each.source, used_operands(each.weights)):
            slot = each.slots.get(k)
            if slot is not None:
                elements = slot.tensor.reshape(-1) if slot.filled and slot.tensor.is_contiguous() else None
            else:
                elements = self._reader.borrow(copy.origin.tensors[k], copy.view)
                borrowed += [] if elements is None else [elements]
            if elements is None:
                return None
            data.append(as_array(elements).view(cpu.numpy_dtype(dtype)))
        out = as_array(copy.destination.reshape(-1)).view(cpu.numpy_dtype(dtype))
        finite = totals(data, [out], dtype, low_rank=each.low_rank())
        self._release(borrowed)
        return finite

    def _sum(self, part: _Part, totals: cpu.WeightedSums, check: bool) -> bool:
        """Write one piece; False where the sum is not finite, if `check` asks for that."""
        each, view, target = part.sum, part.view, part.target
        used = used_operands(each.weights)
        sources = list(dict.fromkeys(each.source(k) for k in used))
        floating, same = each.copy.is_floating, target.dtype == view.dtype
        is_copy = len(used) == 1 and part.low_rank is None
        if is_copy and same and sources[0] not in part.slots and not (check and floating):
            self._reader.read(each.copy.origin.tensors[sources[0]], view, target)
            return True
        *buffers, result = self._buffers(len(sources) + 1, view.numel(), view.dtype)
        borrowed: list[torch.Tensor] = []
        data = {
            k: self._source(part, k, buffer, borrowed) for k, buffer in zip(sources, buffers, strict=True)
        }
        if not floating:
            target.copy_(data[sources[0]].view(view.shape))
            self._release(borrowed)
            return True
        out = target.reshape(-1) if same and target.is_contiguous() else result
        dtype = DTYPE_NAMES[view.dtype]
        kind = cpu.numpy_dtype(dtype)
        arrays = {k: as_array(tensor).view(kind) for k, tensor in data.items()}
        finite = totals(
            [arrays[each.source(k)] for k in used],
            [as_array(out).view(kind)],
            dtype,
            low_rank=part.low_rank,
            threads=1,
        )
        self._release(borrowed)
        if out is result and same:
            np.copyto(as_array(target), as_array(out.view(view.shape)))
        elif out is result:
            target.copy_(out.view(view.shape))
        return finite

    def _source(
        self, part: _Part, k: int, buffer: torch.Tensor, borrowed: list[torch.Tensor]
    ) -> torch.Tensor:
        """Operand k's elements of the piece, flat: from its slot, or from its file, which fills the slot.

        They may be in `buffer`, or in memory that is then added to `borrowed`.
        """
        slot = part.slots.get(k)
        if slot is None:
            elements = self._reader.borrow(part.sum.copy.origin.tensors[k], part.view)
            if elements is not None:
                borrowed.append(elements)
                return elements
        if slot is None or not slot.filled:
            into = buffer.view(part.view.shape) if slot is None else slot.tensor
            self._reader.read(part.sum.copy.origin.tensors[k], part.view, into)
        if slot is None:
            return buffer
        if slot.tensor.is_contiguous():
            return slot.tensor.reshape(-1)
        np.copyto(as_array(buffer.view(part.view.shape)), as_array(slot.tensor))
        return buffer

    def _release(self, borrowed: list[torch.Tensor]) -> None:
        if borrowed:
            self._reader.release(sum(e.numel() * e.element_size() for e in borrowed))

    def _buffers(self, number: int, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """This thread's own memory, as flat tensors; the next call gives the same again."""
        nbytes = -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        held: torch.Tensor | None = getattr(self._local, "held", None)
        if held is None or held.numel() < number * nbytes:
            # numpy asks for large pages, in which reads and sums are faster.
            held = self._local.held = torch.from_numpy(np.empty(number * nbytes, np.uint8))
        rows = held[: number * nbytes].view(number, nbytes)
        return [row[: elements * dtype.itemsize].view(dtype) for row in rows]


def _parts(each: Sum) -> Iterator[_Part]:
    """Pieces of a destination, cut so that they are near each other where they are read from.

    With factors each is a range of elements of the matrix that the destination is (see Copy).
    """
    sources = {each.source(k) for k in used_operands(each.weights)}
    slots = {k: each.slots[k] for k in sources if k in each.slots}
    in_memory = len(slots) == len(sources) and all(slot.filled for slot in slots.values())
    low_rank = each.low_rank()
    order = memory_order(each.copy.destination if in_memory else each.copy.view)
    if low_rank is not None:
        order = [*range(each.copy.view.dim())]
    tensors = [each.copy.view, each.copy.destination, *(slot.tensor for slot in slots.values())]
    if each.copy.view.numel() == 0:
        return
    nbytes = min(PIECE_BYTES, BUFFER_BYTES // (len(sources) + 1))
    limit = max(nbytes // each.copy.view.element_size(), 1)
    begin = 0
    for view, target, *parts in pieces([tensor.permute(order) for tensor in tensors], limit):
        kept = {k: Slot(part, slot.filled) for (k, slot), part in zip(slots.items(), parts, strict=True)}
        part = None if low_rank is None else replace(low_rank, first=begin)
        yield _Part(each, view, target, kept, part)
        begin += view.numel()
