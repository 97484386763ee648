"""The ways of a candidate over the disk: a merge and a new engine, or a merge and vLLM's reload."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peer
from benchmarks.children import BenchmarkError, merge
from benchmarks.storage import make_warm, remove
from benchmarks.swap_live import CACHED_FILES, COLD, WARM, Job, Timed
from benchmarks.swap_ways import MAX_MODEL_LEN
from mergemix.demo.tokenizer import build_tokenizer
from mergemix.mixture import Mixture
from mergemix.serve.vllm_engine import CHILD_ENVIRONMENT

PEER, RELOAD = "mergekit to disk, new engine", "mergemix merge to disk, vLLM's reload"


class PlainEngine:
    """A child with plain vLLM (benchmarks.swap_ways). seconds: from its start to its first token."""

    def __init__(self, directory: Path, log: Path) -> None:
        begin = time.perf_counter()
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.swap_ways", str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**CHILD_ENVIRONMENT, **os.environ},
                text=True,
            )
        self.answers = tuple(self._read(log)["answers"])
        self.seconds = time.perf_counter() - begin

    def reload(self, directory: Path, log: Path) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{directory}\n")
        self._child.stdin.flush()
        return self._read(log)

    def _read(self, log: Path) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise BenchmarkError(f"plain vLLM failed:\n{log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self._child.communicate()


def measure_disk(job: Job) -> dict[str, list[Timed]]:
    """The ways over the disk, page cache warm: a new engine for every candidate, and vLLM's reload."""
    mixtures = job.mixtures(job.repeats)
    found: dict[str, list[Timed]] = {RELOAD: [], PEER: []}
    log = job.scratch / "plain.log"
    make_warm(job.files)
    reloading = PlainEngine(next(iter(job.experts.values())), log)
    out = job.scratch / "merged"
    for mixture in mixtures:
        begin = time.perf_counter()
        merge(job.experts, out, weights=mixture.as_dict())
        merged = time.perf_counter() - begin
        told = reloading.reload(out, log)
        found[RELOAD].append(Timed(merged + told["seconds"], tuple(told["answers"])))
        remove(out)
    reloading.close()
    for mixture in mixtures if job.mergekit else ():
        begin = time.perf_counter()
        assert job.mergekit is not None
        peer.merge(job.mergekit, job.experts, mixture.as_dict(), out, job.scratch / "peer.yaml")
        build_tokenizer(MAX_MODEL_LEN).save_pretrained(out)
        engine = PlainEngine(out, log)
        found[PEER].append(Timed(time.perf_counter() - begin, engine.answers))
        engine.close()
        remove(out)
    return found


def truths(job: Job, mixtures: Sequence[Mixture]) -> list[tuple[float, ...]]:
    """What a plain vLLM, started on each mixture's merge on disk, answers."""
    found = []
    for mixture in mixtures:
        out = job.scratch / "truth"
        merge(job.experts, out, weights=mixture.as_dict())
        engine = PlainEngine(out, job.scratch / "plain.log")
        found.append(engine.answers)
        engine.close()
        remove(out)
    return found


def check_answers(job: Job, found: Mapping[str, Sequence[Timed]]) -> None:
    """Raises BenchmarkError where a live swap answers otherwise than a plain vLLM on the merge on disk."""
    expected = truths(job, job.mixtures(job.repeats)[:2])
    for way in (COLD, CACHED_FILES, WARM):
        for number, answers in enumerate(expected):
            if found[way][number].answers != answers:
                raise BenchmarkError(
                    f"{way}: answers {found[way][number].answers}, but plain vLLM on the merge on disk {answers}"
                )
