"""Writing a checkpoint directory: beside its final place, then renamed, so that it is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.files import CHAT_TEMPLATES, SINGLE_NAME, is_side_file
from mergemix.checkpoints.header import DTYPE_BITS, LENGTH_BYTES, TensorInfo
from mergemix.errors import OutputError

# Tensors begin at a multiple of this in the file, as writes past the page cache need; readers ask for 8.
DATA_ALIGNMENT = 4096
DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written. header: all its bytes before the first tensor's.

    offsets: where each tensor's bytes begin, from the file's start. nbytes: of the whole file.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def shard_layout(template: Checkpoint) -> list[Shard]:
    """The template's files and its order, wider types first; a single file gets the name that libraries expect.

    So every tensor begins at a multiple of its element's size.
    """
    files: dict[str, list[TensorInfo]] = {}
    for tensor in template.tensors.values():
        files.setdefault(tensor.path.name, []).append(tensor)
    for tensors in files.values():
        tensors.sort(key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    if len(files) == 1:
        return [_shard(SINGLE_NAME, tensors) for tensors in files.values()]
    return [_shard(file, tensors) for file, tensors in files.items()]


def _shard(file: str, tensors: Sequence[TensorInfo]) -> Shard:
    # "pt" is what transformers and vLLM expect to find for tensors in PyTorch's layout.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    offsets = {}
    position = len(header)
    for tensor in tensors:
        offsets[tensor.name] = position
        position += tensor.nbytes
    return Shard(file, header, offsets, position)


def index_json(shards: Sequence[Shard], tensor_bytes: int) -> bytes:
    """model.safetensors.index.json: which file holds which tensor."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def side_files(root: Path) -> list[Path]:
    """What makes the weights in `root` a complete model: configuration, tokenizer, chat templates, code."""
    top = [path for path in root.iterdir() if path.is_file() and is_side_file(path.name)]
    return sorted([*top, *root.glob(CHAT_TEMPLATES)])


def check_output(out: Path) -> None:
    """Raise OutputError unless the directory `out` could be created: it is absent, its parent is writable."""
    parent = Path(os.path.abspath(out)).parent
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; give another directory, or remove it first")
    if not parent.is_dir():
        raise OutputError(f"{out} cannot be created: {parent} is not a directory; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be created: {parent} is not writable for this user")


