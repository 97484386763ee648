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
    sum_vectors,
    sum_vectors_past_cache,
)

# Elements of each source between two outputs: what the first output read, the others find in a cache.
BLOCK_ELEMENTS = 2048
# Sources that are read side by side: lines of more, at the same place in their pages, would push each other
# out of an 8-way first-level cache.
SIDE_BY_SIDE = 8
PREFETCH_BYTES = 1024
# The right factor of a low-rank product is taken in panels of columns that stay in the second-level cache
# for all rows of a range; a strip of ROWS rows of the product stays in the first.
PANEL_BYTES = 1 << 18
STRIP_COLUMNS = 512


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
def address_of(array):
    """Where the first element is. Far quicker than asking numpy."""
    return array.ctypes.data


@register_jitable
def _sum_elements(
    like, item_bytes, sources, weights, terms, offset, ahead, count, totals, addend, out, past_cache
):
    """As `cpu_intrinsics.sum_vectors`, for `count` elements: whole vectors, then what is left over."""
    groups = count // LANES
    if past_cache and out % LINE_BYTES == 0:
        largest = sum_vectors_past_cache(
            like, sources, weights, terms, offset, ahead, groups, totals, addend, out
        )
    else:
        largest = sum_vectors(like, sources, weights, terms, offset, ahead, groups, totals, addend, out)
    done = groups * LANES
    offset += done * item_bytes
    totals = totals + 4 * done if totals != 0 else 0
    addend = addend + 4 * done if addend != 0 else 0
    out = out + done * item_bytes if out != 0 else 0
    return max(
        largest, sum_scalars(like, sources, weights, terms, offset, 0, count - done, totals, addend, out)
    )


@_compiled
def sum_range(like, item_bytes, sources, weights, starts, outs, begin, end, past_cache):
    """For every output p and begin <= i < end: outs[p][i] = sum over n of weights[n] * sources[n][i].

    n runs from starts[p] to starts[p + 1]; `sources` and `outs` hold addresses. Returns the largest magnitude
    written, as bits. With `past_cache` stores leave the caches as they are, where alignment allows that.
    """
    callers_control = exchange_float_control(np.uint32(IEEE_CONTROL))
    source_table, weight_table = np.int64(sources.ctypes.data), np.int64(weights.ctypes.data)
    totals = np.empty(BLOCK_ELEMENTS, np.float32)
    largest = np.uint32(0)
    # Up to where the first output can be stored past the cache: whole lines.
    head = (-(outs[0] + begin * item_bytes) % LINE_BYTES) // item_bytes if past_cache else 0
    start = begin
    while start < end:
        count = min(head if start == begin and head > 0 else BLOCK_ELEMENTS, end - start)
        offset = start * item_bytes
        for p in range(outs.size):
            ahead = PREFETCH_BYTES if p == 0 else 0
            kept = np.int64(0)
            if starts[p + 1] - starts[p] > SIDE_BY_SIDE:
                totals[:] = np.float32(-0.0)  # neutral: -0.0 + x is x for every x, but +0.0 + -0.0 is +0.0
                kept = np.int64(totals.ctypes.data)
            for n in range(starts[p], starts[p + 1], SIDE_BY_SIDE):
                terms = min(SIDE_BY_SIDE, starts[p + 1] - n)
                out = outs[p] + offset if n + terms == starts[p + 1] else 0
                addresses, factors = source_table + 8 * n, weight_table + 4 * n
                seen = _sum_elements(
                    like,
                    item_bytes,
                    addresses,
                    factors,
                    terms,
                    offset,
                    ahead,
                    count,
                    kept,
                    0,
                    out,
                    past_cache,
                )
                largest = max(largest, seen)
        start += count
    if past_cache:
        stores_done()
    exchange_float_control(callers_control)
    return largest


