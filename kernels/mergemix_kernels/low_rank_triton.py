"""Weighted sums plus low-rank products of many groups of matrices in one Triton launch.

Bit-equal to `mergemix_kernels.reference.low_rank_sum`, and so unlike a matrix multiplication: the ranks are added one
by one in fp32, every product and every sum rounded on its own (the launch disables fused multiply-add).
"""

# The functions that Triton compiles have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from mergemix_kernels.low_rank import LowRankGroup, rows_of
from mergemix_kernels.triton_kernels import DTYPE_CODES, VECTOR_BYTES, _round, _upload, _widen, make_terms

# What a row of the table holds where. From MATRICES on: address and distance of rows of out, then of each source.
DTYPE, ALIGNED, ROWS, COLUMNS, FIRST_TILE, LEFT, LEFT_ROW, LEFT_RANK, RIGHT, MATRICES = (
    tl.constexpr(column) for column in range(10)
)
# Not measured. 128 threads hold two fp32 tiles of 16 elements a thread: the sum and the product.
TILE = (16, 128)
WARPS = 4
PROGRAMS = 4  # per multiprocessor


@triton.jit
def _product(row, ranks, first, last, rows, columns, inside_rows, inside_columns):
    """The sum over the ranks that are not absent of (scale * left) * right, fp32; -0.0, which adds nothing, of none."""
    count = tl.load(row + COLUMNS)
    left = tl.load(row + LEFT).to(tl.pointer_type(tl.float32)) + rows * tl.load(row + LEFT_ROW)
    right = tl.load(row + RIGHT).to(tl.pointer_type(tl.float32)) + columns
    left_rank = tl.load(row + LEFT_RANK)
    # As bits, because Triton 3.6 makes +0.0 of a literal -0.0.
    nothing = tl.full([rows.shape[0], columns.shape[0]], 0x80000000, tl.uint32)
    product = nothing.to(tl.float32, bitcast=True)
    for index in range(first, last):
        rank = tl.load(ranks + 2 * index).to(tl.int64)
        scale = tl.load(ranks + 2 * index + 1).to(tl.float32, bitcast=True)
        scaled = scale * tl.load(left + rank * left_rank, mask=inside_rows, other=0.0)
        product += scaled[:, None] * tl.load(right + rank * count, mask=inside_columns, other=0.0)[None, :]
    return product


@triton.jit
def _places(row, matrix, rows, columns, ELEMENT: tl.constexpr, HINT: tl.constexpr):
    """Pointers to a tile of a matrix, whose address and distance of rows are multiples of HINT elements."""
    ITEM_BYTES: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    address = tl.load(row + MATRICES + 2 * matrix).to(tl.pointer_type(ELEMENT))
    distance = tl.multiple_of(tl.load(row + MATRICES + 2 * matrix + 1), HINT)
    return tl.multiple_of(address, HINT * ITEM_BYTES) + (rows * distance)[:, None] + columns[None, :]


@triton.jit
def _sum_matrix(
    row, terms, active, rows, columns, product, inside, ELEMENT: tl.constexpr, HINT: tl.constexpr
):
    """One tile: the sources one after the other, then the product. `inside`: None for a full tile."""
    nothing = tl.full([rows.shape[0], columns.shape[0]], 0x80000000, tl.uint32)
    total = nothing.to(tl.float32, bitcast=True)
    for index in range(active):
        source = _places(row, 1 + tl.load(terms + 2 * index), rows, columns, ELEMENT, HINT)
        weight = tl.load(terms + 2 * index + 1).to(tl.float32, bitcast=True)
        total += _widen(tl.load(source, mask=inside)) * weight
    target = _places(row, 0, rows, columns, ELEMENT, HINT)
    tl.store(target, _round(total + product, ELEMENT), mask=inside)


@triton.jit
def _sum_tile(
    row, terms, active, rows, columns, product, inside_rows, inside_columns, vectors, ELEMENT: tl.constexpr
):
    """A tile: with loads of whole vectors where it is full and aligned."""
    if vectors:
        HINT: tl.constexpr = VECTOR_BYTES * 8 // ELEMENT.primitive_bitwidth
        _sum_matrix(row, terms, active, rows, columns, product, None, ELEMENT, HINT)
    else:
        inside = inside_rows[:, None] & inside_columns[None, :]
        _sum_matrix(row, terms, active, rows, columns, product, inside, ELEMENT, 1)


