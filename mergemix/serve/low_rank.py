"""Where the factors of LoRA adapters go when they are folded into the live weights of one rank.

vLLM's loaders take views of checkpoint tensors (slices, transposes, parts of a fused layer) and copy them into
parameters. Of a tensor that adapters change, each such view still is a choice of rows and of columns, and so is the
product of the factors: the view of it is a product of rows of one factor and columns of the other. What a view chooses
is read off its strides, so it does not matter which operations led to it, and nothing is ever multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mergemix.checkpoints.adapter import LowRankDelta
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import read_range
from mergemix.errors import NonFiniteError
from mergemix.serve.dtypes import TORCH_DTYPES


@dataclass(frozen=True, eq=False)
class Cut:
    """A view of a matrix as a choice of rows and columns of it.

    rows: int64 [m], columns: int64 [n]; both may repeat. splits: per dimension of the view its length, or the lengths
    (rows, columns) of one that runs over whole rows. order: of the dimensions so split, those over rows first.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    splits: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]

    def arranged(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the view's shape, as a view [*over rows, *over columns]: flattened it is a matrix [m, n].

        For the destination, and the views of the other operands. Raises RuntimeError for a tensor of another shape,
        and for memory in which a dimension over whole rows cannot be split.
        """
        split = tensor
        for dimension, lengths in reversed([*enumerate(self.splits)]):
            if len(lengths) > 1:
                split = split.unflatten(dimension, lengths)
        return split.permute(self.order)


def cut(view: torch.Tensor, first: int, shape: Sequence[int]) -> Cut | None:
    """What `view` chooses of a matrix of this shape, contiguous from element `first` of its storage on.

    Any chain of slices, transposes, splits and joins of dimensions, and broadcasts will do. None for a view that is
    no choice of rows and columns (a diagonal, or a piece that wraps around from one row to the next).
    """
    width = shape[1]
    row, column = divmod(int(view.storage_offset()) - first, width)
    splits: list[tuple[int, ...]] = []
    over: list[tuple[bool, int, int]] = []  # per dimension, once split: whether over columns, length, step
    for length, stride in zip(view.shape, view.stride(), strict=True):
        per_row = width // stride if stride else 0
        if length == 1 or stride % width == 0:
            parts = [(False, length, stride // width)]
        elif stride * per_row == width and length > per_row and length % per_row == 0:
            parts = [(False, length // per_row, 1), (True, per_row, stride)]
        else:
            parts = [(True, length, stride)]
        splits.append(tuple(length for _, length, _ in parts))
        over += parts
    if column + sum((length - 1) * step for is_column, length, step in over if is_column) >= width:
        return None
    rows = [index for index, (is_column, _, _) in enumerate(over) if not is_column]
    columns = [index for index, (is_column, _, _) in enumerate(over) if is_column]
    return Cut(
        indices(row, [over[index][1:] for index in rows]),
        indices(column, [over[index][1:] for index in columns]),
        tuple(splits),
        (*rows, *columns),
    )


def indices(first: int, dimensions: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int64: of every element of these (length, step) dimensions, the last the fastest."""
    indices = torch.tensor([first], device="cpu")
    for length, step in dimensions:
        indices = (indices[:, None] + torch.arange(length, device="cpu") * step).reshape(-1)
    return indices


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of all adapters that change one tensor, side by side, for one destination of this rank.

    owners: (position in Family.members, rank) per adapter, in that order. left: fp32 [m, R], right: fp32 [R, n].
    """

    owners: tuple[tuple[int, int], ...]
    left: torch.Tensor
    right: torch.Tensor

    def scales(self, by_owner: Sequence[float]) -> torch.Tensor:
        """fp32 [R] on the CPU: what each rank is multiplied with. by_owner: one number per adapter."""
        numbers = [scale for scale, (_, rank) in zip(by_owner, self.owners, strict=True) for _ in range(rank)]
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def used_bytes(self, by_owner: Sequence[float]) -> int:
        """Of the ranks whose scale is not zero."""
        ranks = sum(rank for scale, (_, rank) in zip(by_owner, self.owners, strict=True) if scale != 0.0)
        return 4 * ranks * (self.left.shape[0] + self.right.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """What adapters add to a destination."""

    cut: Cut
    factors: Factors


def pack(
    deltas: Sequence[tuple[int, LowRankDelta]], chosen: Cut, device: torch.device | str = "cpu"
) -> Factors:
    """Read the factors of at least one adapter, and keep the rows and columns that a destination needs.

    Raises CheckpointError when a file cannot be read, NonFiniteError naming a factor that holds NaN or Inf.
    """
    lefts, rights = [], []
    for _, delta in deltas:
        down, up = _read(delta.down), _read(delta.up)
        left, right = (down.t(), up.t()) if delta.transposed else (up, down)
        lefts.append(left[chosen.rows])
        rights.append(right[:, chosen.columns])
    # On a GPU a tile reads neighbouring rows of one rank: they lie side by side.
    left = torch.cat(lefts, dim=1) if str(device) == "cpu" else torch.cat([each.t() for each in lefts]).t()
    owners = tuple((position, delta.rank) for position, delta in deltas)
    return Factors(owners, left.to(device), torch.cat(rights).to(device))


def _read(info: TensorInfo) -> torch.Tensor:
    """The tensor in fp32."""
    data = bytearray(read_range(info, 0, info.nbytes))
    values = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape).float()
    if not torch.isfinite(values).all():
        raise NonFiniteError(f"tensor {info.name!r} of {info.path} holds NaN or Inf")
    return values
