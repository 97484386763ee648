"""The disk that benchmarks use: scratch space, what the page cache holds, and the rates that bound a merge."""

import ctypes
import itertools
import mmap
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import BenchmarkError

PIECE_BYTES = 64 << 20  # what a reader takes at once from the files' queue
BLOCK_BYTES = 4 << 20  # of one read or write
READERS = (1, 4, 8)
WRITERS = (1, 4)
DISK_READ, DIRECT_READ = "disk read, cold", "disk read, cold, direct"
PAGE_CACHE_READ, DISK_WRITE = "page-cache read", "disk write, direct, fsync"
READ_AND_WRITE = "disk read, cold, beside the write of the result"
COLD_SHARE, WARM_SHARE = 0.01, 0.99  # of a file's pages in memory: at most, at least


@contextmanager
def scratch_directory(parent: Path | None, needed_bytes: int) -> Iterator[Path]:
    """A new directory in `parent` (None: the system's temporary place), removed afterwards with all it holds.

    Afterwards includes Ctrl-C and SIGTERM: gigabytes must not stay.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="mergemix-bench-", dir=parent) as name:
            free = shutil.disk_usage(name).free
            if free < needed_bytes:
                raise BenchmarkError(
                    f"{name} has {free / 1e9:.1f} GB free, but this benchmark needs {needed_bytes / 1e9:.1f} GB; "
                    "give --scratch on another disk, or smaller models"
                )
            yield Path(name)
    finally:
        signal.signal(signal.SIGTERM, before)


def storage_conditions(directory: Path) -> dict[str, Any]:
    """The memory, and the file system that holds `directory`; what is unknown is absent."""
    found: dict[str, Any] = {"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    mounts = Path("/proc/mounts").read_text().splitlines()
    holders = [line.split() for line in mounts if directory.resolve().is_relative_to(line.split()[1])]
    if holders:
        longest = max(holders, key=lambda fields: len(fields[1]))
        found |= {"disk": longest[0], "file_system": longest[2], "mount_options": longest[3]}
    return found


def remove(directory: Path) -> None:
    """Remove a result, and wait until the disk is idle: what one run leaves to do must not slow the next one."""
    shutil.rmtree(directory)
    os.sync()


def cached_share(paths: Sequence[Path]) -> float:
    """The share of the files' pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for path in paths:
        nbytes = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ) as mapped:
            address = np.frombuffer(mapped, np.uint8)
            states = np.zeros(-(-nbytes // mmap.PAGESIZE), np.uint8)
            arguments = [ctypes.c_void_p(address.ctypes.data), ctypes.c_size_t(nbytes)]
            if libc.mincore(*arguments, ctypes.c_void_p(states.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed", str(path))
            del address
        pages += states.size
        resident += int(np.count_nonzero(states & 1))
    return resident / pages


def make_cold(paths: Sequence[Path]) -> None:
    """Drop the files from the page cache, and check that they are gone."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (share := cached_share(paths)) > COLD_SHARE:
        raise BenchmarkError(f"{share:.1%} of the inputs stay in the page cache, so cold runs are not cold")


def make_warm(paths: Sequence[Path]) -> None:
    """Read the files into the page cache, and check that they stay there."""
    read_rate(paths, readers=1)
    if (share := cached_share(paths)) < WARM_SHARE:
        raise BenchmarkError(f"only {share:.1%} of the inputs fit into the page cache; use smaller models")


def read_rate(paths: Sequence[Path], readers: int, *, direct: bool = False) -> float:
    """Bytes per second of reading all the files in order, in `readers` threads. direct: past the page cache."""
    pieces = [(path, begin) for path in paths for begin in range(0, path.stat().st_size, PIECE_BYTES)]
    buffers = threading.local()

    def read(piece: tuple[Path, int]) -> int:
        if not hasattr(buffers, "block"):
            buffers.block = mmap.mmap(-1, BLOCK_BYTES)  # page-aligned, as direct reads need
        path, begin = piece
        file = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            done = 0
            while done < PIECE_BYTES and (count := os.preadv(file, [buffers.block], begin + done)):
                done += count
                if count % mmap.PAGESIZE:
                    break  # the end of the file
            return done
        finally:
            os.close(file)

    started = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        nbytes = sum(pool.map(read, pieces))
    return nbytes / (time.perf_counter() - started)


def write_rate(directory: Path, nbytes: int, writers: int) -> float:
    """Bytes per second of writing one preallocated file past the page cache, fsync included."""
    nbytes = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
    path = directory / "write-probe"
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))
    started = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(file, 0, nbytes)
        with ThreadPoolExecutor(writers) as pool:
            list(pool.map(lambda offset: os.pwrite(file, block, offset), range(0, nbytes, BLOCK_BYTES)))
        os.fsync(file)
        return nbytes / (time.perf_counter() - started)
    finally:
        os.close(file)
        path.unlink()


def read_rate_beside_write(
    paths: Sequence[Path], readers: int, directory: Path, write_bytes: int, writers: int
) -> float:
    """Bytes read per second until both are done: what a merge is bound by on a disk that it reads and writes."""
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_rate, directory, write_bytes, writers)
        read_rate(paths, readers)
        writing.result()
    return sum(path.stat().st_size for path in paths) / (time.perf_counter() - started)


def disk_rooflines(paths: Sequence[Path], directory: Path, write_bytes: int) -> list[dict[str, Any]]:
    """Rows of what bounds a merge: cold and cached reads of the files, and writes to their disk.

    A cold read is tried with several readers, through the page cache and past it.
    """
    rows = []

    def add(provider: str, threads: int, rate: float) -> None:
        rows.append({"case": "roofline", "provider": provider, "threads": threads, "gb_per_s": rate / 1e9})

    for provider, readers in itertools.product((DISK_READ, DIRECT_READ), READERS):
        make_cold(paths)
        add(provider, readers, read_rate(paths, readers, direct=provider == DIRECT_READ))
    make_warm(paths)
    for readers in sorted({1, os.cpu_count() or 1}):
        add(PAGE_CACHE_READ, readers, read_rate(paths, readers))
    for writers in WRITERS:
        add(DISK_WRITE, writers, write_rate(directory, write_bytes, writers))
    readers, writers = (best_row(rows, provider)["threads"] for provider in (DISK_READ, DISK_WRITE))
    make_cold(paths)
    rate = read_rate_beside_write(paths, readers, directory, write_bytes, writers)
    add(READ_AND_WRITE, readers, rate)
    return rows


def best_row(rows: Sequence[dict[str, Any]], provider: str) -> dict[str, Any]:
    """The fastest of a roofline's rows."""
    return max((row for row in rows if row["provider"] == provider), key=lambda row: row["gb_per_s"])
