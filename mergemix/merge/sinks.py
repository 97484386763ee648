"""Where merged tensors go: a safetensors directory, or the live parameters of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.files import INDEX_NAME
from mergemix.checkpoints.writer import DirectoryWriter, index_json, shard_layout, side_files
from mergemix.errors import FamilyError, OutputError
from mergemix.merge.plan import MergePlan, TensorTask

COPY_BYTES = 1 << 20


class Sink(Protocol):
    """Takes a merge chunk by chunk. A range of a tensor may come twice; the last time counts."""

    def target(self, task: TensorTask, begin: int, nbytes: int) -> np.ndarray | None:
        """uint8 memory (nbytes,) where bytes [begin, begin + nbytes) of the tensor belong, or None."""

    def write(self, task: TensorTask, begin: int, data: np.ndarray) -> None:
        """Take the bytes from `begin` on; data (uint8) is reused afterwards. Not called after a target."""


class SafetensorsSink:
    """A complete Hugging Face directory at `out`: the template's layout, configuration and tokenizer.

    A context manager: `out` appears whole after a clean exit, and not at all after an exception.
    Raises OutputError as DirectoryWriter does.
    """

    def __init__(self, out: Path, plan: MergePlan, template: Checkpoint) -> None:
        self._shards = shard_layout(template)
        self._places = {
            name: (shard.file, offset) for shard in self._shards for name, offset in shard.offsets.items()
        }
        self._tensor_bytes = plan.bytes_written
        self._template_root = template.root
        self._writer = DirectoryWriter(out)

    def __enter__(self) -> SafetensorsSink:
        try:
            side_bytes = sum(path.stat().st_size for path in side_files(self._template_root))
            self._writer.open(side_bytes + sum(shard.nbytes for shard in self._shards))
        except BaseException:
            self._writer.discard()
            raise
        return self

    def target(self, task: TensorTask, begin: int, nbytes: int) -> None:
        return None

    def write(self, task: TensorTask, begin: int, data: np.ndarray) -> None:
        file, offset = self._places[task.name]
        self._writer.write(file, offset + begin, data.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                self._writer.commit()
        finally:
            self._writer.discard()

    def _finish(self) -> None:
        """What makes the directory a checkpoint comes last: headers, configuration and tokenizer, index."""
        for shard in self._shards:
            self._writer.write(shard.file, 0, shard.header)
        for path in side_files(self._template_root):
            self._copy(path)
        if len(self._shards) > 1:
            self._writer.write(INDEX_NAME, 0, index_json(self._shards, self._tensor_bytes))

    def _copy(self, path: Path) -> None:
        """Copy a side file of the template."""
        name, offset = str(path.relative_to(self._template_root)), 0
        self._writer.write(name, 0, b"")  # an empty file is a file too
        try:
            with path.open("rb") as file:
                while chunk := file.read(COPY_BYTES):
                    self._writer.write(name, offset, chunk)
                    offset += len(chunk)
        except OSError as error:
            raise OutputError(f"cannot copy {path}: {error.strerror}; nothing was left behind") from error


class ParameterSink:
    """Live parameters, written in place. parameters: each tensor's memory, flat, contiguous, as uint8.

    Raises FamilyError for a tensor that has no parameter, or one of another size.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray]) -> None:
        self._parameters = parameters

    def target(self, task: TensorTask, begin: int, nbytes: int) -> np.ndarray:
        parameter = self._parameters.get(task.name)
        if parameter is None:
            raise FamilyError(f"tensor {task.name!r} of the checkpoints has no live parameter")
        if parameter.dtype != np.uint8 or parameter.shape != (task.nbytes,):
            raise FamilyError(
                f"tensor {task.name!r} has {task.nbytes} bytes in the checkpoints, but its live parameter is "
                f"{parameter.dtype} {parameter.shape}"
            )
        return parameter[begin : begin + nbytes]

    def write(self, task: TensorTask, begin: int, data: np.ndarray) -> None:
        raise AssertionError("every chunk has a target")
