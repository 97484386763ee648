"""Reads views of checkpoint tensors from their files: any strides, bounded buffers.

What is in the page cache anyway can be used there, through a mapping whose pages are let go again: measured on a
warm page cache that costs 1.1 times as much as keeping them mapped, and a copy by pread twice as much.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import OpenFiles, open_range
from mergemix.errors import CheckpointError
from mergemix.merge.resources import free_memory
from mergemix.serve.copies import memory_order
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix_kernels import cpu
from mergemix_kernels.dispatch import pieces

# What is read at a time to pick a strided view out of; more is cut.
SPAN_BYTES = 4 << 20
# Rows from here on are read one by one, without what lies between them.
ROW_BYTES = 32 << 10
HEAD_BYTES = 2048  # tensors that differ mostly do so at once
COMPARED_BYTES = 1 << 20
# Of the page cache, mapped at a time.
MAPPED_BYTES = 256 << 20
# Families that take more of the free memory than this are not left in the page cache.
CACHED_SHARE = 0.5

_advise = ctypes.CDLL(None).madvise  # it releases the GIL
_advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

# By element size: a type of that size which numpy has too.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ViewReader:
    """The files of a family's operands, open for many reads by several threads.

    family_bytes: of all of them, which decides whether they may stay in the system's page cache.
    """

    def __init__(self, family_bytes: int) -> None:
        self._files = OpenFiles()
        self._buffers = threading.local()
        free_bytes = free_memory()
        self._forget = free_bytes is not None and family_bytes > CACHED_SHARE * free_bytes
        self._mapped: dict[Path, _MappedFile] = {}
        self._released = 0
        self._lock = threading.Lock()

    def read(self, tensor: TensorInfo, view: torch.Tensor, into: torch.Tensor) -> None:
        """Fill `into`, of the host and of any strides, with the elements of `tensor` that `view` (see LazyMerge) names.

        A tensor that is stored in another dtype than the view's is rounded to it.
        Reads each byte between the first and the last of them about once, except for gaps between long rows.
        Raises CheckpointError when the file cannot be read, or is not the one that was opened first.
        """
        size = view.element_size()
        if view.numel() == 0:
            return
        if (stored := TORCH_DTYPES[tensor.dtype]) != view.dtype:
            unrounded = torch.empty(view.shape, dtype=stored, device="cpu")
            self.read(tensor, _retyped(view, stored), unrounded)
            into.copy_(unrounded)
            return
        if not view.is_contiguous():
            order = memory_order(view)
            view, into = view.permute(order), into.permute(order)
        if view.is_contiguous():
            array = as_array(into)
            packed = array if into.is_contiguous() else self._buffer(into.numel() * size).view(array.dtype)
            self.read_bytes(tensor, int(view.storage_offset()) * size, packed.reshape(-1).view(np.uint8))
            if packed is not array:
                np.copyto(array, packed.reshape(array.shape))
            return
        span = size * (1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)))
        row = view[0]
        long_rows = row.is_contiguous() and row.numel() * size >= ROW_BYTES
        if long_rows or span > SPAN_BYTES:
            for part, target in pieces([view, into], row.numel() if long_rows else (view.numel() + 1) // 2):
                self.read(tensor, part, target)
            return
        array = as_array(into)
        data = self._buffer(span)
        self.read_bytes(tensor, int(view.storage_offset()) * size, data)
        strides = [stride * size for stride in view.stride()]
        elements = np.lib.stride_tricks.as_strided(data.view(array.dtype), tuple(view.shape), strides)
        np.copyto(array, elements)

    def read_bytes(self, tensor: TensorInfo, begin: int, into: np.ndarray) -> None:
        """Fill `into` (uint8, contiguous) with what is stored from byte `begin` of the tensor on. Raises as `read`."""
        self._files.read_into(tensor, begin, into.data, last=self._forget)

    def borrow(self, tensor: TensorInfo, view: torch.Tensor) -> torch.Tensor | None:
        """The elements where the page cache has them, flat and never to be written; to be given back with `release`.

        None where they must be read instead: gathered, rounded, moved to an aligned address, or kept out of the page
        cache.
        """
        if self._forget or not view.is_contiguous() or tensor.offset % view.element_size():
            return None
        if TORCH_DTYPES[tensor.dtype] != view.dtype:
            return None
        with self._lock:
            if tensor.path not in self._mapped:
                self._mapped[tensor.path] = _MappedFile(tensor)
        begin = tensor.offset + int(view.storage_offset()) * view.element_size()
        return self._mapped[tensor.path].bytes(begin, view.numel() * view.element_size()).view(view.dtype)

    def release(self, nbytes: int) -> None:
        """So many borrowed bytes are not used any more. Now and then the pages of all are let go: to do it each time
        would interrupt all cores each time. What another thread still uses is mapped again when it looks at it.
        """
        with self._lock:
            self._released += nbytes
            if self._released < MAPPED_BYTES:
                return
        self.let_go()

    def let_go(self) -> None:
        """Keep no page of the files in this process: nothing is borrowed, or who does it looks at the pages anew."""
        with self._lock:
            self._released = 0
        for file in list(self._mapped.values()):
            file.let_go()

    def equality_classes(self, tensors: Sequence[TensorInfo]) -> tuple[int, ...]:
        """One number per tensor (equal shapes): the position of the first one with the same bits.

        Those of another dtype than the first one's are rounded to it. Of tensors that differ no more is read than it
        takes to see it.
        """
        groups = [list(range(len(tensors)))]
        begin, size = 0, HEAD_BYTES
        while begin < tensors[0].nbytes and any(len(group) > 1 for group in groups):
            size = min(size, tensors[0].nbytes - begin)
            groups = [part for group in groups for part in self._split([*group], tensors, begin, size)]
            begin, size = begin + size, COMPARED_BYTES
        first = {k: group[0] for group in groups for k in group}
        return tuple(first[k] for k in range(len(tensors)))

    def _split(
        self, group: list[int], tensors: Sequence[TensorInfo], begin: int, nbytes: int
    ) -> list[list[int]]:
        """The tensors of a group, parted by their bytes [begin, begin + nbytes)."""
        if len(group) == 1:
            return [group]
        parts: list[tuple[np.ndarray, list[int]]] = []
        for k in group:
            data = np.empty(nbytes, np.uint8)
            dtype = TORCH_DTYPES[tensors[0].dtype]
            part = torch.empty(begin + nbytes, dtype=torch.uint8, device="meta").view(dtype)[
                begin // dtype.itemsize :
            ]
            self.read(tensors[k], part, torch.from_numpy(data).view(dtype))
            home = next((part for known, part in parts if cpu.bitwise_equal([known, data])), None)
            if home is None:
                parts.append((data, [k]))
            else:
                home.append(k)
        return [part for _, part in parts]

    def check_unchanged(self) -> None:
        """Raise CheckpointError for a file that changed or vanished since it was opened."""
        self._files.check_unchanged()
        for file in self._mapped.values():
            file.check_unchanged()

    def close(self) -> None:
        self._files.close()
        for file in self._mapped.values():
            file.close()
        self._mapped.clear()

    def _buffer(self, nbytes: int) -> np.ndarray:
        """Bytes of this thread's own buffer; the next call gives them again."""
        held: np.ndarray | None = getattr(self._buffers, "held", None)
        if held is None or held.size < nbytes:
            held = self._buffers.held = np.empty(max(nbytes, SPAN_BYTES), np.uint8)
        return held[:nbytes]


class _MappedFile:
    """A file as memory. One that is made shorter while it is read may end the process: nothing can prevent that."""

    def __init__(self, tensor: TensorInfo) -> None:
        self._path = tensor.path
        self._file = open_range(tensor)
        try:
            with tensor.path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {tensor.path}: {error}") from error
        self._file.check_unchanged()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)

    def bytes(self, begin: int, nbytes: int) -> torch.Tensor:
        if self._mapping.size() < begin + nbytes:
            raise CheckpointError(f"{self._path} was truncated while it was read")
        return self._bytes[begin : begin + nbytes]

    def let_go(self) -> None:
        _advise(self._bytes.data_ptr(), self._bytes.numel(), mmap.MADV_DONTNEED)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        """Until nothing refers to its elements any more, the file stays mapped."""
        self._file.close()


def _retyped(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same elements of a tensor of another dtype."""
    end = (
        int(view.storage_offset())
        + 1
        + sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    )
    whole = torch.empty(end, dtype=dtype, device="meta")
    return whole.as_strided(view.shape, view.stride(), view.storage_offset())


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor of the host, without a copy, as integers of its element size."""
    return tensor.detach().view(_BITS[tensor.element_size()]).numpy()
