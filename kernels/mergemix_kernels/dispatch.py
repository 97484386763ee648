"""Weighted sums of torch tensors, by the device they live on."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mergemix_kernels.weights import MAX_SOURCES, active_weights

Group = tuple[Sequence[torch.Tensor], torch.Tensor]  # (sources, out)

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Elements of a strided group that are gathered at a time: at most 4 MiB (fp32) of scratch per source.
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


def pieces(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[Sequence[torch.Tensor]]:
    """Matching views that together cover `tensors` (equal shapes), each of at most `limit` elements."""
    if tensors[0].numel() <= limit:
        yield tensors
        return
    dim = max(range(tensors[0].dim()), key=lambda d: tensors[0].shape[d])
    step = max(1, limit * tensors[0].shape[dim] // tensors[0].numel())
    for part in zip(*(tensor.split(step, dim) for tensor in tensors), strict=True):
        yield from pieces(part, limit)


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


class _StridedGroups:
    """Groups that cannot be flat views: gathered, summed and scattered piece by piece, through one scratch."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._source_count = len(groups[0][0])
        self._steps = []
        backend = _flat_backend(groups[0][1].device)
        scratch: dict[torch.dtype, list[torch.Tensor]] = {}
        for sources, out in sorted(groups, key=lambda group: group[1].numel(), reverse=True):
            for views in pieces([*sources, out], PIECE_ELEMENTS):
                if out.dtype not in scratch:  # the largest group comes first
                    scratch[out.dtype] = [view.new_empty(min(PIECE_ELEMENTS, out.numel())) for view in views]
                flat = [
                    view.view(-1) if view.is_contiguous() else buffer[: view.numel()]
                    for view, buffer in zip(views, scratch[out.dtype], strict=True)
                ]
                self._steps.append((views, flat, backend([(flat[:-1], flat[-1])])))

    def __call__(self, weights: Sequence[float]) -> None:
        active, _ = active_weights(weights, self._source_count)
        for views, flat, sum_flat in self._steps:
            for k in active:
                if not views[k].is_contiguous():
                    flat[k].view(views[k].shape).copy_(views[k])
            sum_flat(weights)
            if not views[-1].is_contiguous():
                views[-1].copy_(flat[-1].view(views[-1].shape))


def weighted_sum(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """out = sum of weights[k] * sources[k], bit-equal to `reference.weighted_sum`.

    Sources (1 to MAX_SOURCES) and `out` share shape, dtype (bf16, fp16 or fp32) and device; strides are free.
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
    other strides are gathered and scattered through a scratch of PIECE_ELEMENTS per tensor of a group.

    Raises ValueError where this does not hold.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        flat: list[Group] = []
        strided: list[Group] = []
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
            (flat if dense else strided).append((kept_sources, kept_out))
        self._sums: list[Callable[[Sequence[float]], None]] = []
        if flat:
            self._sums.append(_flat_backend(flat[0][1].device)(flat))
        if strided:
            self._sums.append(_StridedGroups(strided))

    def __call__(self, weights: Sequence[float]) -> None:
        """Write every out. ValueError for weights that `active_weights` refuses."""
        if self._source_count is not None:
            active_weights(weights, self._source_count)  # refuse before anything is written
        for write_outs in self._sums:
            write_outs(weights)
