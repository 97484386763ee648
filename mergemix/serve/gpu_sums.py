"""Weighted sums into parameters on a GPU: launches that are built once for a set of destinations, then replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mergemix.serve.copies import Copy, memory_order
from mergemix.serve.cpu_sums import PIECE_BYTES, CpuSums
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels.dispatch import GroupedWeightedSum, pieces, used_sources
from mergemix_kernels.pinned import CudaLanes, Lanes, Ring, StreamedSum, Unread

# Sets of destinations that are kept ready: those of a few structures of layer groups, each in a few tiers.
MAX_LAUNCHES = 128

Launch = Callable[[Sequence[Sequence[float]]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A destination on a GPU. sources: one per operand, on the device, on the host or, still in its file, on "meta"."""

    copy: Copy
    sources: tuple[torch.Tensor, ...]


class GpuSums:
    """Writes destinations that are in the memory of one GPU."""

    def __init__(self, reader: ViewReader, host: CpuSums, lanes: Lanes) -> None:
        self._reader, self._host = reader, host
        self._ring = Ring(lanes)
        self._lanes = lanes
        self._launches: OrderedDict[bytes, Launch] = OrderedDict()

    @classmethod
    def on(cls, device: torch.device, reader: ViewReader, host: CpuSums) -> GpuSums:
        return cls(reader, host, CudaLanes(device))

    def write(self, key: bytes, placed: Callable[[], Sequence[Placed]], weights: Sequence[float]) -> None:
        """Write destinations with these weights. key: names them and where their sources are; `placed` gives them."""
        launch = self._launches.pop(key, None) or self._launch(placed())
        self._launches[key] = launch
        if len(self._launches) > MAX_LAUNCHES:
            self._launches.popitem(last=False)
        launch([weights])

    def write_once(self, copy: Copy, weights: Sequence[float]) -> None:
        """Write one destination from the files."""
        self._launch([Placed(copy, (copy.view,) * len(weights))])([weights])

    def fill(self, copy: Copy, operand: int, slot: torch.Tensor) -> None:
        """Read one operand into its slot, on the device or the host."""
        tensor = copy.origin.tensors[operand]

        def read(part: Sequence[torch.Tensor]) -> None:
            view, into = part
            if into.device.type == "cpu":
                self._reader.read(tensor, view, into)
            else:
                data = torch.empty(view.shape, dtype=view.dtype, device="cpu")
                self._reader.read(tensor, view, data)
                into.copy_(data)

        order = memory_order(copy.view)
        limit = max(4 * PIECE_BYTES // copy.view.element_size(), 1)
        self._host.each(iter(pieces([copy.view.permute(order), slot.permute(order)], limit)), read)

    def _launch(self, placed: Sequence[Placed]) -> Launch:
        if not placed[0].copy.is_floating:
            return lambda weights: self._copy(placed, weights)
        groups = [(each.sources, [each.copy.destination]) for each in placed]
        resident = all(
            self._lanes.where(s) == "device" for each in placed for s in each.sources if not s.is_meta
        )
        if resident and all(each.copy.is_direct and not each.sources[0].is_meta for each in placed):
            return GroupedWeightedSum(groups)

        def read(parts: Sequence[Unread]) -> None:
            tensors = [placed[part.group].copy.origin.tensors[part.source] for part in parts]
            self._host.each(
                iter(zip(tensors, parts, strict=True)),
                lambda pair: self._reader.read(pair[0], pair[1].view, pair[1].into),
            )

        return StreamedSum(groups, self._ring, read)

    def _copy(self, placed: Sequence[Placed], weights: Sequence[Sequence[float]]) -> None:
        """Numbers that are not averaged: of the one operand that has a weight."""
        [k] = used_sources(weights, len(weights[0]))
        for each in placed:
            data = torch.empty(each.copy.view.shape, dtype=each.copy.view.dtype, device="cpu")
            self._reader.read(each.copy.origin.tensors[k], each.copy.view, data)
            each.copy.destination.copy_(data)
