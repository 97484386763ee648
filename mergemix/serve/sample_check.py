"""Compares a small sample of live parameters with the fp32 reference: so small that every swap can afford it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mergemix.checkpoints.header import TensorInfo
from mergemix.serve.copies import Copy, Numbers, memory_order, used_operands
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix.serve.low_rank import Factors, indices, pack
from mergemix.serve.turns import SILVER, in_turn
from mergemix.serve.view_reader import ViewReader, as_array
from mergemix_kernels import reference

PART_ELEMENTS = 1 << 12
# Of adapters, read anew for a sample.
FACTOR_BYTES = 1 << 20

# Per dimension of a view: where the part begins, and its length.
Box = tuple[tuple[int, int], ...]


class Part(NamedTuple):
    """Of a destination that should hold the sum with these numbers. position: below part_count of its view."""

    copy: Copy
    numbers: Numbers
    position: int


class _Place(NamedTuple):
    """Where a part is; with the factors of the adapters that change it, if any do."""

    part: Part
    box: Box
    factors: Factors | None


class Sampler:
    """Chooses parts of views, others each time. parts: how many each view has (see part_count)."""

    def __init__(self, parts: Iterable[int]) -> None:
        self._parts = np.array(list(parts), np.int64)
        self._turn = 0

    def choose(self, members: np.ndarray, number: int) -> list[tuple[int, int]]:
        """(position of a view, part of it): about `number` of them, of views at these positions.

        All of them where these are not more. Otherwise half of them by size, which meets a view with a share of
        4 / number of all parts every time, and each part in the end; the others of each view in turn, however small.
        """
        members = members[self._parts[members] > 0]
        parts = self._parts[members]
        ends = np.cumsum(parts)
        if not len(members):
            return []
        if ends[-1] <= number:
            return [(int(i), part) for i in members for part in range(self._parts[i])]
        begin, half = self._turn, number // 2
        self._turn += half
        spots = in_turn(ends[-1], begin, half)
        owners = np.searchsorted(ends, spots, side="right")
        by_size = zip(members[owners], spots - (ends - parts)[owners], strict=True)
        rows = in_turn(len(members), begin, half)
        one_by_one = zip(members[rows], in_turn(parts[rows], begin, half, SILVER), strict=True)
        return list(dict.fromkeys((int(i), int(part)) for i, part in (*by_size, *one_by_one)))


def differing(parts: Sequence[Part], reader: ViewReader) -> list[str]:
    """Names of tensors of which a part does not hold, bit for bit, what the reference makes of the original files.

    Factors of adapters are read anew up to FACTOR_BYTES, of the first parts, and are those in memory for the others.
    Raises CheckpointError when a file cannot be read.
    """
    alike: dict[tuple[object, ...], list[_Place]] = {}
    left = FACTOR_BYTES
    for part in parts:
        copy, factors = part.copy, None
        if part.numbers.scales and copy.folded is not None:
            factors = copy.folded.factors
            if left == FACTOR_BYTES or factors.nbytes <= left:
                left -= factors.nbytes
                factors = pack(copy.origin.deltas, copy.folded.cut)
        kind = (part.numbers, copy.view.dtype, copy.destination.dtype, copy.destination.device)
        alike.setdefault(kind, []).append(_Place(part, box(copy.view, part.position), factors))
    found: dict[str, None] = {}
    for places in alike.values():
        found |= dict.fromkeys(_differing(places, reader))
    return list(found)


def _differing(places: Sequence[_Place], reader: ViewReader) -> list[str]:
    """As `differing`, of parts with the same numbers, dtypes and device: summed, and fetched from there, at once."""
    weights = places[0].part.numbers.weights
    used = used_operands(weights)
    views = [cut(each.part.copy.view, each.box) for each in places]
    lengths = [view.numel() for view in views]
    operands = torch.empty(len(used), sum(lengths), dtype=views[0].dtype, device="cpu")
    for each, view, into in zip(places, views, operands.split(lengths, dim=1), strict=True):
        _read([each.part.copy.origin.tensors[k] for k in used], view, into, reader)
    chosen = [weights[k] for k in used]
    if places[0].factors is not None:
        pairs = zip(places, operands.split(lengths, dim=1), strict=True)
        expected = torch.cat([_folded(each, elements, chosen) for each, elements in pairs])
    elif chosen == [1.0]:
        expected = operands[0]
    else:
        expected = reference.weighted_sum(operands.unbind(), chosen)
    held = torch.cat([cut(each.part.copy.destination, each.box).reshape(-1) for each in places]).cpu()
    wrong = (_bytes(held) != _bytes(expected.to(held.dtype))).split([n * held.itemsize for n in lengths])
    return [each.part.copy.origin.name for each, bits in zip(places, wrong, strict=True) if bits.any()]


def _read(tensors: Sequence[TensorInfo], view: torch.Tensor, into: torch.Tensor, reader: ViewReader) -> None:
    """into: (tensors, elements)."""
    if view.is_contiguous() and all(TORCH_DTYPES[tensor.dtype] == view.dtype for tensor in tensors):
        begin = int(view.storage_offset()) * view.element_size()
        for tensor, row in zip(tensors, as_array(into).view(np.uint8), strict=True):
            reader.read_bytes(tensor, begin, row)
        return
    for tensor, row in zip(tensors, into, strict=True):
        reader.read(tensor, view, row.view(view.shape))


def _folded(place: _Place, operands: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """What a part of a destination that adapters change should hold, flat. operands: (used ones, elements)."""
    factors, shape = place.factors, place.part.copy.view.shape
    assert factors is not None
    # The first dimensions run over rows of the matrix, the others over columns (see Copy).
    height = factors.left.shape[0]
    over_rows = next(d for d in range(len(shape) + 1) if math.prod(shape[:d]) == height)
    rows = _positions(shape[:over_rows], place.box[:over_rows])
    columns = _positions(shape[over_rows:], place.box[over_rows:])
    device = factors.left.device
    total = reference.low_rank_sum(
        [each.view(len(rows), len(columns)) for each in operands],
        weights,
        factors.left[rows.to(device)].cpu(),
        factors.right[:, columns.to(device)].cpu(),
        factors.scales(place.part.numbers.scales),
    )
    return total.reshape(-1)


def _positions(shape: Sequence[int], where: Box) -> torch.Tensor:
    """Of a box in a contiguous tensor of this shape."""
    steps = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(at * step for (at, _), step in zip(where, steps, strict=True))
    return indices(begin, [(length, step) for (_, length), step in zip(where, steps, strict=True)])


def part_count(view: torch.Tensor) -> int:
    """How many parts of at most PART_ELEMENTS elements, each of them near together where it is read, a view has."""
    if not view.numel():
        return 0
    order, split, step = _split(view)
    outer = math.prod(view.shape[d] for d in order[:split])
    return outer * (-(-view.shape[order[split]] // step) if order else 1)


def box(view: torch.Tensor, position: int) -> Box:
    """Where a part is. position: from 0 to part_count(view) - 1."""
    order, split, step = _split(view)
    where = [(0, length) for length in view.shape]
    if order:
        length = view.shape[order[split]]
        position, block = divmod(position, -(-length // step))
        where[order[split]] = (block * step, min(step, length - block * step))
    for d in reversed(order[:split]):
        position, at = divmod(position, view.shape[d])
        where[d] = (at, 1)
    return tuple(where)


def cut(tensor: torch.Tensor, where: Box) -> torch.Tensor:
    for d, (begin, length) in enumerate(where):
        if length != tensor.shape[d]:
            tensor = tensor.narrow(d, begin, length)
    return tensor


def _split(view: torch.Tensor) -> tuple[list[int], int, int]:
    """Dimensions in the order of memory, which of these is cut into steps, and their length: those before it are cut
    into single ones, and those after it are whole.
    """
    order, inner = memory_order(view), 1
    for split in range(len(order) - 1, 0, -1):
        if inner * view.shape[order[split]] > PART_ELEMENTS:
            return order, split, PART_ELEMENTS // inner
        inner *= view.shape[order[split]]
    return order, 0, max(PART_ELEMENTS // inner, 1)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
