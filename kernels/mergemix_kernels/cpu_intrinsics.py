"""Machine code for the CPU kernels that numba cannot express: whole vectors in three formats, stores past the cache.

Every function works on raw addresses (int64). `like` is any scalar of the type that stands for a format: uint16 for
BF16, int16 for F16, float32 for itself. So one source serves all three, and numba compiles it once per
format, whatever the numbers of sources, outputs and ranks.
"""

# Numba infers the types of all that is compiled here.
# mypy: allow-untyped-defs, allow-incomplete-defs

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mergemix_kernels.cpu_tiles import LANES, LINE_BYTES, ROWS

RWF_NOWAIT = 8  # of Linux's preadv2
_ON_X86 = platform.machine() in ("x86_64", "AMD64")
_FLOAT, _HALF, _WORD, _SHORT, _BYTE = (
    ir.FloatType(),
    ir.HalfType(),
    ir.IntType(32),
    ir.IntType(16),
    ir.IntType(8),
)


class _Lanes:
    """Builds instructions on vectors of `lanes` elements, or on scalars where that is 1."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes

    def of(self, element: ir.Type) -> ir.Type:
        return element if self.lanes == 1 else ir.VectorType(element, self.lanes)

    def constant(self, element: ir.Type, value: int) -> ir.Constant:
        return ir.Constant(self.of(element), value if self.lanes == 1 else [value] * self.lanes)

    def splat(self, scalar: Any) -> Any:
        if self.lanes == 1:
            return scalar
        undefined = ir.Constant(self.of(scalar.type), ir.Undefined)
        lowest = self.builder.insert_element(undefined, scalar, ir.Constant(_WORD, 0))
        return self.builder.shuffle_vector(lowest, undefined, self.constant(_WORD, 0))

    def load(self, element: ir.Type, address: Any) -> Any:
        pointer = self.builder.inttoptr(address, self.of(element).as_pointer())
        return self.builder.load(pointer, align=element.width // 8 if element is not _FLOAT else 4)

    def store(self, value: Any, address: Any, align: int) -> Any:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        return self.builder.store(value, pointer, align=align)

    def widen(self, like: types.Type, address: Any) -> Any:
        """Elements at `address` as float32, exactly."""
        if like == types.float32:
            return self.load(_FLOAT, address)
        bits = self.load(_SHORT, address)
        if like == types.int16:
            return self.builder.fpext(self.builder.bitcast(bits, self.of(_HALF)), self.of(_FLOAT))
        word = self.builder.zext(bits, self.of(_WORD))
        return self.builder.bitcast(self.builder.shl(word, self.constant(_WORD, 16)), self.of(_FLOAT))

    def round(self, like: types.Type, value: Any) -> Any:
        """Bits of float32 `value` rounded to nearest even. Overflow gives Inf, NaN stays NaN."""
        builder = self.builder
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(value, self.of(_HALF)), self.of(_SHORT))
        bits = builder.bitcast(value, self.of(_WORD))
        if like == types.float32:
            return bits
        sixteen = self.constant(_WORD, 16)
        last_kept_bit = builder.and_(builder.lshr(bits, sixteen), self.constant(_WORD, 1))
        rounded = builder.add(bits, builder.add(last_kept_bit, self.constant(_WORD, 0x7FFF)))
        # The carry would turn a NaN into Inf or into zero: its upper half is kept, made quiet.
        quiet = builder.or_(bits, self.constant(_WORD, 0x400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        upper = builder.lshr(builder.select(is_nan, quiet, rounded), sixteen)
        return builder.trunc(upper, self.of(_SHORT))

    def larger(self, left: Any, right: Any) -> Any:
        return self.builder.select(self.builder.icmp_unsigned(">", left, right), left, right)

    def largest(self, value: Any) -> Any:
        """The largest lane of an unsigned vector."""
        if self.lanes == 1:
            return value
        name = f"llvm.vector.reduce.umax.v{self.lanes}i{value.type.element.width}"
        reduce = ir.FunctionType(value.type.element, [value.type])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, reduce, name), [value])


def _load(builder: Any, element: ir.Type, address: Any, index: Any) -> Any:
    """Element `index` of the table at `address`."""
    return builder.load(builder.gep(builder.inttoptr(address, element.as_pointer()), [index]))


def _prefetch(builder: Any, address: Any) -> None:
    pointer = builder.inttoptr(address, _BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _WORD, _WORD, _WORD])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for_reading, into_all_caches, of_data = (ir.Constant(_WORD, value) for value in (0, 3, 1))
    builder.call(prefetch, [pointer, for_reading, into_all_caches, of_data])


def _weighted_sums(lanes: int, *, past_cache: bool = False) -> Callable:
    """An intrinsic that sums `groups` times `lanes` neighbouring elements of some sources.

    (like, sources, weights, terms, offset, ahead, groups, totals, addend, out) -> largest magnitude written,
    as bits. `sources` is the address of `terms` >= 1 addresses, each taken `offset` bytes further on, and
    `weights` that of as many float32; lines are fetched `ahead` bytes before they are needed. Each product
    and sum is rounded to float32 on its own; the first product starts the sum, or float32 `totals` where that is
    an address. float32 `addend`, where it is one, is added last. What results is rounded and stored at `out`;
    without `out` it replaces `totals`.

    `past_cache` stores past the caches: `out` must then be a multiple of 64, and `stores_done` must follow.
    """

    def generate(context, builder, signature, arguments):
        like, lane = signature.args[0], _Lanes(builder, lanes)
        sources, weights, terms, offset, ahead, groups, totals, addend, out = arguments[1:]
        index_type, item_bytes = terms.type, like.bitwidth // 8
        none, one = ir.Constant(index_type, 0), ir.Constant(index_type, 1)
        width = _WORD if like == types.float32 else _SHORT
        magnitude_bits = lane.constant(width, (1 << (width.width - 1)) - 1)
        largest = cgutils.alloca_once_value(builder, lane.constant(width, 0))
        total = cgutils.alloca_once(builder, lane.of(_FLOAT))
        adds_to_totals, adds_last, writes = (
            builder.icmp_signed("!=", address, none) for address in (totals, addend, out)
        )

        def product(k, shift):
            start = builder.add(_load(builder, index_type, sources, k), shift)
            if lanes > 1:
                _prefetch(builder, builder.add(start, ahead))
            return builder.fmul(lane.widen(like, start), lane.splat(_load(builder, _FLOAT, weights, k)))

        def finish(step):
            bits = lane.round(like, builder.load(total))
            store = lane.store(bits, builder.add(out, step), LINE_BYTES if past_cache else item_bytes)
            if past_cache:
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))
            seen = lane.larger(builder.load(largest), builder.and_(bits, magnitude_bits))
            builder.store(seen, largest)

        with cgutils.for_range(builder, groups, intp=index_type) as group:
            step = builder.mul(group.index, ir.Constant(index_type, lanes * item_bytes))
            float_step = builder.mul(group.index, ir.Constant(index_type, lanes * 4))
            shift = builder.add(offset, step)
            with builder.if_else(adds_to_totals) as (continued, started):
                with continued:
                    builder.store(lane.load(_FLOAT, builder.add(totals, float_step)), total)
                with started:
                    builder.store(product(none, shift), total)
            first = builder.select(adds_to_totals, none, one)
            with cgutils.for_range(builder, terms, start=first, intp=index_type) as term:
                builder.store(builder.fadd(builder.load(total), product(term.index, shift)), total)
            with builder.if_then(adds_last):
                last = lane.load(_FLOAT, builder.add(addend, float_step))
                builder.store(builder.fadd(builder.load(total), last), total)
            with builder.if_else(writes, likely=True) as (finished, kept):
                with finished:
                    finish(step)
                with kept:
                    lane.store(builder.load(total), builder.add(totals, float_step), 4)
        result = lane.largest(builder.load(largest))
        return result if width is _WORD else builder.zext(result, _WORD)

    @intrinsic
    def weighted_sums(
        typing_context, like, sources, weights, terms, offset, ahead, groups, totals, addend, out
    ):
        return types.uint32(like, *[types.int64] * 9), generate

    return weighted_sums


sum_vectors = _weighted_sums(LANES)
sum_vectors_past_cache = _weighted_sums(LANES, past_cache=True)
sum_scalars = _weighted_sums(1)


def _element(element: types.Type) -> tuple[Callable, Callable]:
    """Intrinsics that load and store element `index` of the table at `address`. Arrays would need numba at run time."""

    def place(context, builder, address, index):
        return builder.gep(builder.inttoptr(address, context.get_value_type(element).as_pointer()), [index])

    @intrinsic
    def load(typing_context, address, index):
        def generate(context, builder, signature, arguments):
            return builder.load(place(context, builder, *arguments))

        return element(types.int64, types.int64), generate

    @intrinsic
    def store(typing_context, address, index, value):
        def generate(context, builder, signature, arguments):
            builder.store(arguments[2], place(context, builder, *arguments[:2]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, element), generate

    return load, store


load_int64, _ = _element(types.int64)
load_float32, store_float32 = _element(types.float32)


@intrinsic
def read_cached(typing_context, preadv2, descriptor, vector, position):
    """What preadv2, called through its address, returns for the iovec at `vector`: bytes read, -1 for an error.

    Of the page cache only: what is not there would have to be waited for, and is an error.
    """

    def generate(context, builder, signature, arguments):
        address, descriptor, vector, position = arguments
        long = position.type
        kind = ir.FunctionType(long, [_WORD, _BYTE.as_pointer(), _WORD, long, _WORD])
        call = builder.inttoptr(address, kind.as_pointer())
        pointer = builder.inttoptr(vector, _BYTE.as_pointer())
        one, flags = ir.Constant(_WORD, 1), ir.Constant(_WORD, RWF_NOWAIT)
        return builder.call(call, [builder.trunc(descriptor, _WORD), pointer, one, position, flags])

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def store_zeros(typing_context, address):
    """LANES float32 zeros at `address`. As a loop it would become a call of memset, which must not be needed."""

    def generate(context, builder, signature, arguments):
        lane = _Lanes(builder, LANES)
        lane.store(ir.Constant(lane.of(_FLOAT), [0.0] * LANES), arguments[0], 4)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def outer_products(typing_context, left, right, ranks, count, out, row_bytes):
    """out[row, j] = sum over the `count` >= 1 indices r in `ranks`, in order, of left[n, row] * right[r, j].

    ROWS rows and LANES columns. `left` is the address of float32 [count, ROWS] (n counts along `ranks`),
    `right` of float32 [.., LANES], `ranks` of int64, `out` of float32 rows that begin `row_bytes` apart.
    Every product and sum is rounded on its own.
    """

    def generate(context, builder, signature, arguments):
        left, right, ranks, count, out, row_bytes = arguments
        lane = _Lanes(builder, LANES)
        index_type = count.type
        totals = [cgutils.alloca_once(builder, lane.of(_FLOAT)) for _ in range(ROWS)]

        def products(n):
            rank = _load(builder, index_type, ranks, n)
            column_bytes = builder.mul(rank, ir.Constant(index_type, LANES * 4))
            columns = lane.load(_FLOAT, builder.add(right, column_bytes))
            first = builder.mul(n, ir.Constant(index_type, ROWS))
            places = [builder.add(first, ir.Constant(index_type, row)) for row in range(ROWS)]
            factors = [_load(builder, _FLOAT, left, place) for place in places]
            return [builder.fmul(lane.splat(factor), columns) for factor in factors]

        for total, product in zip(totals, products(ir.Constant(index_type, 0)), strict=True):
            builder.store(product, total)
        with cgutils.for_range(builder, count, start=ir.Constant(index_type, 1), intp=index_type) as loop:
            for total, product in zip(totals, products(loop.index), strict=True):
                builder.store(builder.fadd(builder.load(total), product), total)
        for row, total in enumerate(totals):
            offset = builder.mul(row_bytes, ir.Constant(index_type, row))
            lane.store(builder.load(total), builder.add(out, offset), 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


@intrinsic
def stores_done(typing_context):
    """Stores past the caches become visible before any that follows (x86; elsewhere their order is the usual one)."""

    def generate(context, builder, signature, arguments):
        if _ON_X86:
            fence = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, fence, "llvm.x86.sse.sfence"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def exchange_float_control(typing_context, control):
    """Set this thread's floating-point control word (x86 MXCSR) and return the previous one.

    A caller may run with denormals flushed to zero (`torch.set_flush_denormal`, or a library built with
    fast math); bf16 and fp32 subnormals would then be lost. Elsewhere than on x86 this does nothing.
    """

    def generate(context, builder, signature, arguments):
        if not _ON_X86:
            return arguments[0]
        slot = cgutils.alloca_once(builder, _WORD)
        pointer = builder.bitcast(slot, _BYTE.as_pointer())
        access = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer()])
        read = cgutils.get_or_insert_function(builder.module, access, "llvm.x86.sse.stmxcsr")
        write = cgutils.get_or_insert_function(builder.module, access, "llvm.x86.sse.ldmxcsr")
        builder.call(read, [pointer])
        previous = builder.load(slot)
        builder.store(arguments[0], slot)
        builder.call(write, [pointer])
        return previous

    return types.uint32(types.uint32), generate


IEEE_CONTROL = 0x1F80  # x86's default: nearest even, subnormals kept, no traps
