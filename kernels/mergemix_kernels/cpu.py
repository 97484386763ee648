"""Weighted sums and checks of flat arrays on the CPU, at the speed of its memory. No torch here.

A dtype is named as in safetensors: "BF16", "F16" or "F32". BF16 and F16 arrays hold bit patterns in
uint16, F32 arrays are float32. Bit-equal to `mergemix_kernels.reference`.
"""

# The functions that numba compiles or calls have no annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs

import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mergemix_kernels.weights import active_weights

# 8 KiB of fp32 accumulators: they stay in the first-level cache beside the lines of the sources.
BLOCK_ELEMENTS = 2048
# The least work worth a thread: below two of these, waking another one costs more than it brings.
MIN_RANGE_ELEMENTS = 1 << 16
# More ranges than threads, so that a thread on a busy core leaves its share to the others.
RANGES_PER_THREAD = 4

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.uint16),
    "F32": np.dtype(np.float32),
}
_EXPONENT_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def numpy_dtype(dtype: str) -> np.dtype:
    """The array dtype that holds elements of `dtype`. ValueError for a dtype that has no kernel."""
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_NUMPY_DTYPES)}, but got {dtype!r}")
    return _NUMPY_DTYPES[dtype]


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


# The kernels tell the formats apart by the type of the destination array: uint16 holds BF16, int16 holds
# F16, float32 itself. So one source serves all three, and numba compiles it once per format, not per K.


@intrinsic
def _load_as_float32(typing_context, out, address, index):
    """Element `index` of the array at `address`, which has the format of `out`, widened exactly."""
    element = out.dtype

    def generate(context, builder, signature, arguments):
        storage = ir.FloatType() if element == types.float32 else ir.IntType(16)
        pointer = builder.inttoptr(arguments[1], storage.as_pointer())
        value = builder.load(builder.gep(pointer, [arguments[2]]))
        if element == types.uint16:
            shifted = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(shifted, ir.FloatType())
        if element == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(out, types.uint64, types.int64), generate


@intrinsic
def _store_rounded(typing_context, out, address, index, value):
    """Element `index` of the array at `address` = `value`, rounded to nearest even in the format of `out`.

    Overflow gives Inf, NaN stays NaN.
    """
    element = out.dtype

    def round_value(builder, value):
        if element == types.float32:
            return value
        if element == types.int16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(value, word)
        sixteen = ir.Constant(word, 16)
        last_kept_bit = builder.and_(builder.lshr(bits, sixteen), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(last_kept_bit, ir.Constant(word, 0x7FFF)))
        # The carry would turn a NaN into Inf or into zero: its upper half is kept, made quiet.
        quiet = builder.or_(bits, ir.Constant(word, 0x400000))
        is_nan = builder.fcmp_unordered("uno", value, value)
        upper = builder.lshr(builder.select(is_nan, quiet, rounded), sixteen)
        return builder.trunc(upper, ir.IntType(16))

    def generate(context, builder, signature, arguments):
        rounded = round_value(builder, arguments[3])
        pointer = builder.inttoptr(arguments[1], rounded.type.as_pointer())
        builder.store(rounded, builder.gep(pointer, [arguments[2]]))
        return context.get_dummy_value()

    return types.void(out, types.uint64, types.int64, types.float32), generate


@intrinsic
def _exchange_float_control(typing_context, control):
    """Set this thread's floating-point control word (x86 MXCSR) and return the previous one.

    A caller may run with denormals flushed to zero (`torch.set_flush_denormal`, or a library built with
    fast math); bf16 and fp32 subnormals would then be lost. Elsewhere than on x86 this does nothing.
    """

    def generate(context, builder, signature, arguments):
        if platform.machine() not in ("x86_64", "AMD64"):
            return arguments[0]
        slot = cgutils.alloca_once(builder, ir.IntType(32))
        pointer = builder.bitcast(slot, ir.IntType(8).as_pointer())
        access = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        read = cgutils.get_or_insert_function(builder.module, access, "llvm.x86.sse.stmxcsr")
        write = cgutils.get_or_insert_function(builder.module, access, "llvm.x86.sse.ldmxcsr")
        builder.call(read, [pointer])
        previous = builder.load(slot)
        builder.store(arguments[0], slot)
        builder.call(write, [pointer])
        return previous

    return types.uint32(types.uint32), generate


IEEE_CONTROL = 0x1F80  # x86's default: nearest even, subnormals kept, no traps


@_compiled
def _sum_range(addresses, weights, begin, out):
    """out[i] = sum over k of weights[k] * (the array at addresses[k])[begin + i]."""
    callers_control = _exchange_float_control(np.uint32(IEEE_CONTROL))
    total = np.empty(BLOCK_ELEMENTS, np.float32)
    item_bytes = np.uint64(out.itemsize)
    for start in range(0, out.size, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, out.size - start)
        offset = np.uint64(begin + start) * item_bytes
        target = np.uint64(out.ctypes.data) + np.uint64(start) * item_bytes
        # Two sources a pass, and the last two straight to `out`, halve the trips of `total` to the cache.
        odd = weights.size % 2
        if odd:
            address, weight = addresses[0] + offset, weights[0]
            for i in range(count):
                total[i] = _load_as_float32(out, address, i) * weight
        else:
            for i in range(count):
                total[i] = np.float32(-0.0)  # neutral: -0.0 + x is x for every x, but +0.0 + -0.0 is +0.0
        for k in range(odd, weights.size, 2):
            first, second = addresses[k] + offset, addresses[k + 1] + offset
            weight, next_weight = weights[k], weights[k + 1]
            if k < weights.size - 2:
                for i in range(count):
                    partial = total[i] + _load_as_float32(out, first, i) * weight
                    total[i] = partial + _load_as_float32(out, second, i) * next_weight
            else:
                for i in range(count):
                    partial = total[i] + _load_as_float32(out, first, i) * weight
                    partial += _load_as_float32(out, second, i) * next_weight
                    _store_rounded(out, target, i, partial)
        if weights.size == 1:
            for i in range(count):
                _store_rounded(out, target, i, total[i])
    _exchange_float_control(callers_control)