@triton.jit(do_not_specialize=["row_length", "tiles", "active"])
def low_rank_kernel(
    table,  # int64 [groups, 11 + 2 K], see above
    row_length,  # 11 + 2 K
    tile_group,  # int32 [tiles]: which group a tile belongs to
    tiles,
    terms,  # int32 [active, 2]: index of a source, and the bits of its fp32 weight
    active,  # how many sources have a weight that is not zero
    starts,  # int32 [groups + 1]: where in `ranks` those of a group begin
    ranks,  # int32 [all, 2]: index of a rank in its group, and the bits of its fp32 scale, which is not zero
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    """Every program sums each tile whose number leaves its own when divided by the number of programs."""
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        group = tl.load(tile_group + tile)
        row = table + group.to(tl.int64) * row_length
        height, width = tl.load(row + ROWS), tl.load(row + COLUMNS)
        across = (width + TILE_COLUMNS - 1) // TILE_COLUMNS
        index = tile - tl.load(row + FIRST_TILE)
        rows = index // across * TILE_ROWS + tl.arange(0, TILE_ROWS)  # int64, as all that the table holds
        columns = index % across * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inside_rows, inside_columns = rows < height, columns < width
        full = (index // across * TILE_ROWS + TILE_ROWS <= height) & (
            index % across * TILE_COLUMNS + TILE_COLUMNS <= width
        )
        vectors = full & (tl.load(row + ALIGNED) != 0)
        first, last = tl.load(starts + group), tl.load(starts + group + 1)
        product = _product(row, ranks, first, last, rows, columns, inside_rows, inside_columns)
        dtype = tl.load(row + DTYPE)
        if dtype == 0:
            _sum_tile(
                row, terms, active, rows, columns, product, inside_rows, inside_columns, vectors, tl.uint16
            )
        elif dtype == 1:
            _sum_tile(
                row, terms, active, rows, columns, product, inside_rows, inside_columns, vectors, tl.float16
            )
        else:
            _sum_tile(
                row, terms, active, rows, columns, product, inside_rows, inside_columns, vectors, tl.float32
            )


class GroupedSums:
    """What `low_rank.GroupedLowRankSum` does with the groups that a kernel can take in place, on one GPU.

    tile: rows and columns of a tile, powers of two.
    """

    def __init__(self, groups: Sequence[LowRankGroup], tile: tuple[int, int] = TILE) -> None:
        self._device, self._tile = groups[0].out.device, tile
        self._source_count = len(groups[0].sources)
        self._kept: list[object] = [*groups]  # their storage must outlive the addresses
        rows: list[list[int]] = []
        tiles: list[int] = []
        for group in groups:
            right = group.right.contiguous()
            self._kept.append(right)
            rows.append(_row(group, right, sum(tiles)))
            tiles.append(-(-group.shape[0] // tile[0]) * -(-group.shape[1] // tile[1]))
        self._tiles = sum(tiles)
        self._table = _upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), self._device)
        numbers = torch.arange(len(groups), dtype=torch.int32, device="cpu")
        tile_group = numbers.repeat_interleave(torch.tensor(tiles, device="cpu"))
        self._tile_group = _upload(tile_group, self._device)

    def __call__(self, weights: Sequence[float], scales: Sequence[torch.Tensor]) -> None:
        """Write every out, on its device's current stream; the caller does not wait."""
        terms = make_terms([weights], self._source_count)
        starts, ranks = make_ranks(scales)
        # Triton launches on the current device, whatever the tensors'. On CPU tensors (interpreter) a no-op.
        with torch.cuda.device_of(self._table):
            low_rank_kernel[(min(self._tiles, _programs(self._device)),)](
                self._table,
                self._table.shape[1],
                self._tile_group,
                self._tiles,
                _upload(terms, self._device),
                len(terms),
                _upload(starts, self._device),
                _upload(ranks, self._device),
                TILE_ROWS=self._tile[0],
                TILE_COLUMNS=self._tile[1],
                num_warps=WARPS,
                enable_fp_fusion=False,
            )


def make_ranks(scales: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's `starts` and `ranks`, on the CPU; ranks has a row at least, so that it has an address."""
    found = [of_group.nonzero().flatten() for of_group in scales]
    starts = np.cumsum([0, *(len(each) for each in found)], dtype=np.int32)
    ranks = torch.zeros(max(int(starts[-1]), 1), 2, dtype=torch.int32, device="cpu")
    for begin, active, of_group in zip(starts.tolist(), found, scales, strict=False):
        part = slice(begin, begin + len(active))
        ranks[part, 0] = active.to(torch.int32)
        ranks[part, 1] = of_group[active].view(torch.int32)
    return torch.from_numpy(starts), ranks


def _row(group: LowRankGroup, right: torch.Tensor, first_tile: int) -> list[int]:
    matrices = [rows_of(each, group.shape) for each in (group.out, *group.sources)]
    places: list[int] = []
    aligned = True
    for matrix in matrices:
        assert matrix is not None, "the caller gives what is direct"
        distance = matrix.stride(0) if group.shape[0] > 1 else 0
        places += [matrix.data_ptr(), distance]
        aligned &= matrix.data_ptr() % VECTOR_BYTES.value == 0
        aligned &= distance * matrix.element_size() % VECTOR_BYTES.value == 0
    left = group.left
    return [
        DTYPE_CODES[group.out.dtype], aligned, *group.shape, first_tile,
        left.data_ptr(), left.stride(0), left.stride(1), right.data_ptr(), *places,
    ]  # fmt: skip


def _programs(device: torch.device) -> int:
    """Programs that stay resident together, each for many tiles. The interpreter has one multiprocessor."""
    if device.type == "cpu":
        return PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS
