"""Compares live parameters with the fp32 reference, computed from the checkpoints' files and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergemix.serve.copies import Copy, Numbers, memory_order, same_bits, used_operands
from mergemix.serve.low_rank import pack
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels import reference
from mergemix_kernels.dispatch import pieces
from mergemix_kernels.low_rank import row_pieces

CHECK_ELEMENTS = 1 << 20


def differs(copy: Copy, numbers: Numbers, reader: ViewReader) -> bool:
    """Whether the destination holds anything but, bit for bit, the sum with these numbers."""
    weights = numbers.weights
    used = used_operands(weights)
    if copy.view.numel() == 0:
        return False
    if numbers.scales:
        return _folded_differs(copy, numbers, reader)
    order = memory_order(copy.view)
    for view, target in pieces([copy.view.permute(order), copy.destination.permute(order)], CHECK_ELEMENTS):
        parts = _read(copy, used, view, reader)
        is_copy = len(used) == 1 and weights[used[0]] == 1.0
        expected = parts[0] if is_copy else reference.weighted_sum(parts, [weights[k] for k in used])
        if not same_bits(target, expected.to(device=target.device, dtype=target.dtype)):
            return True
    return False


def _folded_differs(copy: Copy, numbers: Numbers, reader: ViewReader) -> bool:
    """As `differs`, of a destination that adapters change: their factors are read anew."""
    assert copy.folded is not None
    factors = pack(copy.origin.deltas, copy.folded.cut)
    scales = factors.scales(numbers.scales)
    used = used_operands(numbers.weights)
    weights = [numbers.weights[k] for k in used]
    columns = factors.right.shape[1]
    for rows, (view, target) in row_pieces([copy.view, copy.destination], columns, CHECK_ELEMENTS):
        parts = [part.reshape(-1, columns) for part in _read(copy, used, view, reader)]
        expected = reference.low_rank_sum(parts, weights, factors.left[rows], factors.right, scales)
        if not same_bits(target, expected.view(view.shape).to(device=target.device, dtype=target.dtype)):
            return True
    return False


def _read(copy: Copy, used: Sequence[int], view: torch.Tensor, reader: ViewReader) -> list[torch.Tensor]:
    """A part of each operand that is used, on the host."""
    parts = []
    for k in used:
        parts.append(torch.empty(view.shape, dtype=view.dtype, device="cpu"))
        reader.read(copy.origin.tensors[k], view, parts[-1])
    return parts
