"""One job for everybody: K checkpoints in files, merged into a new directory, warm or cold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peer
from benchmarks.children import ChildRun, merge
from benchmarks.models import weight_files
from benchmarks.storage import remove


@dataclass(frozen=True)
class Job:
    """What is merged: the same files by everybody. mergekit: its command, None where it is absent."""

    scratch: Path
    experts: Mapping[str, Path]
    weights: Mapping[str, float]
    memory: str
    mergekit: Path | None

    @property
    def files(self) -> list[Path]:
        return weight_files(list(self.experts.values()))

    @property
    def read_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def written_bytes(self) -> int:
        return self.read_bytes // len(self.experts)

    def ours(self, out: Path, weights: Mapping[str, float] | None = None) -> ChildRun:
        return merge(self.experts, out, weights=weights or self.weights, memory=self.memory)

    def ours_many(self, out: Path, mixtures: Path) -> ChildRun:
        return merge(self.experts, out, mixtures=mixtures, memory=self.memory)

    def peers(self, out: Path) -> ChildRun:
        assert self.mergekit is not None
        return peer.merge(self.mergekit, self.experts, self.weights, out, self.scratch / "mergekit.yml")

    def measured(
        self, prepare: Callable[[Sequence[Path]], None], run: Callable[[Path], ChildRun]
    ) -> ChildRun:
        """One run, after its inputs were made warm or cold; its result is removed."""
        prepare(self.files)
        out = self.scratch / "out"
        finished = run(out)
        remove(out)
        return finished
