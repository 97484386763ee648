"""Where merged tensors go: safetensors directories, or the live parameters of an engine."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.files import INDEX_NAME
from mergemix.checkpoints.writer import DirectoryWriter, index_json, shard_layout, side_files
from mergemix.errors import FamilyError, OutputError
from mergemix.merge.blocks import Block, Piece, shard_blocks, tensor_blocks
from mergemix.merge.plan import MergePlan

COPY_BYTES = 1 << 20
RECORD_NAME = "mergemix.json"


class Sink(Protocol):
    """Takes the blocks of a merge, in any order and from several threads."""

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """All of the result, in the order in which it is best read; no block is larger than block_bytes."""

    def target(self, block: Block, output: int) -> np.ndarray | None:
        """uint8 memory (block.nbytes,) where the block of that output belongs, or None."""

    def write(self, block: Block, output: int, data: np.ndarray) -> None:
        """Take a block (uint8, used again afterwards) where there is no target."""

    def rewrite(self, piece: Piece, output: int, data: np.ndarray) -> None:
        """Replace bytes that were written before; `piece.at` means nothing. Called when all blocks are done."""


class SafetensorsSink:
    """Complete Hugging Face directories: the template's layout, configuration and tokenizer.

    names: one subdirectory of `out` per output; none for a single output in `out` itself. records: for each output
    what is kept beside it as mergemix.json. A context manager: `out` appears whole after a clean exit, and not at
    all after an exception. Raises OutputError as DirectoryWriter does.
    """

    def __init__(
        self,
        out: Path,
        plan: MergePlan,
        template: Checkpoint,
        *,
        names: Sequence[str] = (".",),
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._tasks = {task.name: task for task in plan.tasks}
        self._shards = shard_layout(template)
        self._places = {
            name: (shard.file, offset) for shard in self._shards for name, offset in shard.offsets.items()
        }
        self._tensor_bytes = plan.bytes_written // plan.num_outputs
        self._template_root = template.root
        self._names = tuple(names)
        self._records = tuple(records)
        self._writer = DirectoryWriter(out)

    def __enter__(self) -> SafetensorsSink:
        try:
            side_bytes = sum(path.stat().st_size for path in side_files(self._template_root))
            shard_bytes = sum(shard.nbytes for shard in self._shards)
            self._writer.open(len(self._names) * (side_bytes + shard_bytes))
            for name, shard in itertools.product(self._names, self._shards):
                body_bytes = shard.nbytes - len(shard.header)
                self._writer.allocate(_join(name, shard.file), shard.nbytes, body_bytes)
        except BaseException:
            self._writer.discard()
            raise
        return self

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        for shard in self._shards:
            yield from shard_blocks(shard, self._tasks, block_bytes)

    def target(self, block: Block, output: int) -> None:
        return None

    def write(self, block: Block, output: int, data: np.ndarray) -> None:
        self._writer.write(_join(self._names[output], block.file), block.offset, data.data)

    def rewrite(self, piece: Piece, output: int, data: np.ndarray) -> None:
        file, offset = self._places[piece.task.name]
        self._writer.write(_join(self._names[output], file), offset + piece.begin, data.data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for output, name in enumerate(self._names):
                    self._finish(name, self._records[output : output + 1])
                self._writer.commit()
        finally:
            self._writer.discard()

    def _finish(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """What makes a directory a checkpoint comes last: headers, configuration and tokenizer, index."""
        for shard in self._shards:
            self._write(_join(name, shard.file), shard.header)
        for path in side_files(self._template_root):
            self._copy(path, name)
        for record in records:
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            self._write(_join(name, RECORD_NAME), text.encode())
        if len(self._shards) > 1:
            self._write(_join(name, INDEX_NAME), index_json(self._shards, self._tensor_bytes))

    def _write(self, name: str, data: bytes) -> None:
        self._writer.write(name, 0, data)
        self._writer.finish(name)

    def _copy(self, path: Path, directory: str) -> None:
        """Copy a side file of the template."""
        name, offset = _join(directory, str(path.relative_to(self._template_root))), 0
        self._writer.write(name, 0, b"")  # an empty file is a file too
        try:
            with path.open("rb") as file:
                while chunk := file.read(COPY_BYTES):
                    self._writer.write(name, offset, chunk)
                    offset += len(chunk)
        except OSError as error:
            raise OutputError(f"cannot copy {path}: {error.strerror}; nothing was left behind") from error
        self._writer.finish(name)


class ParameterSink:
    """Live parameters, written in place. parameters: each tensor's memory, flat, contiguous, as uint8.

    Raises FamilyError for a tensor that has no parameter, or one of another size.
    """

    def __init__(self, plan: MergePlan, parameters: Mapping[str, np.ndarray]) -> None:
        for task in plan.tasks:
            parameter = parameters.get(task.name)
            if parameter is None:
                raise FamilyError(f"tensor {task.name!r} of the checkpoints has no live parameter")
            if parameter.dtype != np.uint8 or parameter.shape != (task.nbytes,):
                raise FamilyError(
                    f"tensor {task.name!r} has {task.nbytes} bytes in the checkpoints, but its live parameter is "
                    f"{parameter.dtype} {parameter.shape}"
                )
        self._plan = plan
        self._parameters = parameters

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        return tensor_blocks(self._plan, block_bytes)

    def target(self, block: Block, output: int) -> np.ndarray:
        (piece,) = block.pieces
        return self._parameters[piece.task.name][piece.begin : piece.begin + piece.nbytes]

    def write(self, block: Block, output: int, data: np.ndarray) -> None:
        raise AssertionError("every block has a target")

    def rewrite(self, piece: Piece, output: int, data: np.ndarray) -> None:
        self._parameters[piece.task.name][piece.begin : piece.begin + piece.nbytes] = data


def _join(directory: str, name: str) -> str:
    return str(PurePosixPath(directory, name))
