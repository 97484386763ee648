"""A checkpoint directory, opened: every tensor's place, type and shape, and none of its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file. dtype: the format's own name ("BF16"). offset: bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """name: "base" or the expert's. source: what the user wrote (directory or Hub id). root: the local directory.

    tensors: by name, in file order (shard name, then offset). config: the contents of config.json.
    """

    name: str
    source: str
    root: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
