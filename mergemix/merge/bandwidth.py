"""How fast this machine reads, writes, copies and merges: measured on the spot, in a second or two.

The one place for measuring: `mergemix plan` foretells with it, `mergemix doctor` shows it.
"""

from __future__ import annotations

import bisect
import errno
import fcntl
import itertools
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergemix.checkpoints.files import FileIdentity
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import LocalFile, RangeFile, open_range
from mergemix.checkpoints.writer import DIRECT
from mergemix_kernels import cpu

BLOCK_BYTES = 1 << 20  # read and written at a time
THREADS = 8
PROBES = 4  # of the page cache, a range
READ_SECONDS = 2.0  # reading stops then: a slow disk or network is known by now
KERNEL_BYTES = 1 << 26  # of all sources and outputs: beyond the caches
WRITE_BYTES = 1 << 27


@dataclass(frozen=True)
class Rate:
    """bytes_per_s: by the clock. processor_s_per_byte: what it costs the cores, all together."""

    bytes_per_s: float
    processor_s_per_byte: float


@dataclass(frozen=True)
class Range:
    """Bytes of an input file that a measurement reads, from byte `begin` of a tensor on, and of its neighbours."""

    tensor: TensorInfo
    begin: int
    nbytes: int


def spread_ranges(tensors: Sequence[TensorInfo], count: int, nbytes: int, phase: float) -> list[Range]:
    """Up to `nbytes` of the file from each of `count` places, which are evenly spread over the tensors' bytes.

    phase: 0 to 1, where in its share each place lies.
    """
    ends = list(itertools.accumulate(tensor.nbytes for tensor in tensors))
    ranges = []
    for index in range(count if ends and ends[-1] else 0):
        place = min(int((index + phase) * ends[-1] / count), ends[-1] - 1)
        at = bisect.bisect_right(ends, place)
        begin = place - (ends[at] - tensors[at].nbytes)
        left = tensors[at].file.nbytes - tensors[at].offset - begin
        ranges.append(Range(tensors[at], begin, min(nbytes, left)))
    return ranges


def read_rate(ranges: Sequence[Range]) -> tuple[Rate, float | None]:
    """Rate at which the ranges are read, several at a time, and what share of them was in the page cache.

    The share is None where that cannot be told. A range that was not in the page cache is removed from it again.
    Raises CheckpointError or OSError as reading does.
    """
    shares = [_cached_share(each) for each in ranges]
    known = [share for share in shares if share is not None]
    deadline = time.perf_counter() + READ_SECONDS

    def read(job: tuple[Range, float | None]) -> int:
        each, share = job
        file = open_range(each.tensor)
        try:
            keep = share is None or share > 0.5
            return _read_through(
                file, each.tensor.offset + each.begin, each.nbytes, keep=keep, deadline=deadline
            )
        finally:
            file.close()

    with ThreadPoolExecutor(THREADS) as pool:
        rate = _measure(lambda: sum(pool.map(read, zip(ranges, shares, strict=True))))
    return rate, sum(known) / len(known) if known else None


def file_rates(directory: Path, nbytes: int = WRITE_BYTES) -> tuple[Rate, Rate]:
    """Rates of writing a file in `directory` and of reading it again, neither through the page cache.

    The file has no name, or not for long: it is gone whatever happens. Raises OSError when it cannot be written.
    """
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".mergemix-", buffering=0) as file:
        written = _measure(lambda: _write(file.fileno(), nbytes))
        source = LocalFile(Path(file.name), FileIdentity.of(file.fileno()))
        try:
            source.forget(0, nbytes)
            read = _measure(lambda: _read_in_threads(source, nbytes))
        finally:
            source.close()
    return written, read


