"""How a merge is cut: blocks of the result, and what to read and to sum together for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.writer import Shard
from mergemix.merge.plan import MergePlan, TensorTask


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, begin + nbytes) of a tensor, which lie at `at` in their block."""

    task: TensorTask
    begin: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class Block:
    """What is read, summed and written at a time: pieces without holes between them.

    place: file name ("" for parameters) and offset in it, the same for every output.
    """

    pieces: tuple[Piece, ...]
    nbytes: int
    file: str
    offset: int


def tensor_blocks(plan: MergePlan, block_bytes: int) -> Iterator[Block]:
    """Blocks of one piece each, for sinks that keep every tensor apart."""
    for task in plan.tasks:
        for begin in range(0, task.nbytes, block_bytes):
            nbytes = min(block_bytes, task.nbytes - begin)
            yield Block((Piece(task, begin, nbytes, 0),), nbytes, task.name, begin)


def shard_blocks(shard: Shard, tasks: Mapping[str, TensorTask], block_bytes: int) -> Iterator[Block]:
    """The data of one file, cut at multiples of block_bytes from its beginning."""
    begin, pieces, filled = len(shard.header), [], 0
    for name, tensor_offset in shard.offsets.items():
        task, done = tasks[name], 0
        assert tensor_offset == begin + filled, "tensors lie in the file without holes"
        while done < task.nbytes:
            nbytes = min(task.nbytes - done, block_bytes - filled)
            pieces.append(Piece(task, done, nbytes, filled))
            done, filled = done + nbytes, filled + nbytes
            if filled == block_bytes:
                yield Block(tuple(pieces), filled, shard.file, begin)
                begin, pieces, filled = begin + filled, [], 0
    if pieces:
        yield Block(tuple(pieces), filled, shard.file, begin)


@dataclass(frozen=True, slots=True)
class Range:
    """What to read of one member for a block: nbytes in `dtype`, from byte `begin` of `tensor` on, to place `at`."""

    tensor: TensorInfo
    dtype: str
    begin: int
    at: int
    nbytes: int

    def joined(self, other: Range) -> Range | None:
        """Both as one read, where the other follows in the file and in the block."""
        follows = self.tensor.offset + self.begin + self.nbytes == other.tensor.offset + other.begin
        plain = self.tensor.dtype == self.dtype and other.tensor.dtype == other.dtype
        if plain and follows and self.tensor.path == other.tensor.path and self.at + self.nbytes == other.at:
            return replace(self, nbytes=self.nbytes + other.nbytes)
        return None


def ranges(block: Block, member: int) -> Iterator[Range]:
    """What to read of a member for a block: neighbours in one go."""
    current: Range | None = None
    for piece in block.pieces:
        if member not in piece.task.members:
            continue
        tensor = piece.task.operands[piece.task.members.index(member)]
        found = Range(tensor, piece.task.dtype, piece.begin, piece.at, piece.nbytes)
        joined = current and current.joined(found)
        if current is not None and joined is None:
            yield current
        current = joined or found
    if current is not None:
        yield current


def runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Adjacent pieces that one call can sum: of one type, with the same operands and coefficients."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not _alike(run[-1].task, piece.task):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _alike(one: TensorTask, other: TensorTask) -> bool:
    return (
        one.dtype == other.dtype
        and one.coefficients is other.coefficients
        and one.members == other.members
        and not (one.low_rank or other.low_rank)
    )
