"""The swap plan of one rank: which slice of which parameter is merged from which slices of the operands.

Recorded while vLLM loads the model for the first time, then replayed with other coefficients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mergemix.errors import NonFiniteError
from mergemix.serve.lazy import LazyMerge, Origin
from mergemix_kernels import reference
from mergemix_kernels.dispatch import Group, GroupedWeightedSum, pieces
from mergemix_kernels.pinned import CudaLanes, Ring, StreamedSum

# Bounds what a swap stages at a time, all operands together, where sources and destination differ in dtype. Operands
# that are not on the GPU of their destination go through a ring instead, which has a bound of its own.
STAGE_BYTES = 256 << 20
CHECK_ELEMENTS = 1 << 20
SAMPLE_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True)
class Copy:
    """One recorded write: `destination` (a view of raw parameter storage) from one view per operand, same shape."""

    origin: Origin
    destination: torch.Tensor
    sources: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.destination.element_size()

    @property
    def is_static(self) -> bool:
        """All operands are equal here, so that no mixture changes anything."""
        return len(set(self.origin.classes)) == 1

    @property
    def is_direct(self) -> bool:
        """The kernel can write straight into the destination."""
        source = self.sources[0]
        return (
            source.is_floating_point()
            and source.dtype == self.destination.dtype
            and source.device == self.destination.device
        )

    @property
    def is_streamed(self) -> bool:
        """The operands go to the destination's GPU in pieces, and are summed there."""
        device = self.destination.device
        outside = any(source.device != device for source in self.sources)
        return device.type == "cuda" and outside and self.sources[0].is_floating_point()