# In the two loops below each block is sliced, and walked from its zero, because numba handles negative
# indices otherwise, and LLVM then does not vectorise (ten times slower).


@_compiled
def _equal_range(left, right):
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
def _finite_range(bits, exponent):
    """Whether no element of `bits` has all bits of `exponent` set; stops at the first block that has one."""
    for start in range(0, bits.size, BLOCK_ELEMENTS):
        block = bits[start : start + BLOCK_ELEMENTS]
        found = False
        for i in range(block.size):
            found |= (block[i] & exponent) == exponent
        if found:
            return False
    return True


def thread_count() -> int:
    """Threads a call may use: the cores this thread is bound to, at most OMP_NUM_THREADS when that is set.

    So a vLLM worker, which binds itself to its share of the cores, does not take those of its peers.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores, max(int(limit), 1)) if limit.isdigit() else cores


@cache
def _helper_threads(process_id: int) -> ThreadPoolExecutor:
    """A pool for this process: a forked child inherits the object but not the threads of its parent.

    It starts threads as they are asked for, and each calling thread asks for its own number.
    """
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="mergemix-kernels")


def _over_ranges(task: Callable[[int, int], Any], count: int) -> list[Any]:
    """Results of task(begin, end) over ranges that cover [0, count), in any order, on several threads."""
    if count < 2 * MIN_RANGE_ELEMENTS:
        return [task(0, count)]
    threads = min(thread_count(), count // MIN_RANGE_ELEMENTS)
    step = max(MIN_RANGE_ELEMENTS, -(-count // (threads * RANGES_PER_THREAD)))
    begins = iter(range(0, count, step))  # shared: whoever is free takes the next one

    def work() -> list[Any]:
        return [task(begin, min(begin + step, count)) for begin in begins]

    helpers = [_helper_threads(os.getpid()).submit(work) for _ in range(threads - 1)]
    results = work()
    for helper in helpers:
        if not helper.cancel():  # one that never started, in a busy pool, has nothing left to do
            results += helper.result()
    return results


def _check_array(array: np.ndarray, count: int, expected: np.dtype, name: str) -> None:
    if array.dtype != expected or array.ndim != 1 or not array.flags.c_contiguous or array.size != count:
        raise ValueError(
            f"{name} must be a contiguous 1-D array of {count} {expected}, "
            f"but got shape {array.shape}, dtype {array.dtype}, strides {array.strides}"
        )


def weighted_sum(
    sources: Sequence[np.ndarray], weights: Sequence[float], out: np.ndarray, dtype: str
) -> None:
    """out = sum of weights[k] * sources[k], accumulated in fp32 in the given order, rounded once.

    `sources` (1 to MAX_SOURCES) and `out` are contiguous 1-D arrays of one length and of `numpy_dtype(dtype)`.
    `out` may be one of the sources; it must not overlap one in part. Sources of weight zero are skipped.

    Raises ValueError for arrays of another kind, an unknown dtype, or weights that `active_weights` refuses.
    """
    expected = numpy_dtype(dtype)
    active, active_values = active_weights(weights, len(sources))
    _check_array(out, out.size, expected, "out")
    if not out.flags.writeable:
        raise ValueError("out must be writeable")
    for k, source in enumerate(sources):
        _check_array(source, out.size, expected, f"source {k}")
    addresses = np.array([sources[k].__array_interface__["data"][0] for k in active], dtype=np.uint64)
    target = out.view(np.int16) if dtype == "F16" else out
    _over_ranges(lambda begin, end: _sum_range(addresses, active_values, begin, target[begin:end]), out.size)


def bitwise_equal(sources: Sequence[np.ndarray]) -> bool:
    """Whether all arrays (contiguous, 1-D, one length, one dtype) hold the same bits. True for 0 or 1 arrays.

    Raises ValueError for arrays that cannot be compared.
    """
    for k, source in enumerate(sources):
        _check_array(source, sources[0].size, sources[0].dtype, f"source {k}")
    first, *others = [source.view(np.uint8) for source in sources] or [np.empty(0, np.uint8)]
    # Arrays that differ mostly do so at once: look at all their heads before reading any to the end.
    if not all(_equal_range(first[:BLOCK_ELEMENTS], other[:BLOCK_ELEMENTS]) for other in others):
        return False

    def equals_first(other: np.ndarray) -> bool:
        return all(_over_ranges(lambda i, j: _equal_range(first[i:j], other[i:j]), first.size))

    return all(equals_first(other) for other in others)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no element of `values` (contiguous, 1-D, of `numpy_dtype(dtype)`) is NaN or Inf.

    Raises ValueError for an array of another kind or an unknown dtype.
    """
    _check_array(values, values.size, numpy_dtype(dtype), "values")
    bits = values.view(np.uint32) if dtype == "F32" else values
    exponent = bits.dtype.type(_EXPONENT_BITS[dtype])
    return all(_over_ranges(lambda begin, end: _finite_range(bits[begin:end], exponent), values.size))
