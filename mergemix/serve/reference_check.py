"""Compares live parameters with the fp32 reference, computed from the checkpoints' files and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mergemix.serve.copies import Copy, memory_order, same_bits, used_operands
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels import reference
from mergemix_kernels.dispatch import pieces

CHECK_ELEMENTS = 1 << 20
SAMPLE_ELEMENTS = 1 << 16


def differs(copy: Copy, weights: Sequence[float], reader: ViewReader, *, sample: bool = False) -> bool:
    """Whether the destination holds anything but, bit for bit, the sum with these (effective) weights.

    sample: only a first part of about SAMPLE_ELEMENTS elements is looked at.
    """
    used = used_operands(weights)
    if copy.view.numel() == 0:
        return False
    order = memory_order(copy.view)
    limit = SAMPLE_ELEMENTS if sample else CHECK_ELEMENTS
    for view, target in pieces([copy.view.permute(order), copy.destination.permute(order)], limit):
        parts = []
        for k in used:
            parts.append(torch.empty(view.shape, dtype=view.dtype, device="cpu"))
            reader.read(copy.origin.tensors[k], view, parts[-1])
        is_copy = len(used) == 1 and weights[used[0]] == 1.0
        expected = parts[0] if is_copy else reference.weighted_sum(parts, [weights[k] for k in used])
        if not same_bits(target, expected.to(device=target.device, dtype=target.dtype)):
            return True
        if sample:
            break
    return False