class SwapPlan:
    """Records the first load (it is the lazy tensors' Recorder), then replays it.

    operands: their names, in the order of summation. coefficients: of the weights that were written last, one per
    operand, 0.0 for those that are not read. unreplayable: why the plan must not be replayed; empty when it may be.
    nbytes: what a swap writes.
    """

    def __init__(self, operands: Sequence[str], coefficients: Sequence[float]) -> None:
        self.operands = tuple(operands)
        self.coefficients = list(coefficients)
        self.copies: list[Copy] = []
        self.unreplayable: list[str] = []
        self.nbytes = 0
        self._grouped: list[tuple[Origin, list[Copy], GroupedWeightedSum | StreamedSum]] = []
        self._staged: list[Copy] = []
        self._rings: dict[torch.device, Ring] = {}

    def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
        """Write the merge into `destination` and remember where it came from.

        Rounded once to the operands' dtype, then converted as `copy_` converts: what is written equals a disk merge
        that is loaded. Raises NonFiniteError naming tensor and operand when any operand, also one with coefficient
        zero, holds NaN or Inf there.
        """
        views = tuple(view.expand(destination.shape) for view in lazy.views)
        copy = Copy(lazy.origin, destination.detach(), views)
        self._write([copy], self.coefficients)
        self._check_finite(copy)
        self.copies.append(copy)

    def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
        """The merge as numbers; correct for this load, but a swap cannot follow it."""
        self.unreplayable.append(f"{lazy.origin.name}: {operation} needs the values while loading")
        dense = torch.empty(lazy.shape, dtype=lazy.dtype, device=lazy.device)
        self._write([Copy(lazy.origin, dense, lazy.views)], self.coefficients)
        return dense

    def seal(self, storages: Iterable[torch.Tensor]) -> None:
        """End the recording. storages: every parameter and buffer of the model, as loaded and not yet processed."""
        addresses = {tensor.untyped_storage().data_ptr() for tensor in storages}
        last: dict[tuple[object, ...], Copy] = {}
        for copy in self.copies:
            place = copy.destination
            last[_region(place)] = copy  # of two writes to one place the later one counts
            if place.untyped_storage().data_ptr() not in addresses:
                self.unreplayable.append(
                    f"{copy.origin.name}: it is copied into a temporary, not into a parameter"
                )
        self.copies = list(last.values())
        for name in _overlapping(self.copies):
            self.unreplayable.append(f"{name}: its place in the parameter overlaps another tensor's")
        moving = [copy for copy in self.copies if not copy.is_static]
        self.nbytes = sum(copy.nbytes for copy in moving)
        self._staged = [copy for copy in moving if not copy.is_direct and not copy.is_streamed]
        alike: dict[tuple[object, ...], list[Copy]] = {}
        for copy in moving:
            if copy.is_direct or copy.is_streamed:
                key = (copy.origin.classes, copy.is_streamed, copy.destination.device)
                alike.setdefault(key, []).append(copy)
        for copies in alike.values():
            groups = [(copy.sources, [copy.destination]) for copy in copies]
            sums = self._streamed(groups) if copies[0].is_streamed else GroupedWeightedSum(groups)
            self._grouped.append((copies[0].origin, copies, sums))

    def _streamed(self, groups: Sequence[Group]) -> StreamedSum:
        """All sums into one GPU share a ring, which stays: vLLM counts it when it measures free memory."""
        device = groups[0][1][0].device
        if device not in self._rings:
            self._rings[device] = Ring(CudaLanes(device))
        return StreamedSum(groups, self._rings[device])

    def bytes_by_storage(self, *, static: bool = False) -> dict[int, int]:
        """Bytes that a swap writes (with `static`: that the load wrote), by the address of the storage."""
        written: dict[int, int] = {}
        for copy in self.copies:
            if static or not copy.is_static:
                address = copy.destination.untyped_storage().data_ptr()
                written[address] = written.get(address, 0) + copy.nbytes
        return written

    def write(self, coefficients: Sequence[float]) -> None:
        """Write the merge with other coefficients into every destination that a mixture can change."""
        for origin, copies, grouped in self._grouped:
            used = _used(coefficients)
            if _all_equal(origin, used):
                for copy in copies:
                    copy.destination.copy_(copy.sources[used[0]])
            else:
                grouped([coefficients])
        self._write(self._staged, coefficients)
        self.coefficients = list(coefficients)

    def mismatches(self, coefficients: Sequence[float], *, sample: bool) -> list[str]:
        """Tensors whose destinations do not hold, bit for bit, what the fp32 reference gives for the coefficients.

        sample: only the first SAMPLE_ELEMENTS elements of each destination are looked at.
        """
        used = _used(coefficients)
        weights = [coefficients[k] for k in used]
        bad = []
        for copy in self.copies:
            tensors = [*(copy.sources[k] for k in used), copy.destination]
            for *parts, target in pieces(tensors, SAMPLE_ELEMENTS if sample else CHECK_ELEMENTS):
                equal = _all_equal(copy.origin, used) or not parts[0].is_floating_point()
                expected = parts[0] if equal else reference.weighted_sum(parts, weights)
                if not same_bits(target, expected.to(device=target.device, dtype=target.dtype)):
                    bad.append(copy.origin.name)
                    break
                if sample:
                    break
        return bad

    def _write(self, copies: Iterable[Copy], coefficients: Sequence[float]) -> None:
        """Merge into each destination, by the way that its operands' places and types allow."""
        used = _used(coefficients)
        staged = []
        for copy in copies:
            first = copy.sources[used[0]]
            if not first.is_floating_point() or _all_equal(copy.origin, used):
                copy.destination.copy_(first)
            elif copy.is_streamed:
                self._streamed([(copy.sources, [copy.destination])])([coefficients])
            else:
                staged.append(copy)
        _write_staged(staged, coefficients)

    def _check_finite(self, copy: Copy) -> None:
        source = copy.sources[0]
        if not source.is_floating_point():
            return
        used = _used(self.coefficients)
        finite = source.dtype == copy.destination.dtype and _is_finite(copy.destination)
        # A finite sum vouches for every operand in it: NaN and Inf survive any sum.
        suspects = [k for k in range(len(self.operands)) if not (finite and k in used)]
        holders = [self.operands[k] for k in suspects if not _is_finite(copy.sources[k])]
        if holders:
            raise NonFiniteError(f"tensor {copy.origin.name!r} holds NaN or Inf in {', '.join(holders)}")
        if not finite and not _is_finite(copy.destination):
            raise NonFiniteError(
                f"tensor {copy.origin.name!r}: the weighted sum is beyond the range of {copy.destination.dtype}, "
                "though all of its inputs are finite; use smaller weights"
            )


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits (so -0.0 and 0.0 differ)."""
    return torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def _write_staged(copies: Iterable[Copy], coefficients: Sequence[float]) -> None:
    """Merge into each destination, through bounded pieces on its device and in the operands' dtype."""
    used = _used(coefficients)
    weights = [coefficients[k] for k in used]
    batch: list[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]] = []
    staged = 0

    def flush() -> None:
        if batch:
            GroupedWeightedSum([(parts, [merged]) for parts, merged, _ in batch])([weights])
        for _, merged, target in batch:
            if merged is not target:
                target.copy_(merged)
        batch.clear()

    for copy in copies:
        first = copy.sources[used[0]]
        copies_of_element = first.element_size() * (len(used) + 1)
        limit = max(1, STAGE_BYTES // copies_of_element)
        for *parts, target in pieces([*(copy.sources[k] for k in used), copy.destination], limit):
            if staged + target.numel() * copies_of_element > STAGE_BYTES:
                flush()
                staged = 0
            parts = [part.to(target.device) for part in parts]
            same = target.dtype == first.dtype
            merged = target if same else torch.empty(target.shape, dtype=first.dtype, device=target.device)
            batch.append((parts, merged, target))
            staged += target.numel() * copies_of_element
    flush()


def _used(coefficients: Sequence[float]) -> list[int]:
    return [k for k, coefficient in enumerate(coefficients) if coefficient != 0.0]


def _all_equal(origin: Origin, used: Sequence[int]) -> bool:
    return len({origin.classes[k] for k in used}) == 1


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _region(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _overlapping(copies: Sequence[Copy]) -> list[str]:
    """Names of tensors whose destination shares an element with another's."""
    spans: dict[int, list[tuple[int, int, Copy]]] = {}
    for copy in copies:
        place = copy.destination
        begin = int(place.storage_offset())
        end = begin + 1 + sum((n - 1) * s for n, s in zip(place.shape, place.stride(), strict=True))
        if place.numel():
            spans.setdefault(place.untyped_storage().data_ptr(), []).append((begin, end, copy))
    names = []
    for group in spans.values():
        group.sort(key=lambda span: span[:2])
        if any(after[0] < before[1] for before, after in pairwise(group)):
            names += _sharing_elements([copy for _, _, copy in group])
    return names


def _sharing_elements(copies: Sequence[Copy]) -> list[str]:
    """Strided destinations may interleave without sharing anything, so every element is marked."""
    storage = copies[0].destination.untyped_storage()
    marked = torch.zeros(storage.nbytes() // copies[0].destination.element_size(), dtype=torch.bool)
    names = []
    for copy in copies:
        place = copy.destination
        view = marked.as_strided(place.shape, place.stride(), place.storage_offset())
        if view.any():
            names.append(copy.origin.name)
        view.fill_(True)
    return names
