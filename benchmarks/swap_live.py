"""Live swaps of a random model, timed from the weights to the first token."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.children import BenchmarkError
from benchmarks.models import Shape, weight_files, write_model
from benchmarks.storage import make_cold, make_warm
from benchmarks.swap_ways import FIRST_TOKEN, MAX_MODEL_LEN, PROBES
from mergemix.checkpoints.family import Family, open_family
from mergemix.demo.tokenizer import build_tokenizer
from mergemix.mixture import LayerGroup, Mixture
from mergemix.search import layer_groups
from mergemix.serve import open_engine
from mergemix.serve.engine import Engine, EngineSpec

COLD, CACHED_FILES = "live swap, experts on disk", "live swap, experts in the page cache"
WARM, ONE_GROUP = "live swap, delta cache", "live swap, delta cache, one of 8 layer groups"
LAYER_GROUPS = 8


@dataclass(frozen=True)
class Timed:
    """One candidate. seconds: to its first token. swap_s, process_s: of a live swap, and the part of it that is vLLM's
    own processing of the new weights. Bytes: what a live swap moved.
    """

    seconds: float
    answers: tuple[float, ...]
    swap_s: float = 0.0
    process_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True)
class Job:
    scratch: Path
    shape: Shape
    family: Family
    mergekit: Path | None
    repeats: int
    device_cache: int
    host_cache: int
    sparse: bool = False

    @property
    def experts(self) -> dict[str, Path]:
        return {expert.name: expert.root for expert in self.family.experts}

    @property
    def files(self) -> list[Path]:
        return weight_files(list(self.experts.values()))

    def mixtures(self, count: int) -> list[Mixture]:
        """Different mixtures that all read every expert."""
        rng = np.random.default_rng(0)
        names = self.family.names
        return [
            Mixture.of(names, dict(zip(names, rng.dirichlet(np.ones(len(names))), strict=True)))
            for _ in range(count)
        ]


def prepare(scratch: Path, shape: Shape, experts: int, *, sparse: bool) -> Family:
    paths = {f"e{k}": str(write_model(scratch / f"e{k}", shape, k, sparse=sparse)) for k in range(experts)}
    for path in paths.values():
        build_tokenizer(MAX_MODEL_LEN).save_pretrained(path)
    return open_family(None, paths)


@contextmanager
def live(job: Job, *, cached: bool) -> Iterator[Engine]:
    """A proven engine. cached: its delta cache holds all experts, as far as the budgets allow."""
    spec = EngineSpec(
        job.family,
        "vllm",
        max_model_len=MAX_MODEL_LEN,
        device_cache=job.device_cache if cached else 0,
        host_cache=job.host_cache if cached else 0,
        log=job.scratch / "engine.log",
    )
    with open_engine(spec, Mixture.uniform(job.family.names)) as engine:
        if not engine.proven:
            raise BenchmarkError("live swaps of this model are not right here, so there is nothing to time")
        yield engine


def timed_swap(engine: Engine, mixture: Mixture) -> Timed:
    begin = time.perf_counter()
    swap = engine.apply(mixture)
    engine.submit([FIRST_TOKEN])
    seconds = time.perf_counter() - begin
    answers = tuple(answer.logprob for answer in engine.loglikelihood(PROBES))
    return Timed(
        seconds, answers, swap.seconds, swap.process_s, sum(swap.bytes_read.values()), swap.bytes_written
    )


def one_group(job: Job, start: Mixture, count: int) -> list[Mixture]:
    """`start`, then the same with other and other weights for the fourth of eight runs of layers."""
    groups = layer_groups(str(min(LAYER_GROUPS, job.shape.layers)), job.family.template.tensors)
    chosen = len(groups) // 2
    plain = tuple(LayerGroup(patterns, start.weights) for patterns in groups)
    changed = [
        (*plain[:chosen], replace(plain[chosen], weights=mixture.weights), *plain[chosen + 1 :])
        for mixture in job.mixtures(count + 1)[1:]  # the first one is where the whole model starts
    ]
    return [Mixture(start.names, start.weights, each) for each in (plain, *changed)]


def measure_live(job: Job) -> dict[str, list[Timed]]:
    """By way. The first swap of each kind, which fills caches and compiles, is not among them."""
    mixtures = job.mixtures(job.repeats)
    found: dict[str, list[Timed]] = {}
    if not job.sparse:
        found |= _without_cache(job, mixtures)
    with live(job, cached=True) as engine:
        engine.apply(Mixture.uniform(job.family.names))
        found[WARM] = [timed_swap(engine, mixture) for mixture in mixtures]
        first, *changed = one_group(job, mixtures[0], job.repeats)
        engine.apply(first)
        found[ONE_GROUP] = [timed_swap(engine, mixture) for mixture in changed]
    return found


def _without_cache(job: Job, mixtures: Sequence[Mixture]) -> dict[str, list[Timed]]:
    found: dict[str, list[Timed]] = {}
    with live(job, cached=False) as engine:
        engine.apply(Mixture.uniform(job.family.names))
        found[COLD] = []
        for mixture in mixtures:
            make_cold(job.files)
            found[COLD].append(timed_swap(engine, mixture))
        make_warm(job.files)
        found[CACHED_FILES] = [timed_swap(engine, mixture) for mixture in mixtures]
    return found
