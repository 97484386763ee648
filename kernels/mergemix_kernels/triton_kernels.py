"""Weighted sums of many groups of tensors in one Triton launch, through a table of addresses.

Up to MAX_OUTPUTS sums come from one read of the sources. Each is bit-equal to `mergemix_kernels.reference`:
every product and every sum rounded on its own (the launch disables fused multiply-add), one rounding to
nearest even at the end.
"""

# The functions that Triton compiles have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from mergemix_kernels.tiles import Tiling, tiling_for
from mergemix_kernels.weights import MAX_OUTPUTS, active_weights

VECTOR_BYTES = tl.constexpr(16)
# A tile that ends early or is not aligned goes in parts, each a fraction of it. With shapes of its own it does
# not share a layout with the full tiles, whose loads and stores would then pass through shared memory.
PARTS = tl.constexpr(4)

# The elements of a group, as the table names them.
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# What a row of the table holds where. From ADDRESSES on: of the outputs, then of the sources.
DTYPE, ALIGNED, COUNT, FIRST_TILE, ADDRESSES = (tl.constexpr(column) for column in range(5))


@triton.jit
def _widen(values):
    """fp32 values of loaded elements, exactly. BF16 travels as its bit pattern: see `_round`."""
    if values.dtype == tl.uint16:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _round(total, ELEMENT: tl.constexpr):
    """fp32 totals rounded to nearest even; overflow gives Inf, NaN stays NaN.

    To BF16 by its bits, so that every backend rounds alike (Triton's interpreter truncates).
    """
    if ELEMENT == tl.uint16:  # noqa: SIM300 (a constexpr argument, whatever its case)
        bits = total.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # The carry would turn a NaN into Inf or into zero: its upper half is kept, made quiet.
        upper = tl.where(total != total, bits | 0x400000, rounded) >> 16
        return upper.to(tl.uint16)
    return total.to(ELEMENT)


@triton.jit
def _load(
    row, term, begin, offsets, inside, ELEMENT: tl.constexpr, HINT: tl.constexpr, OUTPUTS: tl.constexpr
):
    """The elements of the source that `term` names. `inside` masks offsets past the end; None for a full tile."""
    address = tl.load(row + ADDRESSES + OUTPUTS + tl.load(term))
    source = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), HINT) + begin
    return tl.load(source + offsets, mask=inside)


