"""The weighted sum in plain torch: what every other implementation must equal bit for bit."""

from collections.abc import Sequence

import torch

from mergemix_kernels.weights import active_weights


def weighted_sum(sources: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum of weights[k] * sources[k], in the sources' dtype, shape and order.

    Weights are rounded to fp32. Every product and every sum is rounded to fp32 on its own (no fused
    multiply-add), and the total is rounded once, to nearest even, to the sources' dtype. The first
    product starts the sum (a start at +0.0 would lose -0.0). Sources of weight zero are absent.

    Raises ValueError for weights that `active_weights` refuses.
    """
    return _accumulated(sources, weights).to(sources[0].dtype)


def low_rank_sum(
    sources: Sequence[torch.Tensor],
    weights: Sequence[float],
    left: torch.Tensor,
    right: torch.Tensor,
    scales: torch.Tensor,
) -> torch.Tensor:
    """`weighted_sum` of matrices [rows, cols] plus a product of low rank R, in the sources' dtype.

    `left` is fp32 [rows, R], `right` fp32 [R, cols], `scales` fp32 [R]. The addend is the sum over r, in
    order, of (scales[r] * left[i, r]) * right[r, j], every product and sum rounded to fp32 on its own;
    it is added to the unrounded weighted sum, and the result is rounded once. A rank of scale zero is absent.

    Raises ValueError for weights that `active_weights` refuses.
    """
    total = _accumulated(sources, weights)
    addend = None
    for r in scales.nonzero().flatten().tolist():
        product = (scales[r] * left[:, r])[:, None] * right[r]
        addend = product if addend is None else addend + product
    return (total if addend is None else total + addend).to(sources[0].dtype)


def _accumulated(sources: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum in fp32, before it is rounded."""
    active, active_values = active_weights(weights, len(sources))
    scaled = [sources[k].to(torch.float32) * w for k, w in zip(active, active_values.tolist(), strict=True)]
    total = scaled[0]
    for product in scaled[1:]:
        total = total + product
    return total
