"""The operands of a merge as torch tensors over memory-mapped files, and as lazy merged tensors."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator, Sequence

import torch

from mergemix.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergemix.checkpoints.family import Family
from mergemix.checkpoints.files import FileIdentity, check_unchanged
from mergemix.errors import CheckpointError
from mergemix.serve.coefficients import operands
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix.serve.lazy import LazyMerge, Origin, Recorder
from mergemix_kernels import cpu


def lazy_weights(family: Family, recorder: Recorder) -> Iterator[tuple[str, LazyMerge]]:
    """(name, lazy tensor) of every tensor of the family, in the template's order, for `model.load_weights`.

    Nothing is read but what it takes to see which operands are bitwise equal.
    Raises CheckpointError when a file cannot be mapped.
    """
    mapped = [map_checkpoint(checkpoint) for checkpoint in operands(family)]
    for name in family.template.tensors:
        tensors = [operand[name] for operand in mapped]
        yield name, LazyMerge(Origin(name, equality_classes(tensors)), tensors, recorder)


def map_checkpoint(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as a read-only view of its file; writing to one would crash the process."""
    files: dict[str, torch.Tensor] = {}
    return {name: _map_tensor(tensor, files) for name, tensor in checkpoint.tensors.items()}


def equality_classes(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """One number per tensor (equal shapes and dtypes), the same for tensors whose bits are the same."""
    classes: list[int] = []
    for k, tensor in enumerate(tensors):
        bits = _bits(tensor)
        same = (j for j in range(k) if classes[j] == j and cpu.bitwise_equal([_bits(tensors[j]), bits]))
        classes.append(next(same, k))
    return tuple(classes)


def _bits(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _map_tensor(info: TensorInfo, files: dict[str, torch.Tensor]) -> torch.Tensor:
    path = str(info.path)
    if path not in files:
        files[path] = _map_file(info)
    data = files[path][info.offset : info.offset + info.nbytes]
    dtype = TORCH_DTYPES[info.dtype]
    if info.offset % dtype.itemsize:
        data = data.clone()  # torch has no unaligned tensors
    return data.view(dtype).view(info.shape)


def _map_file(info: TensorInfo) -> torch.Tensor:
    try:
        with info.path.open("rb") as file:
            assert isinstance(info.file, FileIdentity), "live serving reads local files"
            check_unchanged(info.path, file.fileno(), info.file)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read {info.path}: {error.strerror}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)
