"""Weighted sums plus low-rank products of torch matrices, by the device they live on; replayed with new numbers.

What folds LoRA adapters into live weights: every destination is a sum of whole operands, plus factors of all
adapters side by side, each rank scaled. Bit-equal to `reference.low_rank_sum` on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mergemix_kernels.dispatch import DTYPE_NAMES, _as_array, pieces, used_sources
from mergemix_kernels.weights import MAX_SOURCES

# Elements of a group that goes through scratch that are summed at a time: at most 4 MiB (fp32) per tensor.
PIECE_ELEMENTS = 1 << 20

Sums = Callable[[Sequence[float], Sequence[torch.Tensor]], None]


@dataclass(frozen=True, eq=False)
class LowRankGroup:
    """out = round(sum_k weights[k] * sources[k] + sum_r (scales[r] * left[:, r]) * right[r]), a matrix [m, n].

    sources: K >= 1 tensors of one shape and dtype (bf16, fp16 or fp32), which flattened is the matrix: its first
    dimensions have m elements, the others n. left: fp32 [m, R]; on a GPU best with columns side by side. right: fp32
    [R, n]. out: of the sources' shape and any floating dtype; where it is not theirs, the sum is rounded to theirs,
    then converted. All on one device; sources and out with any strides. out may be a source, and overlaps nothing
    otherwise.
    """

    sources: Sequence[torch.Tensor]
    left: torch.Tensor
    right: torch.Tensor
    out: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]"""
        return self.left.shape[0], self.right.shape[1]

    @property
    def is_direct(self) -> bool:
        """Whether a kernel can read and write the matrices in place: contiguous, on a GPU row by row."""
        whole = (*self.sources, self.out)
        if any(each.dtype != self.sources[0].dtype for each in whole):
            return False
        if self.out.device.type == "cpu":
            return all(each.is_contiguous() for each in whole)
        return all(rows_of(each, self.shape) is not None for each in whole)

    def check(self) -> None:
        """Raise ValueError where it is not as said above."""
        if not 1 <= len(self.sources) <= MAX_SOURCES:
            raise ValueError(
                f"the number of sources must be from 1 to {MAX_SOURCES}, but got {len(self.sources)}"
            )
        first = self.sources[0]
        if first.dtype not in DTYPE_NAMES or not self.out.is_floating_point():
            raise ValueError(
                f"sources must be {', '.join(map(str, DTYPE_NAMES))} and out floating point, "
                f"but got {first.dtype} and {self.out.dtype}"
            )
        rows, columns = self.shape
        shapes = {each.shape for each in (*self.sources, self.out)}
        ends = [math.prod(self.out.shape[:length]) for length in range(self.out.dim() + 1)]
        fits = len(shapes) == 1 and self.out.numel() == rows * columns and rows in ends
        if (
            self.left.dim() != 2
            or self.right.dim() != 2
            or self.left.shape[1] != self.right.shape[0]
            or not fits
        ):
            raise ValueError(
                "left must be [m, R], right [R, n], and sources and out [m, n] (or with more dimensions), but got left "
                f"{list(self.left.shape)}, right {list(self.right.shape)}, "
                f"sources and out {[list(each.shape) for each in (*self.sources, self.out)]}"
            )
        if {source.dtype for source in self.sources} != {first.dtype}:
            raise ValueError(f"all sources must be {first.dtype}, but got {[s.dtype for s in self.sources]}")
        if {self.left.dtype, self.right.dtype} != {torch.float32}:
            raise ValueError(f"factors must be float32, but got {self.left.dtype} and {self.right.dtype}")
        devices = {each.device for each in (*self.sources, self.left, self.right, self.out)}
        if len(devices) > 1:
            raise ValueError(
                f"all tensors of a group must be on one device, but got {sorted(map(str, devices))}"
            )


