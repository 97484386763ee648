"""Tensor bytes by range: from local files with pread, or from the Hub. Every read of a tensor goes through here."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from mergemix.checkpoints.files import FileIdentity, check_unchanged
from mergemix.checkpoints.header import TensorInfo
from mergemix.errors import CheckpointError

# Experts times shards may be more files than a process may open; this many stay open.
MAX_OPEN_FILES = 256


class RangeFile(Protocol):
    """An open file of tensor bytes, used by several threads at once."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Read bytes from `offset` on into `view`: how many; perhaps fewer than asked for, 0 at the file's end.

        Raises OSError or CheckpointError.
        """

    @property
    def descriptor(self) -> int | None:
        """Of a file on this machine, while it is open."""

    def check_unchanged(self) -> None:
        """Raise CheckpointError unless this is still the file whose header was read."""

    def forget(self, offset: int, nbytes: int) -> None:
        """A hint: these bytes are not read again, and need not stay in the system's page cache."""

    def interrupt(self) -> None:
        """Let reads that wait, perhaps for minutes, for another attempt fail now."""

    def close(self) -> None: ...


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path, identity: FileIdentity) -> None:
        self._path = path
        self._identity = identity
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            check_unchanged(path, self._descriptor, identity)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def read_into(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor, [view], offset)

    def check_unchanged(self) -> None:
        """The open file, and what its path names now, are what they were."""
        check_unchanged(self._path, self._descriptor, self._identity)
        try:
            current = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self._path} vanished while it was read; leave checkpoints alone while they are used, and "
                "start again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {self._path} any more: {error.strerror}") from error
        try:
            check_unchanged(self._path, current, self._identity)
        finally:
            os.close(current)

    def forget(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def interrupt(self) -> None:
        """Nothing to do: reads do not wait."""

    def close(self) -> None:
        os.close(self._descriptor)


def open_range(tensor: TensorInfo) -> RangeFile:
    """The file that holds `tensor`. Raises CheckpointError when it is gone, unreadable or no longer the same."""
    try:
        if isinstance(tensor.file, FileIdentity):
            return LocalFile(tensor.path, tensor.file)
        from mergemix.checkpoints.hub_ranges import open_hub_file

        return open_hub_file(tensor.file)
    except OSError as error:
        raise _unreadable(tensor, error) from error


def read_into(file: RangeFile, tensor: TensorInfo, begin: int, view: memoryview) -> None:
    """Fill `view` with the bytes of the file from byte `begin` of `tensor` on; they may go on into its neighbours.

    Raises CheckpointError when the file ends early or cannot be read.
    """
    done = 0
    try:
        while done < len(view):
            count = file.read_into(view[done:], tensor.offset + begin + done)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.path} was truncated while it was read: {len(view) - done} bytes of tensor "
                    f"{tensor.name!r} or those after it are missing"
                )
            done += count
    except OSError as error:
        raise _unreadable(tensor, error) from error


def read_range(tensor: TensorInfo, begin: int, nbytes: int) -> bytes:
    """Bytes [begin, begin + nbytes) of a tensor. Raises CheckpointError as `open_range` and `read_into`."""
    data = bytearray(nbytes)
    file = open_range(tensor)
    try:
        read_into(file, tensor, begin, memoryview(data))
    finally:
        file.close()
    return bytes(data)


def _unreadable(tensor: TensorInfo, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot read tensor {tensor.name!r} from {tensor.path}: {error.strerror}")


def _close_unchanged(file: RangeFile) -> None:
    try:
        file.check_unchanged()
    finally:
        file.close()


class OpenFiles:
    """Files that stay open between reads, shared by threads; the longest unused are closed beyond a limit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, RangeFile] = OrderedDict()
        self._users: dict[Path, int] = {}

    def read_into(self, tensor: TensorInfo, begin: int, view: memoryview, *, last: bool = False) -> None:
        """Fill `view` from byte `begin` of `tensor` on, as `read_into`; raises as that and as `open_range`.

        last: nobody reads these bytes again, and the system need not keep them in its page cache.
        """
        with self.using(tensor) as file:
            read_into(file, tensor, begin, view)
            if last:
                file.forget(tensor.offset + begin, len(view))

    @contextmanager
    def using(self, tensor: TensorInfo) -> Iterator[RangeFile]:
        """The file that holds `tensor`, not closed meanwhile; raises as `open_range`."""
        path = tensor.path
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open_range(tensor)
                self._users[path] = 0
            else:
                self._files.move_to_end(path)
            self._users[path] += 1
            idle = self._take_idle()
        try:
            for other in idle:  # outside of the lock: a file on the Hub may have to be asked for
                _close_unchanged(other)
            yield file
        finally:
            with self._lock:
                self._users[path] -= 1

    def _take_idle(self) -> list[RangeFile]:
        """Files nobody reads, the longest unused first, as many as there are too many."""
        excess = max(len(self._files) - MAX_OPEN_FILES, 0)
        idle = [path for path in self._files if excess and self._users[path] == 0][:excess]
        return [self._files.pop(path) for path in idle]

    def interrupt(self) -> None:
        """Let reads in other threads that wait for another attempt fail now."""
        with self._lock:
            for file in self._files.values():
                file.interrupt()

    def check_unchanged(self) -> None:
        """Raise CheckpointError for a file that changed or vanished since it was opened."""
        with self._lock:
            for file in self._files.values():
                file.check_unchanged()

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
