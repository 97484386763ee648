"""One recorded write of a load: which part of which parameter comes from which elements of a checkpoint tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mergemix.serve.lazy import Origin


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """destination: a view of raw parameter storage. view: of its shape and without memory (see LazyMerge)."""

    origin: Origin
    destination: torch.Tensor
    view: torch.Tensor

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
        return len(set(self.origin.classes)) == 1

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


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Dimensions by stride, the largest first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


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