def write_rate(directory: Path, nbytes: int = WRITE_BYTES) -> Rate:
    """Rate of writing a file in `directory`, fsync included, past the page cache where that is possible.

    The file has no name, so that nothing stays behind, also when the process is killed.
    Raises OSError when it cannot be written.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        return _measure(lambda: _write(file.fileno(), nbytes))


def copy_rate(nbytes: int = KERNEL_BYTES) -> Rate:
    """Memory copy on all cores; bytes read and written both count."""
    source, target = np.zeros(nbytes // 2, np.uint8), np.empty(nbytes // 2, np.uint8)
    threads = cpu.thread_count()
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> int:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            return 2 * source.nbytes

        return _best(copy)


def kernel_start() -> float:
    """Seconds until the CPU kernel has done its first sum in this process: it is compiled, or read from disk."""
    begin = time.perf_counter()
    sources = [np.zeros(1, np.uint16)] * 2
    cpu.weighted_sum(sources, [0.5, 0.5], np.empty(1, np.uint16), "BF16")
    return time.perf_counter() - begin


def kernel_rate(
    num_sources: int, num_outputs: int = 1, dtype: str = "BF16", *, rank: int = 0, nbytes: int = KERNEL_BYTES
) -> Rate:
    """The CPU kernel on all cores; bytes of sources and outputs both count.

    rank: of the low-rank product that is added, 0 for none.
    """
    element = cpu.numpy_dtype(dtype)
    columns = 1 << 10
    rows = max(1, nbytes // (num_sources + num_outputs) // element.itemsize // columns)
    sources = [np.zeros(rows * columns, element) for _ in range(num_sources)]
    outs = [np.empty(rows * columns, element) for _ in range(num_outputs)]
    sums = cpu.WeightedSums([[1 / num_sources] * num_sources] * num_outputs, num_sources)
    low_rank = None
    if rank:
        left, right = np.zeros((rows, rank), np.float32), np.zeros((rank, columns), np.float32)
        low_rank = cpu.LowRank(left, right, np.ones((num_outputs, rank), np.float32), 0)

    def merge() -> int:
        sums(sources, outs, dtype, low_rank=low_rank)
        return sum(array.nbytes for array in (*sources, *outs))

    return _best(merge)


def _measure(action: Callable[[], int]) -> Rate:
    """The rate of an action that returns how many bytes it moved."""
    processor, begin = time.process_time(), time.perf_counter()
    nbytes = action()
    seconds = max(time.perf_counter() - begin, 1e-9)
    return Rate(nbytes / seconds, (time.process_time() - processor) / max(nbytes, 1))


def _best(action: Callable[[], int], repeats: int = 5) -> Rate:
    """The best of several, after one that compiles and warms."""
    action()
    return max((_measure(action) for _ in range(repeats)), key=lambda rate: rate.bytes_per_s)


def _read_through(
    file: RangeFile, offset: int, nbytes: int, *, keep: bool, deadline: float = math.inf
) -> int:
    """Read a range block by block, the first even after the deadline. keep: leave it in the page cache."""
    buffer = memoryview(bytearray(min(nbytes, BLOCK_BYTES)))
    done = 0
    while done < nbytes:
        count = file.read_into(buffer[: nbytes - done], offset + done)
        done += count
        if count == 0 or time.perf_counter() > deadline:
            break
    if not keep:
        file.forget(offset, nbytes)
    return done


def _read_in_threads(file: RangeFile, nbytes: int) -> int:
    step = 4 * BLOCK_BYTES
    with ThreadPoolExecutor(THREADS) as pool:
        begins = range(0, nbytes, step)
        return sum(
            pool.map(lambda begin: _read_through(file, begin, min(step, nbytes - begin), keep=False), begins)
        )


def _cached_share(part: Range) -> float | None:
    """What share of a few places in the range is in the page cache; None where that cannot be asked."""
    if not isinstance(part.tensor.file, FileIdentity) or not hasattr(os, "RWF_NOWAIT"):
        return None
    begin = part.tensor.offset + part.begin
    found = 0
    try:
        file = os.open(part.tensor.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # asking reads nothing ahead
            for place in range(PROBES):
                with suppress(BlockingIOError):
                    offset = begin + (2 * place + 1) * part.nbytes // (2 * PROBES)
                    found += os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
        finally:
            os.close(file)
    except OSError:
        return None
    return found / PROBES


def _write(file: int, nbytes: int) -> int:
    """Write and fsync as the merge does: allocated first, blocks from several threads, past the page cache."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    block = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as direct writes need
    block.write(os.urandom(BLOCK_BYTES))  # not zeros, which some disks do not store
    if DIRECT:
        try:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | DIRECT)
            os.pwrite(file, block, 0)
        except OSError:  # a file system without direct writes
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~DIRECT)
    with ThreadPoolExecutor(THREADS) as pool:
        written = sum(pool.map(lambda begin: os.pwrite(file, block, begin), range(0, nbytes, BLOCK_BYTES)))
    os.fsync(file)
    return written
