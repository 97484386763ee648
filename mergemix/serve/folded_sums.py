"""Sums with the factors of adapters into parameters on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mergemix.checkpoints.header import TensorInfo
from mergemix.serve.copies import Copy, Numbers, used_operands
from mergemix.serve.low_rank import Factors
from mergemix_kernels.low_rank import GroupedLowRankSum, LowRankGroup, row_pieces

# Of one operand that is not on the device, brought there at a time.
STAGED_BYTES = 4 << 20

Read = Callable[[TensorInfo, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A destination on a GPU. sources: one per operand, on the device, on the host or, still in its file, on "meta"."""

    copy: Copy
    sources: tuple[torch.Tensor, ...]

    @property
    def factors(self) -> Factors:
        assert self.copy.folded is not None
        return self.copy.folded.factors


def folded_sums(placed: Sequence[Placed], read: Read) -> Callable[[Numbers], None]:
    """What writes these destinations, all with scales: one launch where all operands are on the device.

    Others are brought there some rows at a time. read: fills a tensor of the host with a view of one of a file.
    """
    device = placed[0].copy.destination.device
    if all(source.device == device for each in placed for source in each.sources):
        sums = GroupedLowRankSum(
            [
                LowRankGroup(each.sources, each.factors.left, each.factors.right, each.copy.destination)
                for each in placed
            ]
        )
        return lambda numbers: sums(numbers.weights, [each.factors.scales(numbers.scales) for each in placed])

    def staged(numbers: Numbers) -> None:
        for each in placed:
            _write_staged(each, numbers, read)

    return staged


def _write_staged(placed: Placed, numbers: Numbers, read: Read) -> None:
    copy, factors = placed.copy, placed.factors
    used = used_operands(numbers.weights)
    weights, scales = [numbers.weights[k] for k in used], factors.scales(numbers.scales)
    views = [copy.destination, copy.view, *(placed.sources[k] for k in used)]
    limit = STAGED_BYTES // copy.view.element_size()
    for rows, (out, view, *sources) in row_pieces(views, factors.right.shape[1], limit):
        staged = []
        for k, source in zip(used, sources, strict=True):
            if source.is_meta:
                source = torch.empty(view.shape, dtype=view.dtype, device="cpu")
                read(copy.origin.tensors[k], view, source)
            staged.append(source.to(out.device))
        group = LowRankGroup(staged, factors.left[rows], factors.right, out)
        GroupedLowRankSum([group])(weights, [scales])
