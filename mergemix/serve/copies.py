"""One recorded write of a load: which part of which parameter comes from which elements of a checkpoint tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mergemix.checkpoints.family import Family
from mergemix.mixture import Mixture
from mergemix.serve.lazy import Origin
from mergemix.serve.low_rank import Folded, cut, pack


@dataclass(frozen=True, slots=True)
class Makeup:
    """What decides which numbers a mixture gives a copy; the same of many copies.

    classes, holders: as of an Origin. deltas: (operand, scale) of each that adapters add.
    """

    classes: tuple[int, ...]
    holders: tuple[int, ...]
    deltas: tuple[tuple[int, float], ...]
    is_floating: bool


class Numbers(NamedTuple):
    """What a copy is the sum with. weights: one per operand. scales: one per adapter that is folded in; () for none."""

    weights: tuple[float, ...]
    scales: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """destination: a view of raw parameter storage. view: of its shape and without memory (see LazyMerge).

    folded: the factors of the adapters that change it, if any do. Both views are then arranged as its cut says: they
    are matrices [m, n] when they are flattened.
    """

    origin: Origin
    destination: torch.Tensor
    view: torch.Tensor
    folded: Folded | None = None

    @property
    def nbytes(self) -> int:
        return self.destination.numel() * self.destination.element_size()

    @property
    def operand_bytes(self) -> int:
        """What one operand has of it."""
        return self.view.numel() * self.view.element_size()

    @property
    def is_static(self) -> bool:
        """All operands are equal here, so that no mixture changes anything."""
        return len(set(self.origin.classes)) == 1 and self.folded is None

    @property
    def makeup(self) -> Makeup:
        deltas = () if self.folded is None else self.origin.deltas
        scales = tuple((operand, delta.scale) for operand, delta in deltas)
        return Makeup(self.origin.classes, self.origin.holders, scales, self.is_floating)

    @property
    def is_floating(self) -> bool:
        return self.view.is_floating_point()

    @property
    def is_direct(self) -> bool:
        """A sum of operands needs no conversion to become the destination's contents."""
        return self.is_floating and self.view.dtype == self.destination.dtype

    @property
    def storage(self) -> int:
        """Address of the parameter's storage."""
        return self.destination.untyped_storage().data_ptr()

    def packed(self, flat: torch.Tensor) -> torch.Tensor:
        """One operand in the destination's shape; `flat` has its elements in the order of the destination's memory."""
        order = memory_order(self.destination)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return flat.view([self.destination.shape[d] for d in order]).permute(inverse)


def copy_of(
    origin: Origin, destination: torch.Tensor, view: torch.Tensor, known: dict[tuple[object, ...], Folded]
) -> Copy | None:
    """The copy of this view of a tensor; None where adapters change it, and their factors cannot be cut for the view.

    known: factors that were read, which copies share. Raises CheckpointError when an adapter cannot be read,
    NonFiniteError naming a factor that holds NaN or Inf.
    """
    if not origin.deltas or not view.numel():
        return Copy(origin, destination, view)
    chosen = cut(view, 0, origin.tensors[0].shape)
    if chosen is None:
        return None
    key = (origin.name, destination.device, view.storage_offset(), view.shape, view.stride())
    if key not in known:
        known[key] = Folded(chosen, pack(origin.deltas, chosen, destination.device))
    return Copy(origin, chosen.arranged(destination), chosen.arranged(view), known[key])


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions by stride, the largest first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def numbers_of(family: Family, mixture: Mixture, makeup: Makeup) -> Numbers:
    """mixture: without groups. Raises ConfigError as Family.coefficients."""
    scales = tuple(family.low_rank_scale(operand, scale, mixture) for operand, scale in makeup.deltas)
    coefficients = family.coefficients(mixture, makeup.holders or None)
    if any(scales):
        return Numbers(
            tuple(coefficient + 0.0 for coefficient in coefficients), tuple(s + 0.0 for s in scales)
        )
    return Numbers(effective_weights(makeup.classes, coefficients, floating=makeup.is_floating))


def effective_weights(
    classes: Sequence[int], coefficients: Sequence[float], *, floating: bool
) -> tuple[float, ...]:
    """Coefficients, one per operand, that give the very same bits with the fewest operands.

    Where all operands that are used are equal, and where numbers are not averaged, it is one of weight 1: a copy.
    """
    used = [k for k, coefficient in enumerate(coefficients) if coefficient != 0.0]
    if len({classes[k] for k in used}) == 1 or not floating:
        return tuple(float(k == classes[used[0]]) for k in range(len(classes)))
    return tuple(coefficient + 0.0 for coefficient in coefficients)


def used_operands(weights: Sequence[float]) -> list[int]:
    return [k for k, weight in enumerate(weights) if weight != 0.0]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits (so -0.0 and 0.0 differ)."""
    return torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )
