"""Weighted sums and checks of flat arrays on the CPU, at the speed of its memory. No torch here.

A dtype is named as in safetensors: "BF16", "F16" or "F32". BF16 and F16 arrays hold bit patterns in
uint16, F32 arrays are float32. Bit-equal to `mergemix_kernels.reference`.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from mergemix_kernels import cpu_native, cpu_tiles
from mergemix_kernels.weights import active_weights

# The least work worth a thread: below two of these, waking another one costs more than it brings.
MIN_RANGE_ELEMENTS = 1 << 16
# More ranges than threads, so that a thread on a busy core leaves its share to the others.
RANGES_PER_THREAD = 4
# Outputs that no cache would keep anyway are stored past it: a line is then not read before it is written.
PAST_CACHE_BYTES = 32 << 20
HEAD_BYTES = 2048  # looked at first of arrays that may be equal
CHECK_ELEMENTS = 1 << 14

_compare = ctypes.CDLL(None).memcmp  # it releases the GIL
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

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


def _over_ranges(task: Callable[[int, int], Any], count: int, threads: int | None = None) -> list[Any]:
    """Results of task(begin, end) over ranges that cover [0, count), in any order, on several threads.

    On `thread_count()` threads at most, or on `threads`; with one, in the calling thread only.
    """
    if count < 2 * MIN_RANGE_ELEMENTS or threads == 1:
        return [task(0, count)]
    threads = min(threads or thread_count(), count // MIN_RANGE_ELEMENTS)
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


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _scratch(count: int) -> tuple[np.ndarray, int]:
    """Memory for `count` float32, uninitialised, and its address: the beginning of a cache line."""
    memory = np.empty(count + cpu_tiles.LINE_BYTES // 4, np.float32)
    address = _address(memory)
    return memory, address + -address % cpu_tiles.LINE_BYTES


@cache
def _preadv2() -> int | None:
    """The address of the system's preadv2, where it can read what is in the page cache only."""
    try:
        found = ctypes.CDLL(None).preadv2
    except AttributeError:
        return None
    return ctypes.cast(found, ctypes.c_void_p).value if sys.platform == "linux" else None


