"""The compiled loops of the CPU kernels: which elements, in which order, through which cache."""

# Numba infers the types of all that is compiled here.
# mypy: allow-untyped-defs, allow-incomplete-defs

import os
from collections.abc import Callable
from contextlib import suppress

import numba
import numpy as np
from numba.extending import register_jitable

from mergemix_kernels.cpu_intrinsics import (
    IEEE_CONTROL,
    LANES,
    LINE_BYTES,
    ROWS,
    exchange_float_control,
    outer_products,
    stores_done,
    sum_scalars,
    sum_scalars_and_add,
    sum_vectors,
    sum_vectors_and_add,
    sum_vectors_past_cache,
)

# Elements of each source between two outputs: what the first output read, the others find in a cache.
BLOCK_ELEMENTS = 2048
# The right factor of a low-rank product is taken in panels of columns that stay in the second-level cache
# for all rows of a range; one panel of ROWS rows of the product stays in the first.
PANEL_BYTES = 1 << 18
PANEL_COLUMNS = 512


def _compiled(function: Callable) -> Callable:
    """Compile on first use, without the GIL, and keep the machine code on disk where that is possible."""
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside the source nor in the user's cache directory may be written
        return numba.njit(**options)(function)
    machine_code = dispatcher._cache
    save = machine_code.save_overload

    def save_if_possible(signature, compiled):
        """Numba saves during the first call, which must not fail because a disk is full."""
        try:
            save(signature, compiled)
        except OSError:
            # The index is written first. Without its data it could name a file left by an older source.
            with suppress(OSError):
                os.unlink(machine_code._cache_file._index_path)

    machine_code.save_overload = save_if_possible
    return dispatcher


@_compiled
def sum_range(like, item_bytes, sources, weights, starts, outs, begin, end, past_cache):
    """For every output p and begin <= i < end: outs[p][i] = sum over n of weights[n] * sources[n][i].

    n runs from starts[p] to starts[p + 1]; `sources` and `outs` hold addresses. Returns the largest magnitude
    written, as bits. With `past_cache` stores leave the caches as they are, where alignment allows that.
    """
    callers_control = exchange_float_control(np.uint32(IEEE_CONTROL))
    source_table, weight_table = np.int64(sources.ctypes.data), np.int64(weights.ctypes.data)
    largest = np.uint32(0)
    # Up to where the first output can be stored past the cache: whole lines.
    head = (-(outs[0] + begin * item_bytes) % LINE_BYTES) // item_bytes if past_cache else 0
    start = begin
    while start < end:
        count = min(head if start == begin and head > 0 else BLOCK_ELEMENTS, end - start)
        offset, groups = start * item_bytes, count // LANES
        rest = groups * LANES * item_bytes
        for p in range(outs.size):
            addresses, factors = source_table + 8 * starts[p], weight_table + 4 * starts[p]
            terms, out = starts[p + 1] - starts[p], outs[p] + offset
            if past_cache and out % LINE_BYTES == 0:
                seen = sum_vectors_past_cache(like, addresses, factors, terms, offset, groups, out, 0)
            else:
                seen = sum_vectors(like, addresses, factors, terms, offset, groups, out, 0)
            left_over = count - groups * LANES
            last = sum_scalars(like, addresses, factors, terms, offset + rest, left_over, out + rest, 0)
            largest = max(largest, seen, last)
        start += count
    if past_cache:
        stores_done()
    exchange_float_control(callers_control)
    return largest


@register_jitable
def _pack_panel(right, begin, end, packed):
    """packed[g, r, :] = columns begin + g * LANES and following of right[r]; zeros stand for those from `end`."""
    for r in range(right.shape[0]):
        for group in range(packed.shape[0]):
            start = begin + group * LANES
            for lane in range(LANES):
                packed[group, r, lane] = right[r, start + lane] if start + lane < end else np.float32(0)


@register_jitable
def _active_ranks(scales):
    """Per output, the ranks whose scale is not zero, in order, and how many they are."""
    ranks, counts = np.empty(scales.shape, np.int64), np.zeros(scales.shape[0], np.int64)
    for p in range(scales.shape[0]):
        for r in range(scales.shape[1]):
            if scales[p, r] != 0:
                ranks[p, counts[p]] = r
                counts[p] += 1
    return ranks, counts


