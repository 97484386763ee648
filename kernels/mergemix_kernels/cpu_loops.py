"""The compiled loops of the CPU kernels: which elements, in which order, through which cache."""

# Numba infers the types of all that is compiled here.
# mypy: allow-untyped-defs, allow-incomplete-defs

import struct

import numba
import numpy as np
from llvmlite.binding import ObjectFileRef
from numba import types
from numba.extending import register_jitable

from mergemix_kernels.cpu_intrinsics import (
    IEEE_CONTROL,
    exchange_float_control,
    load_float32,
    load_int64,
    outer_products,
    read_cached,
    store_float32,
    store_zeros,
    stores_done,
    sum_scalars,
    sum_vectors,
    sum_vectors_past_cache,
)
from mergemix_kernels.cpu_tiles import (
    BLOCK_ELEMENTS,
    LANES,
    LINE_BYTES,
    PREFETCH_BYTES,
    ROWS,
    SIDE_BY_SIDE,
    STRIP_COLUMNS,
    UNREAD,
)

# The type that stands for a format: see `cpu_intrinsics`.
LIKE = {"BF16": np.uint16(0), "F16": np.int16(0), "F32": np.float32(0)}
OPTIONS = {"boundscheck": False, "error_model": "numpy"}
_jitable = register_jitable(**OPTIONS)


@_jitable
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


@_jitable
def sum_range(
    like,
    item_bytes,
    source_table,
    weight_table,
    start_table,
    out_table,
    outputs,
    scratch,
    begin,
    end,
    past_cache,
):
    """For every output p and begin <= i < end: outs[p][i] = sum over n of weights[n] * sources[n][i].

    n runs from starts[p] to starts[p + 1]. All tables are addresses: of int64 (sources and outs are addresses
    too), or float32 (weights). `scratch` is the address of BLOCK_ELEMENTS float32. Returns the largest magnitude
    written, as bits. With `past_cache` stores leave the caches as they are, where alignment allows that.
    """
    callers_control = exchange_float_control(np.uint32(IEEE_CONTROL))
    largest = np.uint32(0)
    # Up to where the first output can be stored past the cache: whole lines.
    head = (
        (-(load_int64(out_table, 0) + begin * item_bytes) % LINE_BYTES) // item_bytes
        if past_cache != 0
        else 0
    )
    start = begin
    while start < end:
        count = min(head if start == begin and head > 0 else BLOCK_ELEMENTS, end - start)
        offset = start * item_bytes
        for p in range(outputs):
            first, last = load_int64(start_table, p), load_int64(start_table, p + 1)
            ahead = PREFETCH_BYTES if p == 0 else 0
            totals = np.int64(0)
            if last - first > SIDE_BY_SIDE:
                totals = scratch
                for i in range(count):  # neutral: -0.0 + x is x for every x, but +0.0 + -0.0 is +0.0
                    store_float32(totals, i, np.float32(-0.0))
            for n in range(first, last, SIDE_BY_SIDE):
                terms = min(SIDE_BY_SIDE, last - n)
                out = load_int64(out_table, p) + offset if n + terms == last else 0
                addresses, factors = source_table + 8 * n, weight_table + 4 * n
                seen = _sum_elements(
                    like, item_bytes, addresses, factors, terms, offset, ahead, count, totals, 0, out,
                    past_cache != 0,
                )  # fmt: skip
                largest = max(largest, seen)
        start += count
    if past_cache != 0:
        stores_done()
    exchange_float_control(callers_control)
    return largest