class DirectoryWriter:
    """A directory that appears at `out` complete, or not at all.

    open(nbytes), allocate and write(...), then commit(), and discard() in any case; write may be called from several
    threads. Until the commit everything lies in the hidden sibling `.<name>.tmp-<pid>`, which is locked. What a
    killed process left is removed by the next writer of the same `out`.
    Raises OutputError when `out` exists, cannot be written, or the disk is full.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f".{self.out.name}.tmp-{os.getpid()}"
        self._lock = -1
        self._files = _OutputFiles(self.path)

    def open(self, nbytes: int) -> None:
        """Make the temporary directory. nbytes: what will be written, checked against the free space."""
        check_output(self.out)
        self._remove_leftovers()
        with self._translated():
            os.mkdir(self.path)
            try:
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                os.rmdir(self.path)
                raise
            with suppress(OSError):  # some network file systems have no locks: the process id then has to do
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free_bytes = shutil.disk_usage(self.out.parent).free
            if free_bytes < nbytes:
                raise OutputError(
                    f"{self.out} needs {nbytes} bytes, but only {free_bytes} are free on its disk; "
                    "free some space or give a directory on another disk"
                )

    def allocate(self, name: str, nbytes: int, body_bytes: int) -> None:
        """Take the space of a file of `nbytes` on the disk now, so that it cannot fill up half-way.

        When body_bytes have been written to it, they are brought to the disk while other files are written.
        """
        with self._translated():
            self._files.allocate(name, nbytes, body_bytes)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset` of the file `name`, in any order; a range may be written again."""
        with self._translated():
            self._files.write(name, offset, memoryview(data))

    def finish(self, name: str) -> None:
        """Bring the file `name` to the disk and close it: of many outputs not all files can stay open."""
        with self._translated():
            self._files.finish(name)

    def commit(self) -> None:
        """Bring everything to the disk, then make it appear at `out`."""
        with self._translated():
            self._files.sync()
            for folder, _, _ in os.walk(self.path):
                _sync_directory(folder)
            if os.path.lexists(self.out):  # rename would replace an empty directory without a word
                raise OutputError(
                    f"{self.out} was created by somebody else meanwhile; nothing was left behind"
                )
            os.rename(self.path, self.out)
        try:
            _sync_directory(self.out.parent)
        except OSError as error:
            raise OutputError(
                f"{self.out} is complete, but may not survive a power failure: {self.out.parent} could not be "
                f"brought to the disk: {error.strerror}"
            ) from error

    def discard(self) -> None:
        """Remove what was not committed; nothing after a commit."""
        if self._lock < 0:
            return
        self._files.discard()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def _remove_leftovers(self) -> None:
        """Remove the temporary directories of killed writers of the same output."""
        prefix = f".{self.out.name}.tmp-"
        for found in self.out.parent.glob(glob.escape(prefix) + "*"):
            pid = found.name.removeprefix(prefix)
            if pid.isdecimal() and not _is_other_process(int(pid)) and not _is_locked(found):
                shutil.rmtree(found, ignore_errors=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "; free some space or give a directory on another disk" if full else ""
            raise OutputError(
                f"cannot write {self.out}: {error.strerror}{hint}; nothing was left behind"
            ) from error


class _OutputFiles:
    """The files below one directory, written past the page cache where the system can do that.

    The page cache would double the memory traffic, and its write-back is slower than direct writes of the same
    bytes. Ends of files, headers and small files go through it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._descriptors: dict[tuple[str, int], int] = {}
        self._missing: dict[str, int] = {}
        self._direct = DIRECT
        self._discarded = False

    def allocate(self, name: str, nbytes: int, body_bytes: int) -> None:
        try:
            os.posix_fallocate(self._open(name, 0), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # no such thing on this file system
                raise
        self._missing[name] = body_bytes
        self._close([(name, 0)])  # several outputs of many shards may be more files than a process may open

    def write(self, name: str, offset: int, data: memoryview) -> None:
        nbytes = len(data)
        written = self._write_direct(name, offset, data)
        data, offset = data[written:], offset + written
        file = self._open(name, 0)
        while data:
            written = os.pwrite(file, data, offset)
            data, offset = data[written:], offset + written
        with self._lock:
            missing = self._missing.get(name, 0)
            self._missing[name] = missing - nbytes
        if nbytes and missing == nbytes:
            self.finish(name)

    def _write_direct(self, name: str, offset: int, data: memoryview) -> int:
        """Write what can be written so, from the beginning of `data`: how many bytes."""
        if not self._direct or offset % DATA_ALIGNMENT or _address(data) % DATA_ALIGNMENT:
            return 0
        end, done = len(data) // DATA_ALIGNMENT * DATA_ALIGNMENT, 0
        while done < end:
            try:
                written = os.pwrite(self._open(name, self._direct), data[done:end], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = 0  # a file system that has no direct writes
                break
            if written % DATA_ALIGNMENT:
                break
            done += written
        return done

    def _open(self, name: str, flags: int) -> int:
        with self._lock:
            file = self._descriptors.get((name, flags))
            if self._discarded:  # a thread that outlived the merge must not make the directory again
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if file is None:
                path = self._root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                file = self._descriptors[name, flags] = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
            return file

    def finish(self, name: str) -> None:
        self._close([(name, 0), (name, DIRECT)], sync=True)

    def sync(self) -> None:
        """Bring all files to the disk, and close them."""
        self._close(list(self._descriptors), sync=True)

    def _close(self, keys: Sequence[tuple[str, int]], *, sync: bool = False) -> None:
        for key in keys:
            with self._lock:
                file = self._descriptors.pop(key, None)
            if file is None:
                continue
            try:
                if sync:
                    os.fsync(file)
            finally:
                os.close(file)

    def discard(self) -> None:
        """Close all files, whatever the system says: nothing of them is kept."""
        with self._lock:
            self._discarded = True
        for key in list(self._descriptors):
            with suppress(OSError):
                self._close([key])


def _address(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).__array_interface__["data"][0] if data else 1


def _is_other_process(pid: int) -> bool:
    """Whether a process other than this one has the id. In containers every run may get the same id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; a number that is no process id
        return True
    return pid != os.getpid()


def _is_locked(directory: Path) -> bool:
    """Whether a live writer holds `directory`: perhaps on another machine, where process ids mean nothing."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync_directory(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