@register_jitable
def _multiply_panel(left, left_strides, row, last_row, scales, ranks, packed, scaled, product):
    """product = the low-rank product of rows row .. row + ROWS - 1 and of the packed columns.

    `ranks` are those that take part, `scales` the scales of all. Rows after `last_row` repeat it.
    Without ranks the product is -0.0, which changes no sum: -0.0 + x is x for every x.
    """
    if ranks.size == 0:
        product[:] = np.float32(-0.0)
        return
    row_stride, rank_stride = left_strides
    for n in range(ranks.size):
        for m in range(ROWS):
            element = left[min(row + m, last_row) * row_stride + ranks[n] * rank_stride]
            scaled[n, m] = scales[ranks[n]] * element
    left_table, rank_table = np.int64(scaled.ctypes.data), np.int64(ranks.ctypes.data)
    for group in range(packed.shape[0]):
        columns = np.int64(packed.ctypes.data) + group * packed.strides[0]
        out = np.int64(product.ctypes.data) + 4 * group * LANES
        outer_products(left_table, columns, rank_table, ranks.size, out, product.strides[0])


@_compiled
def sum_low_rank_range(
    like, item_bytes, sources, weights, starts, outs, begin, end, left, left_strides, right, scales, first
):
    """As `sum_range`, plus a low-rank product, for elements first + begin to first + end of a matrix.

    left[i * left_strides[0] + r * left_strides[1]] and right[r, j] are its factors; `scales` is [P, R].
    """
    callers_control = exchange_float_control(np.uint32(IEEE_CONTROL))
    source_table, weight_table = np.int64(sources.ctypes.data), np.int64(weights.ctypes.data)
    ranks, rank_counts = _active_ranks(scales)
    rank_count, columns = right.shape
    flat_begin, flat_end = first + begin, first + end
    first_row, last_row = flat_begin // columns, (flat_end - 1) // columns
    column_begin, column_end = 0, columns
    if first_row == last_row:
        column_begin, column_end = flat_begin - first_row * columns, flat_end - first_row * columns
    fitting = min(
        PANEL_COLUMNS, PANEL_BYTES // (4 * max(rank_count, 1)), column_end - column_begin + LANES - 1
    )
    width = max(1, fitting // LANES) * LANES
    packed = np.empty((width // LANES, rank_count, LANES), np.float32)
    scaled, product = np.empty((rank_count, ROWS), np.float32), np.empty((ROWS, width), np.float32)
    largest = np.uint32(0)
    for panel in range(column_begin, column_end, width):
        panel_end = min(panel + width, column_end)
        _pack_panel(right, panel, panel_end, packed)
        for row in range(first_row, last_row + 1, ROWS):
            for p in range(outs.size):
                taking_part = ranks[p, : rank_counts[p]]
                _multiply_panel(
                    left, left_strides, row, last_row, scales[p], taking_part, packed, scaled, product
                )
                addresses, factors = source_table + 8 * starts[p], weight_table + 4 * starts[p]
                terms = starts[p + 1] - starts[p]
                for m in range(min(ROWS, last_row + 1 - row)):
                    panel_start = (row + m) * columns + panel
                    start = max(panel_start, flat_begin)
                    count = max(0, min((row + m) * columns + panel_end, flat_end) - start)
                    groups = count // LANES
                    addend = np.int64(product.ctypes.data) + 4 * (m * width + start - panel_start)
                    offset, out = (start - first) * item_bytes, outs[p] + (start - first) * item_bytes
                    seen = sum_vectors_and_add(like, addresses, factors, terms, offset, groups, out, addend)
                    rest, left_over = groups * LANES, count - groups * LANES
                    offset, out, addend = (
                        offset + rest * item_bytes,
                        out + rest * item_bytes,
                        addend + 4 * rest,
                    )
                    last = sum_scalars_and_add(
                        like, addresses, factors, terms, offset, left_over, out, addend
                    )
                    largest = max(largest, seen, last)
    exchange_float_control(callers_control)
    return largest


# In the two loops below each block is sliced, and walked from its zero, because numba handles negative
# indices otherwise, and LLVM then does not vectorise (ten times slower).


@_compiled
def equal_range(left, right):
    """Whether two byte arrays of one length are equal; stops at the first block that is not."""
    for start in range(0, left.size, BLOCK_ELEMENTS):
        left_block, right_block = left[start : start + BLOCK_ELEMENTS], right[start : start + BLOCK_ELEMENTS]
        differs = False
        for i in range(left_block.size):
            differs |= left_block[i] != right_block[i]
        if differs:
            return False
    return True


@_compiled
def finite_range(bits, exponent):
    """Whether no element of `bits` has all bits of `exponent` set; stops at the first block that has one."""
    for start in range(0, bits.size, BLOCK_ELEMENTS):
        block = bits[start : start + BLOCK_ELEMENTS]
        found = False
        for i in range(block.size):
            found |= (block[i] & exponent) == exponent
        if found:
            return False
    return True
