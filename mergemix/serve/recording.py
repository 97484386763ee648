"""Records the first load of a model: it writes the merge into the parameters, and remembers what came from where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from mergemix.checkpoints.family import Family
from mergemix.errors import NonFiniteError
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import check_mixture, operands
from mergemix.serve.copies import Copy, effective_weights, used_operands
from mergemix.serve.lazy import LazyMerge, Origin
from mergemix.serve.operand_cache import CacheSizes
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
        self._names = tuple(operand.name for operand in operands(family))
        self._sums = Sums(sum(t.nbytes for o in operands(family) for t in o.tensors.values()))
        self._coefficients: dict[Mixture, list[float]] = {}
        self.copies: list[Copy] = []
        self.unreplayable: list[str] = []

    def lazy_weights(self) -> Iterator[tuple[str, LazyMerge]]:
        """(name, lazy tensor) of every tensor of the family, in the template's order, for `model.load_weights`.

        Nothing is read but what it takes to see which operands are bitwise equal.
        Raises CheckpointError when a file cannot be read.
        """
        members = operands(self._family)
        for name in self._family.template.tensors:
            tensors = tuple(member.tensors[name] for member in members)
            classes = self._sums.reader.equality_classes(tensors)
            yield name, LazyMerge.whole(Origin(name, tensors, classes), self)

    def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
        """Write the merge into `destination` and remember where it came from.

        Rounded once to the operands' dtype, then converted as `copy_` converts: what is written equals a disk merge
        that is loaded. Raises NonFiniteError naming tensor and operand when any operand, also one with coefficient
        zero, holds NaN or Inf there.
        """
        copy = Copy(lazy.origin, destination.detach(), lazy.elements.expand(destination.shape))
        coefficients = self._of(lazy.origin)
        finite = self._write(copy)
        if copy.is_floating:
            self._check_finite(copy, finite, coefficients)
        self.copies.append(copy)

    def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
        """The merge as numbers; correct for this load, but a swap cannot follow it."""
        self.unreplayable.append(f"{lazy.origin.name}: {operation} needs the values while loading")
        dense = torch.empty(lazy.shape, dtype=lazy.dtype, device=lazy.device)
        self._write(Copy(lazy.origin, dense, lazy.elements))
        return dense

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

    def _of(self, origin: Origin) -> list[float]:
        mixture = self._mixture.at(origin.name)
        if mixture not in self._coefficients:
            self._coefficients[mixture] = self._family.coefficients(mixture)
        return self._coefficients[mixture]

    def _write(self, copy: Copy) -> bool:
        weights = effective_weights(copy.origin.classes, self._of(copy.origin), floating=copy.is_floating)
        return self._sums.write_once(copy, weights)

    def _check_finite(self, copy: Copy, finite: bool, coefficients: Sequence[float]) -> None:
        """finite: of the sum that was written. A finite sum vouches for its operands: NaN and Inf survive any sum."""
        classes = copy.origin.classes
        vouched = {classes[k] for k in used_operands(coefficients)} if finite else set()
        suspects = sorted(set(classes) - vouched)
        bad = {k for k in suspects if not self._sums.is_finite(copy, k)}
        if holders := [name for name, k in zip(self._names, classes, strict=True) if k in bad]:
            raise NonFiniteError(f"tensor {copy.origin.name!r} holds NaN or Inf in {', '.join(holders)}")
        if not finite:
            raise NonFiniteError(
                f"tensor {copy.origin.name!r}: the weighted sum is beyond the range of {copy.destination.dtype}, "
                "though all of its inputs are finite; use smaller weights"
            )


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