@dataclass(frozen=True)
class LowRank:
    """For every output p, an addend of rank R or less: the sum over r of scales[p, r] * left[i, r] * right[r, j].

    The sources are then elements `first` and following of matrices of shape [rows, cols]; they may begin and
    end inside a row.
    """

    left: np.ndarray  # float32 [rows, R], in C or Fortran order
    right: np.ndarray  # float32 [R, cols], in C order
    scales: np.ndarray  # float32 [P, R]; a rank of scale zero is absent
    first: int

    def check(self, outputs: int, count: int) -> None:
        """ValueError unless this is an addend for P outputs of `count` elements."""
        shapes = f"left {self.left.shape}, right {self.right.shape}, scales {self.scales.shape}"
        if any(part.dtype != np.float32 or part.ndim != 2 for part in (self.left, self.right, self.scales)):
            raise ValueError(f"low-rank factors and scales must be float32 matrices, but got {shapes}")
        (rows, ranks), columns = self.left.shape, self.right.shape[1]
        if self.right.shape[0] != ranks or self.scales.shape != (outputs, ranks):
            raise ValueError(
                f"low-rank shapes must be [rows, R], [R, cols] and [{outputs}, R], but got {shapes}"
            )
        if not 0 <= self.first <= rows * columns - count:
            raise ValueError(
                f"elements {self.first} to {self.first + count} must lie in a {rows} x {columns} matrix"
            )
        if not np.isfinite(self.scales).all():
            raise ValueError(f"low-rank scales must be finite, but got {self.scales.tolist()}")
        if not (self.left.flags.c_contiguous or self.left.flags.f_contiguous):
            raise ValueError(f"left must be in C or Fortran order, but got strides {self.left.strides}")
        if not self.right.flags.c_contiguous:
            raise ValueError(f"right must be in C order, but got strides {self.right.strides}")

    def loop(self, dtype: str, shared: tuple[int, ...]) -> Callable[[int, int], int]:
        """`cpu_loops.sum_low_rank_range` of this addend, given the arguments it shares with `sum_range`."""
        run = cpu_native.loop("sum_low_rank_range", dtype)
        outputs, all_ranks = self.scales.shape
        columns = self.right.shape[1]
        scales = np.ascontiguousarray(self.scales)
        ranks, counts = np.zeros((outputs, all_ranks), np.int64), np.zeros(outputs, np.int64)
        for p in range(outputs):
            active = np.flatnonzero(scales[p])
            counts[p], ranks[p, : active.size] = active.size, active
        most_vectors = max(1, cpu_tiles.PANEL_BYTES // (4 * cpu_tiles.LANES * max(all_ranks, 1)))
        width = min(most_vectors, -(-columns // cpu_tiles.LANES)) * cpu_tiles.LANES
        strip = cpu_tiles.ROWS * cpu_tiles.STRIP_COLUMNS
        needed = width * all_ranks + strip + outputs * all_ranks * cpu_tiles.ROWS
        strides = [stride // 4 for stride in self.left.strides]

        def sum_range(begin: int, end: int) -> int:
            memory, scratch = _scratch(needed)
            largest = run(
                *shared, scratch, begin, end, _address(self.left), *strides, _address(self.right), columns,
                all_ranks, _address(scales), _address(ranks), _address(counts), self.first, width,
            )  # fmt: skip
            del memory  # it had to live until now
            return largest

        return sum_range


class WeightedSums:
    """P outputs from one read of K sources: outs[p] = sum over k of weights[p][k] * sources[k].

    Each output is bit-equal to a weighted sum of its own: accumulated in fp32 in the given order, every
    product and sum rounded, then rounded once to the dtype. Sources of weight zero are absent. May be
    called from many threads at once.
    """

    def __init__(self, weights: Sequence[Sequence[float]], source_count: int) -> None:
        """`weights` is [P][K]. ValueError for no output, or for weights that `active_weights` refuses."""
        if len(weights) == 0:
            raise ValueError("there must be at least one output, but got weights for none")
        active = [active_weights(row, source_count) for row in weights]
        self._source_count = source_count
        self._order = np.concatenate([np.array(indices, np.int64) for indices, _ in active])
        self._weights = np.concatenate([values for _, values in active])
        self._starts = np.cumsum([0, *(values.size for _, values in active)], dtype=np.int64)
        self._most_terms = int(np.diff(self._starts).max())
        self._tables = (_address(self._weights), _address(self._starts))

    def __call__(
        self,
        sources: Sequence[np.ndarray],
        outs: Sequence[np.ndarray],
        dtype: str,
        *,
        low_rank: LowRank | None = None,
        threads: int | None = None,
    ) -> bool:
        """Write all outputs; return whether every element written is finite.

        `sources` (K) and `outs` (P) are contiguous 1-D arrays of one length and of `numpy_dtype(dtype)`. A single
        output may be one of the sources; otherwise outputs must not overlap anything. With `low_rank` its
        products are summed in fp32 by themselves and added to the weighted sum before that is rounded.
        `threads`: at most so many, 1 for the calling thread only; by default `thread_count()`.

        Raises ValueError for arrays of another kind or number, or an unknown dtype.
        """
        self._check(sources, outs, numpy_dtype(dtype))
        count = outs[0].size
        if count == 0:
            return True
        addresses = np.array([_address(source) for source in sources], np.int64)[self._order]
        targets = np.array([_address(out) for out in outs], np.int64)
        tables = (_address(addresses), *self._tables, _address(targets))
        shared = (outs[0].itemsize, *tables, len(outs))
        if low_rank is not None:
            low_rank.check(len(outs), count)
            sum_range = low_rank.loop(dtype, shared)
        else:
            sum_range = self._dense_loop(dtype, shared, len(outs) * outs[0].nbytes >= PAST_CACHE_BYTES)
        return max(_over_ranges(sum_range, count, threads)) < _EXPONENT_BITS[dtype]

    def of_cached_files(
        self,
        descriptors: Sequence[int],
        positions: Sequence[int],
        buffers: Sequence[np.ndarray],
        outs: Sequence[np.ndarray],
        dtype: str,
    ) -> bool | None:
        """The same of sources that lie in files, from bytes `positions` on, in the calling thread.

        They are read STEP_BYTES at a time into `buffers` (K uint8 arrays of at least that), and summed while the
        processor's cache has them. Returns None where they cannot be had without waiting: not all in the page
        cache, another system than Linux. Outputs are then not defined.
        """
        preadv2 = _preadv2()
        if preadv2 is None:
            return None
        count, item_bytes, step = outs[0].size, outs[0].itemsize, cpu_tiles.STEP_BYTES
        held = np.array([_address(buffer) for buffer in buffers], np.int64)
        steps = np.arange(0, count * item_bytes, step)
        tables = held[self._order] - steps[:, None]
        rest = count * item_bytes - int(steps[-1])
        vectors = np.array([[[address, size] for address in held] for size in (step, rest)], np.int64)
        numbers, begins = np.array(descriptors, np.int64), np.array(positions, np.int64)
        targets = np.array([_address(out) for out in outs], np.int64)
        needed = cpu_tiles.BLOCK_ELEMENTS if self._most_terms > cpu_tiles.SIDE_BY_SIDE else 0
        memory, scratch = _scratch(needed)
        largest = cpu_native.loop("read_and_sum", dtype)(
            item_bytes, preadv2, _address(numbers), _address(begins), _address(vectors), len(buffers), step,
            _address(tables), tables.shape[1], *self._tables, _address(targets), len(outs), scratch, count,
        )  # fmt: skip
        del memory  # it had to live until now
        return None if largest == cpu_tiles.UNREAD else largest < _EXPONENT_BITS[dtype]

    def _dense_loop(self, dtype: str, shared: tuple[int, ...], past_cache: bool) -> Callable[[int, int], int]:
        run = cpu_native.loop("sum_range", dtype)
        needed = cpu_tiles.BLOCK_ELEMENTS if self._most_terms > cpu_tiles.SIDE_BY_SIDE else 0

        def sum_range(begin: int, end: int) -> int:
            memory, scratch = _scratch(needed)
            largest = run(*shared, scratch, begin, end, past_cache)
            del memory  # it had to live until now
            return largest

        return sum_range

    def _check(self, sources: Sequence[np.ndarray], outs: Sequence[np.ndarray], expected: np.dtype) -> None:
        outputs = self._starts.size - 1
        if len(sources) != self._source_count or len(outs) != outputs:
            raise ValueError(
                f"there must be {self._source_count} sources and {outputs} outs, one per weight, "
                f"but got {len(sources)} and {len(outs)}"
            )
        for p, out in enumerate(outs):
            _check_array(out, outs[0].size, expected, f"out {p}" if outputs > 1 else "out")
            if not out.flags.writeable:
                raise ValueError("out must be writeable")
        for k, source in enumerate(sources):
            _check_array(source, outs[0].size, expected, f"source {k}")
        if outputs > 1 and outs[0].size > 0:
            held = [_address(array) for array in (*outs, *sources)]
            if len(set(held)) < outputs + len(set(held[outputs:])):
                raise ValueError("of several outs none may be another, or a source")


def weighted_sum(
    sources: Sequence[np.ndarray], weights: Sequence[float], out: np.ndarray, dtype: str
) -> None:
    """One output of `WeightedSums`, which has the rules: out = sum of weights[k] * sources[k]."""
    WeightedSums([weights], len(sources))(sources, [out], dtype)


def bitwise_equal(sources: Sequence[np.ndarray]) -> bool:
    """Whether all arrays (contiguous, 1-D, one length, one dtype) hold the same bits. True for 0 or 1 arrays.

    Raises ValueError for arrays that cannot be compared.
    """
    for k, source in enumerate(sources):
        _check_array(source, sources[0].size, sources[0].dtype, f"source {k}")
    first, *others = sources or [np.empty(0, np.uint8)]

    def same(other: np.ndarray, begin: int, end: int) -> bool:
        return _compare(_address(first) + begin, _address(other) + begin, end - begin) == 0

    # Arrays that differ mostly do so at once: look at all their heads before reading any to the end.
    head = min(HEAD_BYTES, first.nbytes)
    return all(same(other, 0, head) for other in others) and all(
        all(_over_ranges(partial(same, other), first.nbytes)) for other in others
    )


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Whether no element of `values` (contiguous, 1-D, of `numpy_dtype(dtype)`) is NaN or Inf.

    Raises ValueError for an array of another kind or an unknown dtype.
    """
    _check_array(values, values.size, numpy_dtype(dtype), "values")
    bits = values.view(np.uint32) if dtype == "F32" else values
    exponent = bits.dtype.type(_EXPONENT_BITS[dtype])

    def finite(begin: int, end: int) -> bool:
        parts = (bits[i : min(i + CHECK_ELEMENTS, end)] for i in range(begin, end, CHECK_ELEMENTS))
        return not any(((part & exponent) == exponent).any() for part in parts)

    return all(_over_ranges(finite, values.size))
