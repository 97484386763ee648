"""Weighted sums of torch tensors, by the device they live on."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mergemix_kernels.weights import MAX_SOURCES, active_weights

Group = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # (K sources, P outs)
Sums = Callable[[Sequence[Sequence[float]]], None]  # called with weights [P][K]

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Elements of a strided group that are gathered at a time: at most 4 MiB (fp32) of scratch per source.
PIECE_ELEMENTS = 1 << 20


def _check_group(sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"the number of sources must be from 1 to {MAX_SOURCES}, but got {len(sources)}")
    first = outs[0]
    if first.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, but got {first.dtype}")
    names = [*(f"source {k}" for k in range(len(sources))), *(f"out {p}" for p in range(len(outs)))]
    for name, tensor in zip(names, (*sources, *outs), strict=True):
        for rule in ("dtype", "shape", "device"):
            if getattr(tensor, rule) != getattr(first, rule):
                raise ValueError(
                    f"{name} and out must have the same {rule}, "
                    f"but got {getattr(tensor, rule)} and {getattr(first, rule)}"
                )
    if len(outs) > 1 and first.numel() > 0:
        places = [tensor.data_ptr() for tensor in (*outs, *sources)]
        if len(set(places)) < len(outs) + len(set(places[len(outs) :])):
            raise ValueError("of several outs none may be another, or a source")


def flatten(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """1-D views of all tensors in one common order of elements, or None where only a copy could be flat.

    Tensors that are dense and laid out alike (all transposed, say) qualify.
    """
    order = sorted(range(tensors[-1].dim()), key=lambda d: tensors[-1].stride(d), reverse=True)
    permuted = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in permuted):
        return None
    return [tensor.view(-1) for tensor in permuted]


def pieces(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[Sequence[torch.Tensor]]:
    """Matching views that together cover `tensors` (equal shapes), each of at most `limit` elements, at least one.

    Cut along the first dimension, so that parts of contiguous tensors are contiguous; where one row is too
    much, each row is cut alike.
    """
    count = tensors[0].numel()
    if count <= limit:
        yield tensors
        return
    rows = tensors[0].shape[0]
    step = limit * rows // count
    if step == 0:
        for row in zip(*(tensor.unbind() for tensor in tensors), strict=True):
            yield from pieces(row, limit)
    else:
        yield from zip(*(tensor.split(step) for tensor in tensors), strict=True)


class _CpuGroups:
    """Flat groups on the CPU, as `triton_kernels.GroupedWeightedSum` is for a GPU."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = [
            (
                [_as_array(source) for source in sources],
                [_as_array(out) for out in outs],
                DTYPE_NAMES[outs[0].dtype],
            )
            for sources, outs in groups
        ]

    def __call__(self, weights: Sequence[Sequence[float]]) -> None:
        from mergemix_kernels.cpu import WeightedSums

        weighted_sums = WeightedSums(weights, len(self._groups[0][0]))
        for sources, outs, dtype in self._groups:
            weighted_sums(sources, outs, dtype)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a flat tensor, without a copy: bit patterns for bf16 and fp16."""
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def _flat_backend(device: torch.device) -> Callable[[Sequence[Group]], Sums]:
    if device.type == "cpu":
        return _CpuGroups
    if device.type == "cuda":
        from mergemix_kernels import triton_kernels

        return triton_kernels.GroupedWeightedSum
    raise ValueError(f"tensors must be on a CPU or a GPU that Triton can use, but got device {device}")


def used_sources(weights: Sequence[Sequence[float]], source_count: int) -> list[int]:
    """Indices of the sources that any row of weights [P][K] uses. ValueError as from `active_weights`."""
    return sorted({k for of_output in weights for k in active_weights(of_output, source_count)[0]})


class _StridedGroups:
    """Groups that cannot be flat views: gathered, summed and scattered piece by piece, through one scratch."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._source_count = len(groups[0][0])
        self._steps = []
        backend = _flat_backend(groups[0][1][0].device)
        scratch: dict[torch.dtype, list[torch.Tensor]] = {}
        for sources, outs in sorted(groups, key=lambda group: group[1][0].numel(), reverse=True):
            for views in pieces([*sources, *outs], PIECE_ELEMENTS):
                dtype, count = outs[0].dtype, outs[0].numel()
                if dtype not in scratch:  # the largest group comes first
                    scratch[dtype] = [view.new_empty(min(PIECE_ELEMENTS, count)) for view in views]
                flat = [
                    view.view(-1) if view.is_contiguous() else buffer[: view.numel()]
                    for view, buffer in zip(views, scratch[dtype], strict=True)
                ]
                sum_flat = backend([(flat[: len(sources)], flat[len(sources) :])])
                self._steps.append((views, flat, sum_flat))

    def __call__(self, weights: Sequence[Sequence[float]]) -> None:
        used = used_sources(weights, self._source_count)
        for views, flat, sum_flat in self._steps:
            for k in used:
                if not views[k].is_contiguous():
                    flat[k].view(views[k].shape).copy_(views[k])
            sum_flat(weights)
            for out, summed in list(zip(views, flat, strict=True))[self._source_count :]:
                if not out.is_contiguous():
                    out.copy_(summed.view(out.shape))