def rows_of(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """The tensor as a matrix [m, n] with contiguous rows at equal distances, None where its strides do not allow it."""
    try:
        matrix = tensor.view(shape)
    except RuntimeError:
        return None
    return matrix if matrix.stride(1) == 1 or shape[1] == 1 else None


def row_pieces(
    tensors: Sequence[torch.Tensor], columns: int, limit: int
) -> Iterator[tuple[slice, Sequence[torch.Tensor]]]:
    """Matching views of whole rows that together cover `tensors`, and which rows: of `limit` elements or one row.

    tensors: of one shape, which flattened is a matrix of so many columns, as in `LowRankGroup`.
    """
    begin = 0
    for views in pieces(tensors, max(limit, columns)):
        rows = slice(begin, begin + views[0].numel() // columns)
        yield rows, views
        begin = rows.stop


class GroupedLowRankSum:
    """Many groups at once, replayed with new weights and scales.

    groups: all with the same number of sources and on one device; shapes, ranks, dtypes and strides may differ. The
    tensors are kept, and must keep their storage: on a GPU their addresses are taken once. There all groups whose
    rows are contiguous share one launch. What is not contiguous otherwise goes through scratch of PIECE_ELEMENTS (or
    a row) per tensor, which all groups share.

    Raises ValueError where this or what `LowRankGroup` says does not hold.
    """

    def __init__(self, groups: Sequence[LowRankGroup]) -> None:
        self._groups = [group for group in groups if group.out.numel()]
        self._kept = [index for index, group in enumerate(groups) if group.out.numel()]
        self._source_count = len(groups[0].sources) if groups else 0
        for group in groups:
            group.check()
            told = (len(group.sources), group.out.device)
            if told != (self._source_count, groups[0].out.device):
                raise ValueError(
                    "all groups must have one number of sources and one device, but got "
                    f"{(self._source_count, groups[0].out.device)} and {told}"
                )
        self._ranks = [group.right.shape[0] for group in groups]
        self._steps: list[tuple[list[int], Sums]] = []
        direct = [index for index, group in enumerate(self._groups) if group.is_direct]
        if direct:
            backend = _backend(groups[0].out.device)
            self._steps.append((direct, backend([self._groups[index] for index in direct])))
        scratch: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        strided = [index for index, group in enumerate(self._groups) if not group.is_direct]
        for index in sorted(strided, key=lambda index: self._groups[index].out.numel(), reverse=True):
            group = self._groups[index]
            self._steps.append(([index], _Scratched(group, scratch)))

    def __call__(self, weights: Sequence[float], scales: Sequence[torch.Tensor]) -> None:
        """Write every out. weights: one per source. scales: fp32 [R] on the CPU per group; a rank of 0.0 is absent.

        On a GPU the work is queued on its current stream. Raises ValueError for weights that `active_weights`
        refuses, and for scales that are not finite or of another shape; nothing is written then.
        """
        if not self._ranks:
            return
        used_sources([weights], self._source_count)
        if [tuple(each.shape) for each in scales] != [(ranks,) for ranks in self._ranks]:
            raise ValueError(
                f"there must be scales of {self._ranks} ranks, but got {[list(each.shape) for each in scales]}"
            )
        for each in scales:
            if each.dtype != torch.float32 or not torch.isfinite(each).all():
                raise ValueError(f"scales must be finite float32, but got {each}")
        kept = [scales[index] for index in self._kept]
        for members, sums in self._steps:
            sums(weights, [kept[index] for index in members])


class _CpuSums:
    """Contiguous groups, one after the other."""

    def __init__(self, groups: Sequence[LowRankGroup]) -> None:
        self._source_count = len(groups[0].sources)
        self._groups = [
            (
                [_as_array(source.view(-1)) for source in group.sources],
                _as_array(group.out.view(-1)),
                DTYPE_NAMES[group.out.dtype],
                _in_either_order(group.left).numpy(),
                group.right.contiguous().numpy(),
            )
            for group in groups
        ]

    def __call__(self, weights: Sequence[float], scales: Sequence[torch.Tensor]) -> None:
        from mergemix_kernels.cpu import LowRank, WeightedSums

        sums = WeightedSums([weights], self._source_count)
        for (sources, out, dtype, left, right), of_group in zip(self._groups, scales, strict=True):
            sums(sources, [out], dtype, low_rank=LowRank(left, right, of_group[None].numpy(), 0))


def _in_either_order(left: torch.Tensor) -> torch.Tensor:
    return left if left.is_contiguous() or left.t().is_contiguous() else left.contiguous()


def _backend(device: torch.device) -> Callable[[Sequence[LowRankGroup]], Sums]:
    if device.type == "cpu":
        return _CpuSums
    if device.type == "cuda":
        from mergemix_kernels import low_rank_triton

        return low_rank_triton.GroupedSums
    raise ValueError(f"tensors must be on a CPU or a GPU that Triton can use, but got device {device}")


class _Scratched:
    """One group whose memory no kernel can take: gathered, summed and scattered some rows at a time.

    scratch: one buffer per dtype and use, shared by all groups of a device, as long as the largest needs.
    """

    def __init__(self, group: LowRankGroup, scratch: dict[tuple[torch.dtype, int], torch.Tensor]) -> None:
        columns = group.shape[1]
        self._steps = []
        left = group.left.contiguous()  # so that some rows of it are in C order, too
        for part, views in row_pieces([*group.sources, group.out], columns, PIECE_ELEMENTS):
            buffers = [
                view if view.is_contiguous() and view.dtype == group.sources[0].dtype
                else _buffer(scratch, index, view.numel(), group.sources[0]).view(view.shape)
                for index, view in enumerate(views)
            ]  # fmt: skip
            summed = LowRankGroup(buffers[:-1], left[part], group.right, buffers[-1])
            self._steps.append((views, buffers, _backend(group.out.device)([summed])))

    def __call__(self, weights: Sequence[float], scales: Sequence[torch.Tensor]) -> None:
        used = used_sources([weights], len(self._steps[0][0]) - 1)
        for views, buffers, sums in self._steps:
            for k in used:
                if buffers[k] is not views[k]:
                    buffers[k].copy_(views[k])
            sums(weights, scales)
            if buffers[-1] is not views[-1]:
                views[-1].copy_(buffers[-1])


def _buffer(
    scratch: dict[tuple[torch.dtype, int], torch.Tensor], index: int, count: int, like: torch.Tensor
) -> torch.Tensor:
    """The first `count` elements of a buffer. One that is too small is replaced: who took it before keeps it."""
    key = (like.dtype, index)
    if key not in scratch or scratch[key].numel() < count:
        scratch[key] = like.new_empty(count)
    return scratch[key][:count]
