"""Weighted sums on a GPU of operands that are in host memory, through a ring of slots of bounded size.

While one slot's sources are copied to the device, the slot before is summed, and the results of the one before
that are copied back, where they belong on the host. The order of copies and waits is tested on CPU tensors, with
lanes that run late and out of turn; `CudaLanes` itself has not been run on a GPU yet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch

from mergemix_kernels.dispatch import Group, GroupedWeightedSum, flatten, pieces, used_sources

SLOT_BYTES = 64 << 20  # a copy of so much takes milliseconds: what starts and ends it is lost in that
SLOTS = 3  # one each to fill, to sum and to empty
ALIGNMENT = 256


class Lanes(Protocol):
    """Queues of device work that run beside each other: "in", "sum", "out" and the caller's own, "caller".

    The work of one lane runs in its order. What crosses lanes, or the host, must wait for an event.
    """

    def where(self, tensor: torch.Tensor) -> str:
        """ "device", "pinned" (host memory that lanes may copy from and to by themselves) or "pageable"."""

    def on_device(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 memory of the device."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Uninitialised uint8 memory of the host, pinned."""

    def run(self, lane: str, work: Callable[[], None]) -> None:
        """Queue what `work` starts on the device."""

    def record(self, lane: str) -> Any:
        """An event that happens when all that the lane has been given so far is done."""

    def wait(self, lane: str, event: Any) -> None:
        """What the lane is given from now on starts after the event."""

    def wait_on_host(self, event: Any) -> None:
        """Return after the event."""