@_jitable
def read_and_sum(
    like,
    item_bytes,
    preadv2,
    descriptors,
    positions,
    vectors,
    files,
    step_bytes,
    source_tables,
    terms,
    weight_table,
    start_table,
    out_table,
    outputs,
    scratch,
    end,
):
    """`sum_range` of sources that lie in files: the first `end` elements, `step_bytes` of every file at a time.

    descriptors, positions: tables of the files' numbers, and of where in them the sources begin. vectors: two tables
    of an iovec a file, for whole steps and for the last one. source_tables: for each step a table of `terms`
    addresses, at which the step's bytes lie as if all were there from the first one on. Returns UNREAD where a
    file's bytes are not in the page cache.
    """
    largest = np.uint32(0)
    step_elements = step_bytes // item_bytes
    for step in range((end + step_elements - 1) // step_elements):
        begin = step * step_elements
        whole = begin + step_elements <= end
        nbytes = step_bytes if whole else (end - begin) * item_bytes
        for file in range(files):
            vector = vectors + 16 * (file if whole else files + file)
            position = load_int64(positions, file) + begin * item_bytes
            if read_cached(preadv2, load_int64(descriptors, file), vector, position) != nbytes:
                return np.uint32(UNREAD)
        seen = sum_range(
            like,
            item_bytes,
            source_tables + 8 * terms * step,
            weight_table,
            start_table,
            out_table,
            outputs,
            scratch,
            begin,
            begin + nbytes // item_bytes,
            0,
        )
        largest = max(largest, seen)
    return largest


@_jitable
def _pack_panel(right, columns, all_ranks, begin, end, packed):
    """packed[g, r] = LANES columns of right[r], from begin + g * LANES on; zeros stand for those from `end`.

    So the columns of a vector are neighbours for all ranks, whatever the distance between rows of `right`.
    """
    for group in range((end - begin + LANES - 1) // LANES):
        start = begin + group * LANES
        count = min(LANES, end - start)
        for r in range(all_ranks):
            vector = packed + 4 * LANES * (group * all_ranks + r)
            store_zeros(vector)
            for lane in range(count):
                store_float32(vector, lane, load_float32(right, r * columns + start + lane))


@_jitable
def _scale_rows(left, row_stride, rank_stride, row, last_row, scales, ranks, count, scaled):
    """scaled[n, m] = scale of ranks[n] times its element in row + m, where rows after `last_row` repeat it."""
    for m in range(ROWS):
        start = min(row + m, last_row) * row_stride
        for n in range(count):
            rank = load_int64(ranks, n)
            value = load_float32(scales, rank) * load_float32(left, start + rank * rank_stride)
            store_float32(scaled, n * ROWS + m, value)


@_jitable
def _multiply_strip(scaled, ranks, count, packed, all_ranks, groups, product):
    """product = ROWS rows of the low-rank product in `groups` vectors of packed columns, rows of STRIP_COLUMNS.

    Without ranks it is -0.0, which changes no sum: -0.0 + x is x for every x.
    """
    if count == 0:
        for i in range(ROWS * STRIP_COLUMNS):
            store_float32(product, i, np.float32(-0.0))
        return
    for group in range(groups):
        columns = packed + group * 4 * LANES * all_ranks
        outer_products(scaled, columns, ranks, count, product + group * 4 * LANES, 4 * STRIP_COLUMNS)


@_jitable
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
        addend = product + 4 * ((row - rows[0]) * STRIP_COLUMNS + start - row_start - strip[0])
        seen = _sum_elements(
            like, item_bytes, sources, weights, terms, offset, ahead, count, 0, addend, out + offset, False
        )
        largest = max(largest, seen)
    return largest


@_jitable
def sum_low_rank_range(
    like, item_bytes, source_table, weight_table, start_table, out_table, outputs, scratch, begin, end,
    left, row_stride, rank_stride, right, columns, all_ranks, scale_table, rank_table, rank_counts, first, width,
):  # fmt: skip
    """As `sum_range`, plus a low-rank product, for elements first + begin to first + end of a matrix.

    left[i * row_stride + r * rank_stride] and right[r, j] are its factors (addresses of float32). `scale_table` is
    float32 [P, R], `rank_table` int64 [P, R]: of each output the ranks that it has, of which there are
    rank_counts[p]. `width`: columns of a panel, whole vectors. `scratch` begins with a cache line, and holds
    width * R + ROWS * STRIP_COLUMNS + P * R * ROWS float32.
    """
    callers_control = exchange_float_control(np.uint32(IEEE_CONTROL))
    matrix = (columns, first, first + begin, first + end)
    first_row, last_row = (first + begin) // columns, (first + end - 1) // columns
    column_begin, column_end = 0, columns
    if first_row == last_row:
        column_begin, column_end = first + begin - first_row * columns, first + end - first_row * columns
    packed = scratch
    product = packed + 4 * width * all_ranks
    scaled = product + 4 * ROWS * STRIP_COLUMNS
    largest = np.uint32(0)
    for panel in range(column_begin, column_end, width):
        panel_end = min(panel + width, column_end)
        _pack_panel(right, columns, all_ranks, panel, panel_end, packed)
        for row in range(first_row, last_row + 1, ROWS):
            rows = (row, min(row + ROWS, last_row + 1))
            for p in range(outputs):
                table = 8 * all_ranks * p
                _scale_rows(
                    left, row_stride, rank_stride, row, last_row, scale_table + table // 2, rank_table + table,
                    load_int64(rank_counts, p), scaled + ROWS * table // 2,
                )  # fmt: skip
            for strip_begin in range(panel, panel_end, STRIP_COLUMNS):
                strip = (strip_begin, min(strip_begin + STRIP_COLUMNS, panel_end))
                vectors = packed + 4 * (strip[0] - panel) * all_ranks
                groups = (strip[1] - strip[0] + LANES - 1) // LANES
                for p in range(outputs):
                    table = 8 * all_ranks * p
                    _multiply_strip(
                        scaled + ROWS * table // 2, rank_table + table, load_int64(rank_counts, p), vectors,
                        all_ranks, groups, product,
                    )  # fmt: skip
                    begin_term = load_int64(start_table, p)
                    addresses, factors = source_table + 8 * begin_term, weight_table + 4 * begin_term
                    terms = load_int64(start_table, p + 1) - begin_term
                    ahead = PREFETCH_BYTES if p == 0 else 0
                    seen = _sum_strip(
                        like, item_bytes, addresses, factors, terms, ahead, rows, strip, matrix, product,
                        load_int64(out_table, p),
                    )  # fmt: skip
                    largest = max(largest, seen)
    exchange_float_control(callers_control)
    return largest


def compile_loop(name: str, dtype: str) -> tuple[str, int, bytes]:
    """The symbol, number of arguments and object code of one of the loops above for a dtype ("BF16" ...).

    It is called in numba's own convention: (uint32 *result, void **exception, int64 ...), the loop's arguments
    after `like`; it calls nothing outside of itself.
    """
    like = LIKE[dtype]

    def dense(item_bytes, sources, weights, starts, outs, outputs, scratch, begin, end, past_cache):
        return sum_range(
            like, item_bytes, sources, weights, starts, outs, outputs, scratch, begin, end, past_cache
        )

    def low_rank(
        item_bytes, sources, weights, starts, outs, outputs, scratch, begin, end,
        left, row_stride, rank_stride, right, columns, all_ranks, scales, ranks, rank_counts, first, width,
    ):  # fmt: skip
        return sum_low_rank_range(
            like, item_bytes, sources, weights, starts, outs, outputs, scratch, begin, end,
            left, row_stride, rank_stride, right, columns, all_ranks, scales, ranks, rank_counts, first, width,
        )  # fmt: skip

    def reading(
        item_bytes, preadv2, descriptors, positions, vectors, files, step_bytes, source_tables, terms,
        weights, starts, outs, outputs, scratch, end,
    ):  # fmt: skip
        return read_and_sum(
            like, item_bytes, preadv2, descriptors, positions, vectors, files, step_bytes, source_tables, terms,
            weights, starts, outs, outputs, scratch, end,
        )  # fmt: skip

    entry = {"sum_range": dense, "sum_low_rank_range": low_rank, "read_and_sum": reading}[name]
    count = entry.__code__.co_argcount
    signature = types.uint32(*[types.int64] * count)
    # Without numba's run-time library: nothing is allocated, and the code must stand alone.
    compiled = numba.njit(signature, nogil=True, _nrt=False, **OPTIONS)(entry).overloads[signature.args]
    code = compiled.library._get_compiled_object()
    # Numba's wrappers, for callers in Python, are in it too: what they call is not there, nor are they called.
    missing = [name for name in _undefined_symbols(code) if not name.startswith(("Py", "_Py", "numba_"))]
    assert not missing, f"the machine code of {name} must stand alone, but calls {missing}"
    return compiled.fndesc.llvm_func_name, count, code


def _undefined_symbols(code: bytes) -> list[str]:
    """What an ELF object expects others to define; nothing is known of other formats."""
    sections = {section.name(): section.data() for section in ObjectFileRef.from_data(code).sections()}
    names, table = sections.get(b".strtab", b""), sections.get(b".symtab", b"")
    places = (struct.unpack_from("<IBBH", table, begin) for begin in range(24, len(table), 24))
    return [names[at : names.index(b"\0", at)].decode() for at, _, _, section in places if at and not section]
