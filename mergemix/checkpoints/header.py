"""The safetensors header: parsed and proved sound before any tensor byte is read.

A file (github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length N, little endian; N bytes,
a JSON object {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}};
then the tensors' bytes, which the offsets cover without holes, overlaps or a remainder.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergemix.checkpoints.files import FileIdentity, HubFile
from mergemix.checkpoints.strict_json import parse_object, shown
from mergemix.errors import CheckpointError

if TYPE_CHECKING:
    from mergemix.checkpoints.ranges import RangeFile

LENGTH_BYTES = 8
# The first request to the Hub: the whole header of a file of some 2,000 tensors.
FIRST_BYTES = 1 << 18
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 250_000  # in one file; the largest mixture-of-experts checkpoints hold about 100,000 in all
MAX_BYTES = 2**63 - 1  # file offsets are signed 64-bit integers

# Bits, since the format has types below one byte.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file.

    dtype: the format's own name ("BF16"). offset: bytes from the file's start. file: what `path` was when its
    header was read, or the file on the Hub that `path` names in messages.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    file: FileIdentity | HubFile


def read_header(path: Path) -> list[TensorInfo]:
    """Every tensor of the safetensors file `path`, in the order of their bytes.

    Raises CheckpointError naming the file, the tensor, the rule and the value that broke it.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file")
        with path.open("rb") as opened:
            file = FileIdentity.of(opened.fileno())
            raw = _read_raw(path, file.nbytes, opened.read)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return _tensors(path, file, raw)


def read_hub_header(file: HubFile) -> list[TensorInfo]:
    """As `read_header`, of a file on the Hub: its first bytes are asked for, in one request where they suffice."""
    from mergemix.checkpoints.hub_ranges import open_hub_file

    with closing(open_hub_file(file)) as remote:
        raw = _read_raw(file.path, file.nbytes, io.BufferedReader(_Sequential(remote), FIRST_BYTES).read)
    return _tensors(file.path, file, raw)


class _Sequential(io.RawIOBase):
    """A RangeFile from its first byte on."""

    def __init__(self, file: RangeFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.read_into(memoryview(buffer), self._position)
        self._position += count
        return count


def _read_raw(path: Path, file_bytes: int, read: Callable[[int], bytes]) -> bytes:
    """The header's JSON bytes. read: the next so many bytes of the file `path`, fewer at its end."""
    prefix = read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: it has {file_bytes} bytes, and the header's "
            f"length alone takes {LENGTH_BYTES}; it may be truncated, copy it again"
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is no safetensors file: a header has at most {MAX_HEADER_BYTES} bytes, "
            f"but its first 8 bytes promise {length}"
        )
    if length > file_bytes - LENGTH_BYTES:
        raise CheckpointError(
            f"{path} is truncated: it promises a header of {length} bytes, but has only "
            f"{file_bytes} bytes in all; copy it again"
        )
    raw = read(length)
    if len(raw) < length:
        raise CheckpointError(
            f"{path} was truncated while it was read: {len(raw)} of {length} bytes of its header"
        )
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{path} is no safetensors file: the header must begin with '{{', but begins with "
            f"{shown(raw[:8])}"
        )
    return raw


def _tensors(path: Path, file: FileIdentity | HubFile, raw: bytes) -> list[TensorInfo]:
    """The tensors that the header `raw` of `path` describes, in the order of their bytes."""
    header = parse_object(raw, f"the header of {path}")
    _check_metadata(path, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} holds {len(header)} tensors; at most {MAX_TENSORS} are accepted in one file"
        )
    data_start = LENGTH_BYTES + len(raw)
    tensors = [_tensor(path, file, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(path, tensors, data_start, file.nbytes)
    return tensors


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"the header of {path}: __metadata__ must be an object, but is {shown(metadata)}"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"the header of {path}: __metadata__ must hold strings only, "
                f"but {shown(key)} is {shown(value)}"
            )


def _tensor(path: Path, file: FileIdentity | HubFile, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of the header, checked on its own: keys, dtype, shape, offsets, bytes = dtype x shape."""

    def fail(rule: str, value: object) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {shown(name)}: {rule}, but got {shown(value)}")

    if not _is_unicode(name):
        raise fail("its name must be valid Unicode", name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("its entry must hold exactly dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"its dtype must be one of {', '.join(DTYPE_BITS)}", dtype)
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise fail("its shape must be a list of integers from 0 to 2^63-1", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise fail("its data_offsets must be two integers from 0 to 2^63-1", offsets)
    begin, end = offsets
    if begin > end:
        raise fail("its data_offsets must not end before they begin", offsets)
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > MAX_BYTES:
            raise fail("its size overflows", f"{dtype} x {shape}")
    if bits % 8 or bits // 8 != end - begin:
        raise fail(f"{dtype} x {shown(shape)} takes {bits / 8:g} bytes, and data_offsets must span as many",
                   f"{offsets} ({end - begin} bytes)")  # fmt: skip
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin, file)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_BYTES  # not isinstance: True is no size


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_cover(path: Path, tensors: list[TensorInfo], data_start: int, file_bytes: int) -> None:
    """The tensors, sorted by offset, must cover the data part of the file to its last byte."""
    expected, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != expected:
            fault = "overlaps" if tensor.offset < expected else "leaves a hole after"
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)} {fault} {previous}: it must begin at "
                f"data offset {expected - data_start}, but begins at {tensor.offset - data_start}"
            )
        expected, previous = tensor.offset + tensor.nbytes, f"tensor {shown(tensor.name)}"
    if expected > file_bytes:
        raise CheckpointError(
            f"{path} is truncated: its header describes {expected} bytes, but it has {file_bytes}; "
            "copy or download it again"
        )
    if expected < file_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes - expected} bytes after its last tensor: its header describes "
            f"{expected} bytes, but it has {file_bytes}"
        )
