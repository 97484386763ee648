"""The delta cache: which operands are kept in which memory, and the memory that the engines of a node share.

A destination (a part of a live parameter) has one slot per operand, all of them in one tier. Needs no torch.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mergemix.errors import ConfigError
from mergemix.merge.resources import free_memory
from mergemix.units import size_text

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
ALIGNMENT = 256  # of slots, in bytes
PAGE_BYTES = 4096


def aligned(nbytes: int, to: int = ALIGNMENT) -> int:
    return -(-nbytes // to) * to


def assign_tiers(sizes: Sequence[int], device_cache: int, host_cache: int) -> list[Tier]:
    """The tier of each destination, in plan order. sizes: bytes of all of its slots together, each aligned.

    The first ones go to device memory, the next to the host; one that does not fit leaves its place to smaller ones
    after it. What is on disk is read from the checkpoints at every swap.
    """
    left = {"device": device_cache, "host": host_cache}
    tiers: list[Tier] = []
    for size in sizes:
        tier: Tier = "device" if size <= left["device"] else "host" if size <= left["host"] else "disk"
        if tier != "disk":
            left[tier] -= size
        tiers.append(tier)
    return tiers


def shared_memory() -> Path:
    """Where files are memory that all processes of this machine can share."""
    place = Path("/dev/shm")
    return place if place.is_dir() else Path(tempfile.gettempdir())


@dataclass(frozen=True)
class Layout:
    """A segment's bytes: `flags` of one byte each, 1 where a slot is filled; from the next page on the slots."""

    flags: int
    nbytes: int

    @property
    def begin(self) -> int:
        return aligned(self.flags, PAGE_BYTES)

    @property
    def total(self) -> int:
        return self.begin + max(aligned(self.nbytes, PAGE_BYTES), PAGE_BYTES)


class Segment:
    """Memory of all processes that name the same contents: whoever is first to need a slot fills it for all.

    flags: uint8 (layout.flags,); to be set after the slot's bytes are there. Two processes that fill one slot at once
    write the same bytes. data: uint8 (layout.nbytes,).

    A file that users hold a shared lock on; the last one to close it removes it, and `remove_stale` those whose
    users were all killed.
    """

    def __init__(self, digest: str, layout: Layout, place: Path | None = None) -> None:
        """digest: names the contents, so that what differs in any byte must differ in it. place: a directory.

        Raises ConfigError where the memory is not to be had: all of it is taken at once.
        """
        place = place or shared_memory()
        self.path = place / f"{_prefix()}{digest[:40]}"
        self._descriptor = _open_locked(self.path)
        try:
            _reserve(self._descriptor, layout.total, place)
            self._mapping = mmap.mmap(self._descriptor, layout.total)
        except BaseException:
            self._leave()
            raise
        memory = np.frombuffer(self._mapping, np.uint8)
        self.flags = memory[: layout.flags]
        self.data = memory[layout.begin : layout.begin + layout.nbytes]

    def close(self) -> None:
        """Leave the memory to the others, or free it when there are none; safe to call twice.

        What still refers to `flags` or `data` may go on reading: the memory is mapped until nothing does.
        """
        if self._descriptor >= 0:
            self._leave()
            del self.flags, self.data, self._mapping

    def _leave(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        _remove_unused(self.path, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a mapping keeps the file open, and with it the lock
        os.close(descriptor)


def remove_stale(place: Path | None = None) -> list[Path]:
    """Remove this user's segments that no process uses: those of processes that were killed. Returns them."""
    removed = []
    for path in _segments(place or shared_memory()):
        with suppress(OSError):  # it may go at any moment
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if _remove_unused(path, descriptor):
                    removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def _prefix() -> str:
    return f"mergemix-{os.getuid()}-"


def _segments(place: Path) -> Iterator[Path]:
    yield from place.glob(f"{_prefix()}*")


def _open_locked(path: Path) -> int:
    """The file of that name, made if need be, with a shared lock on it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(
                f"the host cache's shared memory {path} cannot be opened ({error.strerror}): remove it, or leave the "
                "host cache out"
            ) from error
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"the host cache's shared memory {path} belongs to somebody else, who could put other weights "
                    "there: remove it, or leave the host cache out"
                )
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_named(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed while we waited for the lock


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(path: Path, descriptor: int) -> bool:
    """Remove the file unless somebody else has a lock on it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    named = _is_named(path, descriptor)
    if named:
        path.unlink()
    return named


def _reserve(descriptor: int, nbytes: int, place: Path) -> None:
    """Take the memory now: a write into a file system that is full would end the process later."""
    state = os.fstat(descriptor)
    missing = nbytes - 512 * state.st_blocks
    if missing <= 0 and state.st_size >= nbytes:
        return
    space = os.statvfs(place)
    free = {f"of {place}": space.f_bavail * space.f_frsize, "of memory": free_memory()}
    for what, available in free.items():
        if available is not None and missing > available:
            raise _no_room(missing, f"only {size_text(available)} {what} are free")
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        raise _no_room(missing, f"{place}: {error.strerror}") from error


def _no_room(nbytes: int, reason: str) -> ConfigError:
    return ConfigError(
        f"the host cache needs {size_text(nbytes)} more of shared memory, but {reason}: make the host cache "
        "smaller, or free memory"
    )
