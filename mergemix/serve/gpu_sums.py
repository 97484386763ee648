"""Weighted sums into parameters on a GPU: launches that are built once for a set of destinations, then replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mergemix.checkpoints.header import TensorInfo
from mergemix.serve.copies import Copy, Numbers, memory_order
from mergemix.serve.cpu_sums import CpuSums
from mergemix.serve.folded_sums import Placed, folded_sums
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels.dispatch import GroupedWeightedSum, pieces, used_sources
from mergemix_kernels.pinned import Ring, StreamedSum, Unread

# Sets of destinations that are kept ready: those of a few structures of layer groups, each in a few tiers.
MAX_LAUNCHES = 128
# Of an operand, read at a time by one thread.
READ_BYTES = 4 << 20

Launch = Callable[[Numbers], None]


@dataclass(frozen=True, slots=True, eq=False)
class Empty:
    """A slot of the cache, on the device or the host, that is to be filled with one operand's elements of a copy."""

    copy: Copy
    operand: int
    slot: torch.Tensor


class GpuSums:
    """Writes destinations that are in the memory of one GPU."""

    def __init__(self, reader: ViewReader, host: CpuSums, ring: Ring) -> None:
        self._reader, self._host, self._ring = reader, host, ring
        self._lanes = ring.lanes
        self._launches: OrderedDict[bytes, Launch] = OrderedDict()
        # All of it now, as the model is loaded: vLLM then measures how much of the GPU is left.
        for slot in ring.slots:
            _ = slot.device

    def write(self, key: bytes, placed: Callable[[], Sequence[Placed]], numbers: Numbers) -> None:
        """Write destinations with these numbers. key: names them and where their sources are; `placed` gives them."""
        folds = bool(numbers.scales)
        known = key + bytes([folds])
        launch = self._launches.pop(known, None) or self._launch(placed(), folds)
        self._launches[known] = launch
        if len(self._launches) > MAX_LAUNCHES:
            self._launches.popitem(last=False)
        launch(numbers)

    def write_once(self, copy: Copy, numbers: Numbers) -> None:
        """Write one destination from the files."""
        placed = Placed(copy, (copy.view,) * len(numbers.weights))
        self._launch([placed], bool(numbers.scales))(numbers)

    def fill(self, empty: Sequence[Empty]) -> None:
        """Read operands into their slots. Those on the device hold them when the caller's stream gets there."""
        on_device = [each for each in empty if self._lanes.where(each.slot) == "device"]
        if on_device:
            groups = [((each.copy.view,), (each.slot,)) for each in on_device]
            # A sum of one operand of weight 1 is that operand, bit for bit.
            read = self._reads([(each.copy, each.operand) for each in on_device])
            StreamedSum(groups, self._ring, read)([[1.0]])
        on_host = [each for each in empty if self._lanes.where(each.slot) != "device"]
        self._read([(each.copy.origin.tensors[each.operand], each.copy.view, each.slot) for each in on_host])

    def _launch(self, placed: Sequence[Placed], folds: bool) -> Launch:
        """folds: with what adapters add."""
        if folds:
            folded = folded_sums(placed, self._read_folded)
            return lambda numbers: self._lanes.run("caller", lambda: folded(numbers))
        sums = self._sums(placed)
        return lambda numbers: sums([numbers.weights])

    def _read_folded(self, tensor: TensorInfo, view: torch.Tensor, into: torch.Tensor) -> None:
        self._read([(tensor, view, into)])

    def _sums(self, placed: Sequence[Placed]) -> Callable[[Sequence[Sequence[float]]], None]:
        """Sums without what adapters add."""
        if not placed[0].copy.is_floating:
            return lambda weights: self._copy(placed, weights)
        groups = [(each.sources, [each.copy.destination]) for each in placed]
        resident = all(
            not source.is_meta and self._lanes.where(source) == "device"
            for each in placed
            for source in each.sources
        )
        if resident and all(each.copy.is_direct for each in placed):
            sums = GroupedWeightedSum(groups)
            return lambda weights: self._lanes.run("caller", lambda: sums(weights))

        def read(parts: Sequence[Unread]) -> None:
            """Each part once: operands that are equal have it from the first of them."""
            first: dict[tuple[object, ...], torch.Tensor] = {}
            unread, equal = [], []
            for part in parts:
                origin = placed[part.group].copy.origin
                k = origin.classes[part.source]
                place = (part.group, k, int(part.view.storage_offset()), part.view.shape)
                into = first.setdefault(place, part.into)
                if into is part.into:
                    unread.append((origin.tensors[k], part.view, into))
                else:
                    equal.append((part.into, into))
            self._read(unread)
            for into, source in equal:
                into.copy_(source)

        return StreamedSum(groups, self._ring, read)

    def _reads(self, sources: Sequence[tuple[Copy, int]]) -> Callable[[Sequence[Unread]], None]:
        """Reads parts of groups of one source each."""

        def read(parts: Sequence[Unread]) -> None:
            of = [sources[part.group] for part in parts]
            self._read(
                [(copy.origin.tensors[k], p.view, p.into) for (copy, k), p in zip(of, parts, strict=True)]
            )

        return read

    def _read(self, wanted: Sequence[tuple[TensorInfo, torch.Tensor, torch.Tensor]]) -> None:
        """Read (tensor, which of its elements, memory of the host), on several threads when that is much."""

        def cut() -> Iterator[tuple[TensorInfo, Sequence[torch.Tensor]]]:
            for tensor, view, into in wanted:
                order = memory_order(view)
                limit = max(READ_BYTES // view.element_size(), 1)
                yield from (
                    (tensor, part) for part in pieces([view.permute(order), into.permute(order)], limit)
                )

        self._host.each(cut(), lambda part: self._reader.read(part[0], *part[1]))

    def _copy(self, placed: Sequence[Placed], weights: Sequence[Sequence[float]]) -> None:
        """Numbers that are not averaged: of the one operand that has a weight."""
        [k] = used_sources(weights, len(weights[0]))
        for each in placed:
            data = torch.empty(each.copy.view.shape, dtype=each.copy.view.dtype, device="cpu")
            self._reader.read(each.copy.origin.tensors[k], each.copy.view, data)
            each.copy.destination.copy_(data)
