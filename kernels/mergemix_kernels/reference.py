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
    active, active_values = active_weights(weights, len(sources))
    scaled = [sources[k].to(torch.float32) * w for k, w in zip(active, active_values.tolist(), strict=True)]
    total = scaled[0]
    for product in scaled[1:]:
        total = total + product
    return total.to(sources[0].dtype)
