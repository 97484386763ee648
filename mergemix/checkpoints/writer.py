"""Writing a checkpoint directory: beside its final place, then renamed, so that it is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.files import SINGLE_NAME, is_side_file
from mergemix.checkpoints.header import LENGTH_BYTES, TensorInfo
from mergemix.errors import OutputError

HEADER_ALIGNMENT = 8


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
    """The template's files, its tensors in its order; a single file gets the name that libraries expect."""
    files: dict[str, list[TensorInfo]] = {}
    for tensor in template.tensors.values():
        files.setdefault(tensor.path.name, []).append(tensor)
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
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
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
    return sorted([*top, *root.glob("additional_chat_templates/*.jinja")])


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

    open(nbytes), write(...), then commit(), and discard() in any case. Until the commit everything lies in
    the hidden sibling `.<name>.tmp-<pid>`, which is locked. What a killed process left is removed by the next
    writer of the same `out`. Raises OutputError when `out` exists, cannot be written, or the disk is full.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.path = self.out.parent / f".{self.out.name}.tmp-{os.getpid()}"
        self._lock = -1
        self._file = -1
        self._file_name = ""

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

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset` of the file `name`, in any order; a range may be written again."""
        with self._translated():
            self._select(name)
            view = memoryview(data)
            while view:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written

    def commit(self) -> None:
        """Bring everything to the disk, then make it appear at `out`."""
        with self._translated():
            self._select("")
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
        if self._file >= 0:
            with suppress(OSError):  # a failed write may be reported here; nothing of it is kept
                os.close(self._file)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = self._file = -1

    def _select(self, name: str) -> None:
        """Make `name` the open file, after the previous one has reached the disk. "" only closes."""
        if name == self._file_name:
            return
        if self._file >= 0:
            file, self._file, self._file_name = self._file, -1, ""
            try:
                os.fsync(file)
            finally:
                os.close(file)
        if name:
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._file_name = name

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