@register_jitable
def _line_aligned(count):
    """`count` float32s, uninitialised, that begin with a cache line."""
    memory = np.empty(count + LINE_BYTES // 4, np.float32)
    skipped = (-np.int64(memory.ctypes.data) % LINE_BYTES) // 4
    return memory[skipped : skipped + count]


@register_jitable
def _pack_panel(right, begin, end, packed):
    """packed[g, r] = LANES columns of right[r], from begin + g * LANES on; zeros stand for those from `end`.

    So the columns of a vector are neighbours for all ranks, whatever the distance between rows of `right`.
    """
    for group in range(packed.shape[0]):
        start = begin + group * LANES
        for r in range(packed.shape[1]):
            part, vector = right[r, start : min(start + LANES, end)], packed[group, r]
            for lane in range(part.size):
                vector[lane] = part[lane]
            for lane in range(part.size, LANES):
                vector[lane] = np.float32(0)


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
def _scale_rows(left, left_strides, row, last_row, scales, ranks, scaled):
    """scaled[n, m] = scale of ranks[n] times its element in row + m, where rows after `last_row` repeat it."""
    row_stride, rank_stride = left_strides
    for m in range(ROWS):
        start = min(row + m, last_row) * row_stride
        for n in range(ranks.size):
            scaled[n, m] = scales[ranks[n]] * left[start + ranks[n] * rank_stride]


@register_jitable
def _multiply_strip(scaled, ranks, packed, product):
    """product = ROWS rows of the low-rank product in the packed columns.

    Without ranks it is -0.0, which changes no sum: -0.0 + x is x for every x.
    """
    if ranks.size == 0:
        product[:] = np.float32(-0.0)
        return
    for group in range(packed.shape[0]):
        outer_products(
            np.int64(scaled.ctypes.data),
            np.int64(packed.ctypes.data) + group * packed.strides[0],
            np.int64(ranks.ctypes.data),
            ranks.size,
            np.int64(product.ctypes.data) + group * LANES * product.itemsize,
            product.strides[0],
        )


@register_jitable
def _sum_strip(like, item_bytes, sources, weights, terms, ahead, rows, strip, matrix, product, out):
    """Rows and columns (begin, end) of one output, as far as they lie in the range; `product` is added to them.

    `matrix` is its number of columns, where in it the sources begin, and the range.
    """
    columns, first, flat_begin, flat_end = matrix
    largest = np.uint32(0)
    for row in range(rows[0], rows[1]):
        row_start = row * columns
        start = max(row_start + strip[0], flat_begin)
        count = max(min(row_start + strip[1], flat_end) - start, 0)
        offset = (start - first) * item_bytes
        addend = np.int64(product[row - rows[0]].ctypes.data) + 4 * (start - row_start - strip[0])
        seen = _sum_elements(
            like, item_bytes, sources, weights, terms, offset, ahead, count, 0, addend, out + offset, False
        )
        largest = max(largest, seen)
    return largest


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
    all_ranks, columns = right.shape
    matrix = (columns, first, first + begin, first + end)
    first_row, last_row = (first + begin) // columns, (first + end - 1) // columns
    column_begin, column_end = 0, columns
    if first_row == last_row:
        column_begin, column_end = first + begin - first_row * columns, first + end - first_row * columns
    most_vectors = max(1, PANEL_BYTES // (4 * LANES * max(all_ranks, 1)))
    width = min(most_vectors, -(-(column_end - column_begin) // LANES)) * LANES
    packed = _line_aligned(width * all_ranks).reshape((width // LANES, all_ranks, LANES))
    product = _line_aligned(ROWS * STRIP_COLUMNS).reshape((ROWS, STRIP_COLUMNS))
    scaled = np.empty((outs.size, all_ranks, ROWS), np.float32)
    largest = np.uint32(0)
    for panel in range(column_begin, column_end, width):
        panel_end = min(panel + width, column_end)
        _pack_panel(right, panel, panel_end, packed)
        for row in range(first_row, last_row + 1, ROWS):
            rows = (row, min(row + ROWS, last_row + 1))
            for p in range(outs.size):
                active = ranks[p, : rank_counts[p]]
                _scale_rows(left, left_strides, row, last_row, scales[p], active, scaled[p])
            for strip_begin in range(panel, panel_end, STRIP_COLUMNS):
                strip = (strip_begin, min(strip_begin + STRIP_COLUMNS, panel_end))
                vectors = packed[(strip[0] - panel) // LANES : (strip[1] - panel + LANES - 1) // LANES]
                for p in range(outs.size):
                    _multiply_strip(scaled[p], ranks[p, : rank_counts[p]], vectors, product)
                    addresses, factors = source_table + 8 * starts[p], weight_table + 4 * starts[p]
                    terms, ahead = starts[p + 1] - starts[p], PREFETCH_BYTES if p == 0 else 0
                    seen = _sum_strip(
                        like,
                        item_bytes,
                        addresses,
                        factors,
                        terms,
                        ahead,
                        rows,
                        strip,
                        matrix,
                        product,
                        outs[p],
                    )
                    largest = max(largest, seen)
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
