"""The operands of a merge as torch tensors over memory-mapped files, and as lazy merged tensors."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mergemix_kernels import cpu

from mergemix.checkpoints.checkpoint import Checkpoint, TensorInfo
from mergemix.checkpoints.family import Family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.mixture import Mixture
from mergemix.serve.lazy import LazyMerge, Origin, Recorder

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def operand_names(family: Family) -> tuple[str, ...]:
    """Who is summed, in the order of summation: the base where there is one, then the experts."""
    return tuple(checkpoint.name for checkpoint in _operands(family))


def coefficients(family: Family, mixture: Mixture) -> list[float]:
    """The fp32 coefficient of every operand, in the order of `operand_names`; 0.0: it is not read.

    Raises ConfigError when the mixture is not over the family's experts, or needs a base that is not there.
    """
    if mixture.names != family.names:
        raise ConfigError(
            f"the mixture is over {', '.join(mixture.names)}, but the experts are {', '.join(family.names)}"
        )
    if family.base is None and mixture.base_weight != 0.0:
        raise ConfigError(
            f"the weights sum to {1 - mixture.base_weight:g}, not 1, so the base has a share of "
            f"{mixture.base_weight:g}: give --base, or weights that sum to 1"
        )
    given = [*([mixture.base_weight] if family.base else []), *mixture.weights]
    with np.errstate(over="ignore", under="ignore"):
        rounded = [float(np.float32(coefficient)) for coefficient in given]
    if not np.isfinite(rounded).all() or not any(rounded):
        raise ConfigError(f"weights must be within the range of fp32, but are {mixture.as_dict()}")
    return rounded


def lazy_weights(family: Family, recorder: Recorder) -> Iterator[tuple[str, LazyMerge]]:
    """(name, lazy tensor) of every tensor of the family, in the template's order, for `model.load_weights`.

    Nothing is read but what it takes to see which operands are bitwise equal.
    Raises CheckpointError when a file cannot be mapped.
    """
    operands = [map_checkpoint(checkpoint) for checkpoint in _operands(family)]
    for name in family.template.tensors:
        tensors = [operand[name] for operand in operands]
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


def _operands(family: Family) -> list[Checkpoint]:
    return [*([family.base] if family.base else []), *family.experts]


def _bits(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _map_tensor(info: TensorInfo, files: dict[str, torch.Tensor]) -> torch.Tensor:
    path = str(info.path)
    if path not in files:
        files[path] = _map_file(path)
    data = files[path][info.offset : info.offset + info.nbytes]
    if data.numel() != info.nbytes:
        raise CheckpointError(f"{path} was truncated after it was opened: tensor {info.name!r} is not whole")
    dtype = TORCH_DTYPES[info.dtype]
    if info.offset % dtype.itemsize:
        data = data.clone()  # torch has no unaligned tensors
    return data.view(dtype).view(info.shape)


def _map_file(path: str) -> torch.Tensor:
    try:
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)