@triton.jit
def _add(totals, values, term, OUTPUTS: tl.constexpr):
    """Each total plus its weight times the values. Where the weight is zero the source is as if absent."""
    values = _widen(values)
    sums = ()
    for p in tl.static_range(OUTPUTS):
        total = totals[p]
        weight = tl.load(term + 1 + p).to(tl.float32, bitcast=True)
        if OUTPUTS == 1:  # noqa: SIM114 (a lone output has no term of weight zero)
            total += values * weight
        elif weight != 0.0:
            total += values * weight
        sums = sums + (total,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    return sums


@triton.jit
def _sum_tile(
    row,
    terms,
    active,
    begin,
    inside,
    ELEMENT: tl.constexpr,
    HINT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """All outputs of `SIZE` elements of a group, from `begin` on. HINT: every address is a multiple of it."""
    offsets = tl.arange(0, SIZE)
    # -0.0 is the neutral element: -0.0 + x is x for every x, whereas +0.0 + -0.0 is +0.0.
    # Given as bits, because Triton 3.6 makes +0.0 of a literal -0.0.
    nothing = tl.full([SIZE], 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    totals = (nothing,) * OUTPUTS
    term = terms
    values = _load(row, term, begin, offsets, inside, ELEMENT, HINT, OUTPUTS)
    for _ in range(1, active):
        # The next source is on its way while this one is added.
        ahead = _load(row, term + 1 + OUTPUTS, begin, offsets, inside, ELEMENT, HINT, OUTPUTS)
        totals = _add(totals, values, term, OUTPUTS)
        values = ahead
        term += 1 + OUTPUTS
    totals = _add(totals, values, term, OUTPUTS)
    for p in tl.static_range(OUTPUTS):
        address = tl.load(row + ADDRESSES + p)
        target = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), HINT) + begin
        tl.store(target + offsets, _round(totals[p], ELEMENT), mask=inside)


@triton.jit
def _sum_elements(
    row, terms, active, tile, aligned, ELEMENT: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr
):
    """All outputs of one tile: at once where its loads may be vectors, else in parts."""
    count = tl.load(row + COUNT)
    begin = tile * SIZE  # int64: a group may have more than 2**31 elements
    if aligned & (begin + SIZE <= count):
        _sum_tile(row, terms, active, begin, None, ELEMENT, VECTOR_BYTES, OUTPUTS, SIZE)
    else:
        PART: tl.constexpr = SIZE // PARTS
        ITEM_BYTES: tl.constexpr = ELEMENT.primitive_bitwidth // 8
        for start in range(begin, tl.minimum(begin + SIZE, count), PART):
            inside = tl.arange(0, PART) < count - start
            _sum_tile(row, terms, active, start, inside, ELEMENT, ITEM_BYTES, OUTPUTS, PART)


@triton.jit(do_not_specialize=["row_length", "tiles", "active"])
def weighted_sum_kernel(
    table,  # int64 [groups, 4 + P + K]: dtype code, whether aligned, element count, first tile, addresses
    row_length,  # 4 + P + K
    tile_group,  # int32 [tiles]: which group a tile belongs to
    tiles,
    terms,  # int32 [active, 1 + P]: index of a source, and the bits of its fp32 weight in each output
    active,  # how many sources have a weight that is not zero
    OUTPUTS: tl.constexpr,  # P
    SIZE: tl.constexpr,  # elements of a tile of 16-bit elements
):
    """Every program sums each tile whose number leaves its own when divided by the number of programs.

    The number of sources is known at run time only, so that nothing is compiled again for another K or
    another count of non-zero weights. What a group's elements are and whether they are aligned is looked
    up too: all of a model's tensors share the launch.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = table + tl.load(tile_group + tile).to(tl.int64) * row_length
        dtype = tl.load(row + DTYPE)
        aligned = tl.load(row + ALIGNED) != 0
        index = tile - tl.load(row + FIRST_TILE)
        if dtype == 0:
            _sum_elements(row, terms, active, index, aligned, tl.uint16, OUTPUTS, SIZE)
        elif dtype == 1:
            _sum_elements(row, terms, active, index, aligned, tl.float16, OUTPUTS, SIZE)
        else:
            _sum_elements(row, terms, active, index, aligned, tl.float32, OUTPUTS, SIZE // 2)


def make_terms(weights: Sequence[Sequence[float]], source_count: int) -> torch.Tensor:
    """The kernel's `terms` for weights [P][K], on the CPU: int32 [active, 1 + P], sources in order.

    Raises ValueError for weights that `active_weights` refuses.
    """
    by_source = np.zeros((source_count, 1 + len(weights)), np.int32)
    by_source[:, 0] = np.arange(source_count)
    for p, of_output in enumerate(weights):
        active, values = active_weights(of_output, source_count)
        by_source[active, 1 + p] = values.view(np.int32)
    return torch.from_numpy(by_source[by_source[:, 1:].any(axis=1)])


class GroupedWeightedSum:
    """outs[p] = sum of weights[p][k] * sources[k] for many groups: a call copies the weights and launches once.

    Args:
        groups: (sources, outs) pairs of contiguous 1-D tensors on one GPU, all with the same numbers of
            sources K and of outs P; sources and outs of a group share length and dtype (bf16, fp16 or fp32),
            which may differ between groups, as may their alignment. The addresses are taken once: the tensors
            must keep their storage. `dispatch.GroupedWeightedSum` checks what is assumed here.
        tiling: how the work is cut; from `tiles.TILINGS` by default.

    Raises ValueError for more than MAX_OUTPUTS outs.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]],
        tiling: Tiling | None = None,
    ) -> None:
        sources, outs = groups[0]
        if len(outs) > MAX_OUTPUTS:
            raise ValueError(
                f"on a GPU the number of outputs must be from 1 to {MAX_OUTPUTS}, but got {len(outs)}"
            )
        self._source_count, self._outputs = len(sources), len(outs)
        self._device = outs[0].device
        self._groups = groups  # their storage must outlive the addresses
        self._tiling = tiling or tiling_of(self._device, self._outputs)
        # On the CPU, also where the caller has made the GPU torch's default device.
        counts = torch.tensor([outs[0].numel() for _, outs in groups], device="cpu")
        itemsizes = torch.tensor([outs[0].element_size() for _, outs in groups], device="cpu")
        sizes = self._tiling.elements * 2 // itemsizes
        tiles = (counts + sizes - 1) // sizes
        self._tiles = int(tiles.sum())
        rows = [
            _row((*outs, *sources), first_tile)
            for (sources, outs), first_tile in zip(groups, (tiles.cumsum(0) - tiles).tolist(), strict=True)
        ]
        self._table = _upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), self._device)
        numbers = torch.arange(len(groups), dtype=torch.int32, device="cpu")
        tile_group = numbers.repeat_interleave(tiles)
        self._tile_group = _upload(tile_group, self._device)

    def __call__(self, weights: Sequence[Sequence[float]]) -> None:
        """Write every out, on its device's current stream; the caller does not wait.

        Raises ValueError for weights that `active_weights` refuses.
        """
        terms = make_terms(weights, self._source_count)
        if not self._tiles:
            return
        # Triton launches on the current device, whatever the tensors'. On CPU tensors (interpreter) a no-op.
        with torch.cuda.device_of(self._table):
            weighted_sum_kernel[(min(self._tiles, _programs(self._device, self._tiling)),)](
                self._table,
                self._table.shape[1],
                self._tile_group,
                self._tiles,
                _upload(terms, self._device),
                len(terms),
                OUTPUTS=self._outputs,
                SIZE=self._tiling.elements,
                num_warps=self._tiling.warps,
                enable_fp_fusion=False,
            )


def _row(tensors: Sequence[torch.Tensor], first_tile: int) -> list[int]:
    addresses = [tensor.data_ptr() for tensor in tensors]
    aligned = all(address % VECTOR_BYTES.value == 0 for address in addresses)
    return [DTYPE_CODES[tensors[0].dtype], aligned, tensors[0].numel(), first_tile, *addresses]


def _upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, in the order of its current stream. The host goes on meanwhile."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def tiling_of(device: torch.device, outputs: int) -> Tiling:
    """The tiling that a launch on the device uses by default."""
    if device.type == "cpu":  # Triton's interpreter
        return tiling_for("", (0, 0), outputs)
    return tiling_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), outputs)


def _programs(device: torch.device, tiling: Tiling) -> int:
    """Programs that stay resident together, each for many tiles. The interpreter has one multiprocessor."""
    if device.type == "cpu":
        return tiling.programs
    return torch.cuda.get_device_properties(device).multi_processor_count * tiling.programs