class CudaLanes:
    """A CUDA stream per lane; "caller" is the stream that is current when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in ("in", "sum", "out")}

    def _stream(self, lane: str) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if lane == "caller" else self._streams[lane]

    def where(self, tensor: torch.Tensor) -> str:
        if tensor.device == self._device:
            return "device"
        return "pinned" if tensor.device.type == "cpu" and tensor.is_pinned() else "pageable"

    def on_device(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def run(self, lane: str, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream(lane)):
            work()

    def record(self, lane: str) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def wait(self, lane: str, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def wait_on_host(self, event: torch.cuda.Event) -> None:
        event.synchronize()


class _Slot:
    """Device memory of one batch and, where something in it needs staging, as much pinned memory.

    The events are of its latest use: its sources have been copied in, summed, its results copied out.
    """

    def __init__(self, lanes: Lanes, nbytes: int) -> None:
        self._lanes, self._nbytes = lanes, nbytes
        self.filled: Any = None
        self.summed: Any = None
        self.emptied: Any = None

    @cached_property
    def device(self) -> torch.Tensor:
        return self._lanes.on_device(self._nbytes)

    @cached_property
    def staging(self) -> torch.Tensor:
        return self._lanes.pinned(self._nbytes)


class Ring:
    """The slots that any number of `StreamedSum`s share, one after the other. They are allocated on first use."""

    def __init__(self, lanes: Lanes, *, slot_bytes: int = SLOT_BYTES, slots: int = SLOTS) -> None:
        self.lanes = lanes
        self.slot_bytes = slot_bytes
        self.slots = [_Slot(lanes, slot_bytes) for _ in range(slots)]


Pair = tuple[torch.Tensor, torch.Tensor]  # (to, from), one shape


@dataclass(frozen=True)
class Unread:
    """A part of a source that is in no memory, to be read into pinned memory: sources[source] of groups[group].

    view: of the group's source; offset, shape and strides tell which of its elements. into: contiguous, of that shape.
    """

    group: int
    source: int
    view: torch.Tensor
    into: torch.Tensor


Read = Callable[[Sequence[Unread]], None]


@dataclass
class _Batch:
    """What passes through a slot at a time."""

    slot: _Slot
    groups: list[Group] = field(default_factory=list)
    row_bytes: int = 0  # taken up in each row of the slot
    staged: dict[int, list[Pair]] = field(default_factory=dict)  # by source: into pinned memory, by the host
    copied_in: dict[int, list[Pair]] = field(default_factory=dict)  # by source: to the slot on the device
    converted: list[Pair] = field(default_factory=list)  # results, to where they belong on the device
    copied_out: list[Pair] = field(default_factory=list)  # results, to pinned memory
    handed_over: list[Pair] = field(default_factory=list)  # results, from pinned memory, by the host
    unread: dict[int, list[Unread]] = field(
        default_factory=dict
    )  # by source: into pinned memory, by the caller
    sums: GroupedWeightedSum | None = None


class StreamedSum:
    """outs[p] = sum of weights[p][k] * sources[k] for many groups, replayed with new weights each call.

    Args:
        groups: (sources, outs) pairs of one shape each. The sources of a group share a dtype (bf16, fp16 or
            fp32); outs of another dtype get the sum rounded to the sources' and then converted as `copy_` does.
            Any of them may be on the device or on the host, with any strides. All groups have the same
            numbers of sources and outs. The tensors are kept, and must keep their storage.
        ring: the memory to go through: `len(ring.slots) * ring.slot_bytes` on the device, and as much pinned.
        read: fills the pinned memory of sources that are on the device "meta", which have a place but no contents.

    Sources that are pinned and contiguous are copied to the device from where they are, others pass through
    the ring's pinned memory; sources that are contiguous on the device are used there. Not-used sources (weight
    zero in every output) are neither read nor copied.

    Raises ValueError where this does not hold, and for a ring too small for one element of each tensor.
    """

    def __init__(self, groups: Sequence[Group], ring: Ring, read: Read | None = None) -> None:
        self._ring, self._lanes, self._read = ring, ring.lanes, read
        self._source_count = len(groups[0][0])
        self._rows = self._source_count + len(groups[0][1])
        self._row_bytes = ring.slot_bytes // self._rows // ALIGNMENT * ALIGNMENT
        if self._row_bytes == 0:
            raise ValueError(f"a slot must have {ALIGNMENT} bytes for each of {self._rows} tensors")
        self._batches: list[_Batch] = []
        for number, (sources, outs) in enumerate(groups):
            for tensor in (*sources, *outs):
                if tensor.shape != outs[0].shape:
                    raise ValueError(f"shapes must be equal, but got {tensor.shape} and {outs[0].shape}")
                if tensor.is_meta and read is None:
                    raise ValueError("sources without contents need `read`")
            for parts in self._cut(sources, outs):
                self._add(number, parts[: self._source_count], parts[self._source_count :])
        for batch in self._batches:
            batch.sums = GroupedWeightedSum(batch.groups)
            self._join_copies(batch)

    def __call__(self, weights: Sequence[Sequence[float]]) -> None:
        """Write every out, after what the caller's stream was given before and ahead of what it is given next.

        When this returns, the sources on the host have been read and the outs there are written; outs on the
        device are when the caller's stream gets there. Raises ValueError for weights that `active_weights`
        refuses; nothing is written then.
        """
        used = used_sources(weights, self._source_count)
        lanes, slots = self._lanes, self._ring.slots
        lanes.wait("in", lanes.record("caller"))  # the other lanes follow this one
        try:
            for number, batch in enumerate(self._batches):
                if number >= len(slots):
                    self._hand_over(self._batches[number - len(slots)])
                self._start(batch, used, weights)
            for event in [
                event for slot in slots for event in (slot.filled, slot.emptied) if event is not None
            ]:
                lanes.wait_on_host(event)
            for batch in self._batches[-len(slots) :]:
                self._hand_over(batch)
        finally:
            for lane in ("in", "sum", "out"):
                lanes.wait("caller", lanes.record(lane))

    def _start(self, batch: _Batch, used: Sequence[int], weights: Sequence[Sequence[float]]) -> None:
        """Have a batch copied in, summed and copied out; the host does no more than fill the pinned memory."""
        lanes, slot, sums = self._lanes, batch.slot, batch.sums
        assert sums is not None
        staged = [pair for k in used for pair in batch.staged.get(k, ())]
        unread = [part for k in used for part in batch.unread.get(k, ())]
        if (staged or unread) and slot.filled is not None:
            lanes.wait_on_host(slot.filled)
        _copy(staged)
        if unread:
            assert self._read is not None
            self._read(unread)
        if slot.summed is not None:
            lanes.wait("in", slot.summed)
        lanes.run("in", lambda: _copy([pair for k in used for pair in batch.copied_in.get(k, ())]))
        slot.filled = lanes.record("in")
        lanes.wait("sum", slot.filled)
        if slot.emptied is not None:
            lanes.wait("sum", slot.emptied)

        def sum_and_convert() -> None:
            sums(weights)
            _copy(batch.converted)

        lanes.run("sum", sum_and_convert)
        slot.summed = lanes.record("sum")
        if batch.copied_out:
            lanes.wait("out", slot.summed)
            lanes.run("out", lambda: _copy(batch.copied_out))
            slot.emptied = lanes.record("out")

    def _hand_over(self, batch: _Batch) -> None:
        """Copy the results on that belong on the host but could not be copied there directly."""
        if batch.handed_over:
            self._lanes.wait_on_host(batch.slot.emptied)
            _copy(batch.handed_over)

    def _cut(
        self, sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]
    ) -> Iterator[Sequence[torch.Tensor]]:
        """Parts of sources and outs that fit into a slot, along the outs' order of elements in memory."""
        tensors = [tensor.detach() for tensor in (*sources, *outs)]
        order = sorted(range(outs[0].dim()), key=outs[0].stride, reverse=True)
        views = flatten(tensors) or [tensor.permute(order) for tensor in tensors]
        return pieces(views, self._row_bytes // sources[0].element_size())

    def _add(self, number: int, sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
        nbytes = sources[0].numel() * sources[0].element_size()
        if nbytes == 0:
            return
        if not self._batches or self._batches[-1].row_bytes + nbytes > self._row_bytes:
            self._batches.append(_Batch(self._ring.slots[len(self._batches) % len(self._ring.slots)]))
        batch = self._batches[-1]
        operands = [self._source_on_device(batch, number, k, source) for k, source in enumerate(sources)]
        results = [
            self._result_on_device(batch, self._source_count + p, out, operands[0].dtype)
            for p, out in enumerate(outs)
        ]
        batch.groups.append((operands, results))
        batch.row_bytes += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def _place(
        self, memory: torch.Tensor, batch: _Batch, row: int, like: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        begin = row * self._row_bytes + batch.row_bytes
        return memory[begin : begin + like.numel() * dtype.itemsize].view(dtype).view(like.shape)

    def _source_on_device(self, batch: _Batch, number: int, k: int, source: torch.Tensor) -> torch.Tensor:
        where = "nowhere" if source.is_meta else self._lanes.where(source)
        if where == "device" and source.is_contiguous():
            return source
        operand = self._place(batch.slot.device, batch, k, source, source.dtype)
        if where == "nowhere":
            staging = self._place(batch.slot.staging, batch, k, source, source.dtype)
            batch.unread.setdefault(k, []).append(Unread(number, k, source, staging))
            source = staging
        elif where == "pageable" or (where == "pinned" and not source.is_contiguous()):
            staging = self._place(batch.slot.staging, batch, k, source, source.dtype)
            batch.staged.setdefault(k, []).append((staging, source))
            source = staging
        batch.copied_in.setdefault(k, []).append((operand, source))
        return operand

    def _result_on_device(
        self, batch: _Batch, row: int, out: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        where = self._lanes.where(out)
        direct = out.dtype == dtype and out.is_contiguous()
        if where == "device" and direct:
            return out
        result = self._place(batch.slot.device, batch, row, out, dtype)
        if where == "device":
            batch.converted.append((out, result))
        elif where == "pinned" and direct:
            batch.copied_out.append((out, result))
        else:
            staging = self._place(batch.slot.staging, batch, row, out, dtype)
            batch.copied_out.append((staging, result))
            batch.handed_over.append((out, staging))
        return result

    def _join_copies(self, batch: _Batch) -> None:
        """One copy for all of a source's parts, where all are staged: they lie side by side."""
        for k in {**batch.staged, **batch.unread}:
            if len(batch.staged.get(k, ())) + len(batch.unread.get(k, ())) == len(batch.groups):
                row = slice(k * self._row_bytes, k * self._row_bytes + batch.row_bytes)
                batch.copied_in[k] = [(batch.slot.device[row], batch.slot.staging[row])]


def _copy(pairs: Sequence[Pair]) -> None:
    for to, source in pairs:
        to.copy_(source, non_blocking=True)
