"""Weighted sums of many groups of tensors in one Triton launch, through a table of addresses.

Bit-equal to `mergemix_kernels.reference`: every product and every sum rounded on its own (the launch
disables fused multiply-add), one rounding to nearest even at the end.
"""

# The functions that Triton compiles have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mergemix_kernels.weights import active_weights

TILE_ELEMENTS = 4096
NUM_WARPS = 4
VECTOR_BYTES = 16

# BF16 travels as its bit pattern: the rounding below is then the same on every backend (Triton's
# interpreter truncates when it converts fp32 to bf16).
ELEMENT_TYPES = {torch.bfloat16: tl.uint16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _widen(values):
    """fp32 values of loaded elements, exactly."""
    if values.dtype == tl.uint16:
        return (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _round(total, ELEMENT: tl.constexpr):
    """fp32 totals rounded to nearest even; overflow gives Inf, NaN stays NaN."""
    if ELEMENT == tl.uint16:  # noqa: SIM300 (a constexpr argument, whatever its case)
        bits = total.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # The carry would turn a NaN into Inf or into zero: its upper half is kept, made quiet.
        upper = tl.where(total != total, bits | 0x400000, rounded) >> 16
        return upper.to(tl.uint16)
    return total.to(ELEMENT)


@triton.jit
def _sum_tile(row, weights, order, active, begin, offsets, inside, ELEMENT: tl.constexpr, HINT: tl.constexpr):
    """Sum one tile. `inside` masks offsets past the end; None for a full tile keeps its loads vectors."""
    # -0.0 is the neutral element: -0.0 + x is x for every x, whereas +0.0 + -0.0 is +0.0.
    # Given as bits, because Triton 3.6 makes +0.0 of a literal -0.0.
    total = tl.full(offsets.shape, 0x80000000, tl.uint32).to(tl.float32, bitcast=True)
    for k in range(active):
        address = tl.load(row + 2 + tl.load(order + k))
        source = tl.multiple_of(address.to(tl.pointer_type(ELEMENT)), HINT) + begin
        total += _widen(tl.load(source + offsets, mask=inside)) * tl.load(weights + k)
    target = tl.multiple_of(tl.load(row).to(tl.pointer_type(ELEMENT)), HINT) + begin
    tl.store(target + offsets, _round(total, ELEMENT), mask=inside)


@triton.jit(do_not_specialize=["row_length", "active"])
def weighted_sum_kernel(
    table,  # int64 [groups, 2 + K]: address of the destination, element count, addresses of the K sources
    row_length,  # 2 + K
    tile_group,  # int32 [tiles]: which group a tile belongs to
    tile_index,  # int32 [tiles]: which tile of its group it is
    weights,  # fp32 [K], the non-zero ones first
    order,  # int32 [K], the indices of their sources
    active,  # how many of them there are
    ELEMENT: tl.constexpr,
    HINT: tl.constexpr,  # bytes that every address is a multiple of
    TILE: tl.constexpr,
):
    """One tile of TILE elements of one group per program.

    The number of sources is known at run time only, so that nothing is compiled again for another K or
    another count of non-zero weights. Unrolling the loop over them would bring more loads into flight,
    but the programs resident on a multiprocessor (TILE * itemsize bytes each) have enough without.
    """
    program = tl.program_id(0)
    row = table + tl.load(tile_group + program).to(tl.int64) * row_length
    count = tl.load(row + 1)
    begin = tl.load(tile_index + program).to(tl.int64) * TILE
    offsets = tl.arange(0, TILE)
    if begin + TILE <= count:
        _sum_tile(row, weights, order, active, begin, offsets, None, ELEMENT, HINT)
    else:
        inside = offsets < count - begin
        _sum_tile(row, weights, order, active, begin, offsets, inside, ELEMENT, HINT)


class _Launch:
    """The tables of all groups that one launch covers: one dtype, one alignment."""

    def __init__(self, groups: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]], hint: int) -> None:
        self._groups = groups  # their storage must outlive the addresses
        self._element = ELEMENT_TYPES[groups[0][1].dtype]
        self._hint = hint
        device = groups[0][1].device
        rows = [[out.data_ptr(), out.numel(), *(s.data_ptr() for s in sources)] for sources, out in groups]
        tiles = torch.tensor([triton.cdiv(out.numel(), TILE_ELEMENTS) for _, out in groups])
        first_tile = tiles.cumsum(0) - tiles
        tile_group = torch.arange(len(groups)).repeat_interleave(tiles)
        tile_index = torch.arange(int(tiles.sum())) - first_tile[tile_group]
        self._table = torch.tensor(rows, dtype=torch.int64).to(device)
        self._tile_group = tile_group.to(torch.int32).to(device)
        self._tile_index = tile_index.to(torch.int32).to(device)

    def __call__(self, weights: torch.Tensor, order: torch.Tensor, active: int) -> None:
        # Triton launches on the current device, whatever the tensors'. On CPU tensors (interpreter) a no-op.
        with torch.cuda.device_of(self._table):
            weighted_sum_kernel[(self._tile_group.numel(),)](
                self._table,
                self._table.shape[1],
                self._tile_group,
                self._tile_index,
                weights,
                order,
                active,
                ELEMENT=self._element,
                HINT=self._hint,
                TILE=TILE_ELEMENTS,
                num_warps=NUM_WARPS,
                enable_fp_fusion=False,
            )


class GroupedWeightedSum:
    """out = sum of weights[k] * sources[k] for many groups; a call copies K weights and launches.

    Args:
        groups: (sources, out) pairs of contiguous tensors on one GPU, all with the same number of
            sources; sources and out of a group share shape and dtype (bf16, fp16 or fp32), which may
            differ between groups. Their addresses are taken once: they must keep their storage.

    There is one launch per dtype, and one more for the groups of a dtype in which an address is not a
    multiple of 16 bytes: those cannot use 16-byte loads. `dispatch.GroupedWeightedSum` checks what is
    assumed here.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]]) -> None:
        self._source_count = len(groups[0][0])
        self._device = groups[0][1].device
        kinds: dict[tuple[torch.dtype, int], list[tuple[Sequence[torch.Tensor], torch.Tensor]]] = {}
        for sources, out in groups:
            if out.numel() == 0:
                continue
            aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in (*sources, out))
            hint = VECTOR_BYTES if aligned else out.element_size()
            kinds.setdefault((out.dtype, hint), []).append((sources, out))
        self._launches = [_Launch(members, hint) for (_, hint), members in kinds.items()]

    def __call__(self, weights: Sequence[float]) -> None:
        """Write every out, on its device's current stream. ValueError for weights that `active_weights` refuses."""
        active, values = active_weights(weights, self._source_count)
        device_weights = torch.from_numpy(values).to(self._device)
        order = torch.tensor(active, dtype=torch.int32, device=self._device)
        for launch in self._launches:
            launch(device_weights, order, len(active))