def weighted_sum(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """out = sum of weights[k] * sources[k], bit-equal to `reference.weighted_sum`.

    Sources (1 to MAX_SOURCES) and `out` share shape, dtype (bf16, fp16 or fp32) and device; strides are free.
    `out` may be one of the sources; it must not overlap one in part. Sources of weight zero are not read.

    Raises ValueError where these do not hold, and for weights that `active_weights` refuses.
    """
    GroupedWeightedSum([(sources, [out])])([weights])


class GroupedWeightedSum:
    """The same weighted sums over many groups of tensors at once, replayed with new weights each call.

    outs[p] = sum of weights[p][k] * sources[k], each bit-equal to a `weighted_sum` of its own; the sources are
    read once for all of them.

    Args:
        groups: (sources, outs) pairs; the tensors of one are as for `weighted_sum`, and of several outs none
            may overlap another or a source. All groups have the same numbers of sources and of outs (on a GPU
            at most `weights.MAX_OUTPUTS`) and one device; dtype, shape and strides may differ between groups. The
            tensors are kept, and must keep their storage: their addresses are taken once.

    On a GPU all groups that are dense in one order of elements share one launch (see `triton_kernels`);
    other strides are gathered and scattered through a scratch of PIECE_ELEMENTS per tensor of a group.

    Raises ValueError where this does not hold.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        flat: list[Group] = []
        strided: list[Group] = []
        self._counts = (len(groups[0][0]), len(groups[0][1])) if groups else None
        for sources, outs in groups:
            self._check_alike(sources, outs, groups[0][1])
            _check_group(sources, outs)
            tensors = [tensor.detach() for tensor in (*sources, *outs)]
            dense = flatten(tensors)
            kept = dense or tensors
            (flat if dense else strided).append((kept[: len(sources)], kept[len(sources) :]))
        self._sums: list[Sums] = []
        if flat:
            self._sums.append(_flat_backend(flat[0][1][0].device)(flat))
        if strided:
            self._sums.append(_StridedGroups(strided))

    def _check_alike(self, sources: Sequence, outs: Sequence[torch.Tensor], first_outs: Sequence) -> None:
        if not outs:
            raise ValueError("there must be at least one out, but got none")
        if (len(sources), len(outs)) != self._counts or outs[0].device != first_outs[0].device:
            raise ValueError(
                "all groups must have one number of sources, one of outs and one device, but got "
                f"{self._counts} on {first_outs[0].device} and {(len(sources), len(outs))} on {outs[0].device}"
            )

    def __call__(self, weights: Sequence[Sequence[float]]) -> None:
        """Write every out. ValueError for weights that are not [P][K], or that `active_weights` refuses."""
        if self._counts is None:
            return
        source_count, outputs = self._counts
        if len(weights) != outputs:
            raise ValueError(f"there must be weights for {outputs} outs, but got {len(weights)}")
        used_sources(weights, source_count)  # refuse before anything is written
        for write_outs in self._sums:
            write_outs(weights)
