"""Weighted sums of torch tensors, by the device they live on."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mergemix_kernels.weights import MAX_SOURCES, active_weights

Group = tuple[Sequence[torch.Tensor], torch.Tensor]  # (sources, out)

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Elements of a strided group that are gathered at a time: at most 4 MiB (fp32) of temporaries per source.
PIECE_ELEMENTS = 1 << 20


def _check_group(sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"the number of sources must be from 1 to {MAX_SOURCES}, but got {len(sources)}")
    if out.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, but got {out.dtype}")
    for k, source in enumerate(sources):
        for rule in ("dtype", "shape", "device"):
            if getattr(source, rule) != getattr(out, rule):
                raise ValueError(
                    f"source {k} and out must have the same {rule}, "
                    f"but got {getattr(source, rule)} and {getattr(out, rule)}"
                )


def _flatten(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """1-D views of all tensors in one common order of elements, or None where only a copy could be flat.

    Tensors that are dense and laid out alike (all transposed, say) qualify.
    """
    order = sorted(range(tensors[-1].dim()), key=lambda d: tensors[-1].stride(d), reverse=True)
    permuted = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in permuted):
        return None
    return [tensor.view(-1) for tensor in permuted]


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """Matching views that cover all tensors, each of at most PIECE_ELEMENTS elements."""
    numel = tensors[-1].numel()
    if numel <= PIECE_ELEMENTS:
        yield tensors
        return
    dim = max(range(tensors[-1].dim()), key=lambda d: tensors[-1].shape[d])
    length = tensors[-1].shape[dim]
    step = max(1, PIECE_ELEMENTS * length // numel)
    for part in zip(*(tensor.split(step, dim) for tensor in tensors), strict=True):
        yield from _pieces(part)


class _CpuGroups:
    """Flat groups on the CPU, as `triton_kernels.GroupedWeightedSum` is for a GPU."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = [
            ([_as_array(source) for source in sources], _as_array(out), DTYPE_NAMES[out.dtype])
            for sources, out in groups
        ]

    def __call__(self, weights: Sequence[float]) -> None:
        from mergemix_kernels import cpu

        for sources, out, dtype in self._groups:
            cpu.weighted_sum(sources, weights, out, dtype)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a flat tensor, without a copy: bit patterns for bf16 and fp16."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def _flat_backend(device: torch.device) -> Callable[[Sequence[Group]], Callable[[Sequence[float]], None]]:
    if device.type == "cpu":
        return _CpuGroups
    if device.type == "cuda":
        from mergemix_kernels import triton_kernels

        return triton_kernels.GroupedWeightedSum
    raise ValueError(f"tensors must be on a CPU or a GPU that Triton can use, but got device {device}")


def _sum_strided(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """Gather, sum and scatter piece by piece."""
    active, _ = active_weights(weights, len(sources))
    used = [weights[k] for k in active]
    backend = _flat_backend(out.device)
    for *parts, target in _pieces([*(sources[k] for k in active), out]):
        result = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        backend([([part.contiguous().view(-1) for part in parts], result.view(-1))])(used)
        target.copy_(result)


def weighted_sum(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """out = sum of weights[k] * sources[k], bit-equal to `reference.weighted_sum`.

    Sources (1 to 64) and `out` share shape, dtype (bf16, fp16 or fp32) and device; strides are free.
    `out` may be one of the sources; it must not overlap one in part. Sources of weight zero are not read.

    Raises ValueError where these do not hold, and for weights that `active_weights` refuses.
    """
    GroupedWeightedSum([(sources, out)])(weights)


class GroupedWeightedSum:
    """The same weighted sum over many groups of tensors at once, replayed with new weights each call.

    Args:
        groups: (sources, out) pairs as for `weighted_sum`. All have the same number of sources and one
            device; dtype, shape and strides may differ between groups. The tensors are kept, and must
            keep their storage: their addresses are taken once.

    On a GPU all groups that are dense in one order of elements share a launch (see `triton_kernels`);
    other strides are gathered and scattered through temporaries of PIECE_ELEMENTS.

    Raises ValueError where this does not hold.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        flat: list[Group] = []
        self._strided: list[Group] = []
        self._source_count = len(groups[0][0]) if groups else None
        for sources, out in groups:
            _check_group(sources, out)
            if len(sources) != self._source_count or out.device != groups[0][1].device:
                raise ValueError(
                    "all groups must have one number of sources and one device, but got "
                    f"{self._source_count} on {groups[0][1].device} and {len(sources)} on {out.device}"
                )
            tensors = [tensor.detach() for tensor in (*sources, out)]
            dense = _flatten(tensors)
            *kept_sources, kept_out = dense or tensors
            (flat if dense else self._strided).append((kept_sources, kept_out))
        self._sum_flat = _flat_backend(flat[0][1].device)(flat) if flat else None

    def __call__(self, weights: Sequence[float]) -> None:
        """Write every out. ValueError for weights that `active_weights` refuses."""
        if self._source_count is not None:
            active_weights(weights, self._source_count)  # refuse before anything is written
        if self._sum_flat is not None:
            self._sum_flat(weights)
        for sources, out in self._strided:
            _sum_strided(sources, weights, out)
