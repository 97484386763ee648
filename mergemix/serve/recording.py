"""Records the first load of a model: it writes the merge into the parameters, and remembers what came from where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from mergemix.checkpoints.family import Family
from mergemix.errors import NonFiniteError
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import check_mixture
from mergemix.serve.copies import Copy, Numbers, copy_of, numbers_of, used_operands
from mergemix.serve.lazy import LazyMerge
from mergemix.serve.low_rank import Folded
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.origins import family_bytes, origin_of
from mergemix.serve.sums import Sums
from mergemix.serve.swap_plan import SwapPlan


class Recording:
    """The lazy tensors' Recorder. It loads `mixture`.

    copies: what was written so far. unreplayable: why the load must not be replayed with other weights; empty when
    it may be.
    """

    def __init__(self, family: Family, mixture: Mixture) -> None:
        """Raises ConfigError for a mixture that the family cannot give."""
        check_mixture(family, mixture)
        self._family, self._mixture = family, mixture
        self._names = tuple(member.name for member in family.members)
        self._sums = Sums(family_bytes(family))
        self._folded: dict[tuple[object, ...], Folded] = {}
        self.copies: list[Copy] = []
        self.unreplayable: list[str] = []

    def lazy_weights(self) -> Iterator[tuple[str, LazyMerge]]:
        """(name, lazy tensor) of every tensor of the family, in the template's order, for `model.load_weights`.

        Nothing is read but what it takes to see which operands are bitwise equal.
        Raises CheckpointError when a file cannot be read.
        """
        for name in self._family.template.tensors:
            yield name, LazyMerge.whole(origin_of(self._family, name, self._sums.reader), self)

    def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
        """Write the merge into `destination` and remember where it came from.

        Rounded once to the operands' dtype, then converted as `copy_` converts: what is written equals a disk merge
        that is loaded. Raises NonFiniteError naming tensor and operand when any operand, also one with coefficient
        zero, holds NaN or Inf there.
        """
        copy = copy_of(
            lazy.origin, destination.detach(), lazy.elements.expand(destination.shape), self._folded
        )
        if copy is None:
            self.unreplayable.append(
                f"{lazy.origin.name}: what is loaded of it is no choice of rows and columns, as adapters need"
            )
            destination.copy_(self._dense(lazy))
            return
        finite = self._write(copy)
        if copy.is_floating:
            self._check_finite(copy, finite)
        self.copies.append(copy)

    def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
        """The merge as numbers; correct for this load, but a swap cannot follow it."""
        self.unreplayable.append(f"{lazy.origin.name}: {operation} needs the values while loading")
        return self._dense(lazy)

    def finish(self, storages: Iterable[torch.Tensor], sizes: CacheSizes | None = None) -> SwapPlan:
        """End the recording and take the memory of the cache; what remains is a plan that can be replayed.

        storages: every parameter and buffer of the model, as loaded and not yet processed. Raises ConfigError where
        shared memory for the cache is not to be had, CheckpointError for a file that changed meanwhile.
        """
        addresses = {tensor.untyped_storage().data_ptr() for tensor in storages}
        last: dict[tuple[object, ...], Copy] = {}
        for copy in self.copies:
            last[_region(copy.destination)] = copy  # of two writes to one place the later one counts
            if copy.storage not in addresses:
                self.unreplayable.append(
                    f"{copy.origin.name}: it is copied into a temporary, not into a parameter"
                )
        self.copies = list(last.values())
        for name in _overlapping(self.copies):
            self.unreplayable.append(f"{name}: its place in the parameter overlaps another tensor's")
        self._sums.reader.check_unchanged()
        return SwapPlan(
            self._family, self._mixture, self.copies, self._sums, sizes or CacheSizes(), self.unreplayable
        )

    def bytes_by_storage(self) -> dict[int, int]:
        """Bytes that the load wrote, by the address of the storage; each place once."""
        written: dict[int, int] = {}
        for copy in {_region(copy.destination): copy for copy in self.copies}.values():
            written[copy.storage] = written.get(copy.storage, 0) + copy.nbytes
        return written

    def _dense(self, lazy: LazyMerge) -> torch.Tensor:
        """The merge as numbers. Where adapters change the tensor, all of it is made for that."""
        origin, view = lazy.origin, lazy.elements
        whole = (
            torch.empty(origin.tensors[0].shape, dtype=lazy.dtype, device="meta") if origin.deltas else view
        )
        dense = torch.empty(whole.shape, dtype=lazy.dtype, device=lazy.device)
        copy = copy_of(origin, dense, whole, self._folded)
        assert copy is not None
        finite = self._write(copy)
        if copy.is_floating:
            self._check_finite(copy, finite)
        return dense.as_strided(view.shape, view.stride(), view.storage_offset()) if origin.deltas else dense

    def _numbers(self, copy: Copy) -> Numbers:
        return numbers_of(self._family, self._mixture.at(copy.origin.name), copy.makeup)

    def _write(self, copy: Copy) -> bool:
        return self._sums.write_once(copy, self._numbers(copy))

    def _check_finite(self, copy: Copy, finite: bool) -> None:
        """finite: of the sum that was written. A finite sum vouches for its operands: NaN and Inf survive any sum."""
        classes = copy.origin.classes
        vouched = {classes[k] for k in used_operands(self._numbers(copy).weights)} if finite else set()
        suspects = sorted(set(classes) - vouched)
        bad = {k for k in suspects if not self._sums.is_finite(copy, k)}
        if holders := [self._names[k] for k in copy.origin.holders if classes[k] in bad]:
            raise NonFiniteError(f"tensor {copy.origin.name!r} holds NaN or Inf in {', '.join(holders)}")
        if not finite:
            raise NonFiniteError(
                f"tensor {copy.origin.name!r}: the weighted sum is beyond the range of {copy.destination.dtype}, "
                "though all of its inputs are finite; use smaller weights"
            )


def _region(tensor: torch.Tensor) -> tuple[object, ...]:
    """Names a place, however its dimensions are arranged: those that are one in memory are joined."""
    joined: list[tuple[int, int]] = []
    for stride, length in sorted(
        (stride, length) for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if length != 1
    ):
        if joined and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0], joined[-1][1] * length)
        else:
            joined.append((stride, length))
    return (tensor.data_ptr(), *joined)


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
    marked = torch.zeros(
        storage.nbytes() // copies[0].destination.element_size(), dtype=torch.bool, device="cpu"
    )
    names = []
    for copy in copies:
        place = copy.destination
        view = marked.as_strided(place.shape, place.stride(), place.storage_offset())
        if view.any():
            names.append(copy.origin.name)
        view.fill_(True)
    return names
