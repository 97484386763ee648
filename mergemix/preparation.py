"""What a run needs before its first candidate: benchmarks, the search, what the engine is to be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from mergemix.checkpoints.family import Family
from mergemix.config import RunConfig
from mergemix.errors import ConfigError
from mergemix.evals.benchmark import Context, load_benchmarks
from mergemix.evals.split import split_items
from mergemix.evals.suite import Suite
from mergemix.evals.utility import Utility, make_utility
from mergemix.identity import check_suites
from mergemix.mixture import Mixture
from mergemix.search import Search, layer_groups, open_search, start_points
from mergemix.serve.engine import EngineSpec
from mergemix.study import CandidateRecord, Study


def load_suites(config: RunConfig, family: Family, kind: Literal["vllm", "hf"]) -> tuple[Suite, Suite | None]:
    """What the search is scored on, and what only its finalists are: held-out benchmarks and a share of the others.

    kind: of the engine, whose limits decide which texts fit.
    Raises BenchmarkError and ConfigError for what would fail later: before any cost.
    """
    context = Context(
        root=family.template.root,
        include_paths=tuple(Path(path) for path in config.include_path),
        allow_code=config.allow_code_execution,
        max_model_len=config.max_model_len,
        seed=config.seed,
        engine=kind,
    )
    seen = load_benchmarks(config.bench, context)
    unseen = load_benchmarks(config.holdout, context) if config.holdout else []
    if config.holdout_share:
        seen, held = split_items(seen, config.holdout_share, config.seed)
        both = {benchmark.name for benchmark in held} & {benchmark.name for benchmark in unseen}
        if both:
            raise ConfigError(
                f"--holdout and --holdout-share must not give the same name twice, but both hold {min(both)!r}: "
                "rename the benchmark in its file"
            )
        unseen = [*unseen, *held]
    suite, holdout = Suite(seen), Suite(unseen) if unseen else None
    check_suites(config, suite, holdout)
    return suite, holdout


def make_search(config: RunConfig, family: Family) -> Search:
    """The search over what the budget leaves beside the base, which no search proposes."""
    prior = None if config.prior is None else Mixture.of(family.names, config.prior)
    spent = int(family.base is not None)
    needed = len(start_points(family.names, prior)) + spent
    if config.budget < needed:
        raise ConfigError(
            f"the budget must cover the {needed} start points (uniform, each single expert, the base and the prior "
            f"if given), but is {config.budget}: give --budget {needed} or more"
        )
    groups = layer_groups(config.layer_groups, family.template.tensors) if config.layer_groups else ()
    return open_search(
        config.search,
        family.names,
        budget=config.budget - spent,
        seed=config.seed,
        prior=prior,
        groups=groups,
    )


def check_item_budget(config: RunConfig, suite: Suite, baselines: int) -> None:
    """Raise ConfigError unless the item budget pays for the baselines, which answer everything."""
    needed = baselines * suite.num_items
    if config.item_budget is not None and config.item_budget < needed:
        raise ConfigError(
            f"the item budget must cover the {needed} answers of {baselines} baselines to {suite.num_items} items, but "
            f"is {config.item_budget}: give --item-budget {needed} or more, or fewer items"
        )


def engine_spec(config: RunConfig, family: Family, kind: Literal["vllm", "hf"]) -> EngineSpec:
    return EngineSpec(
        family,
        kind,
        config.seed,
        max_model_len=config.max_model_len,
        tensor_parallel_size=config.tensor_parallel,
        device_cache=config.device_cache,
        host_cache=config.host_cache,
        verify_swaps=config.verify_swaps,
        lora_in_flight=config.lora_in_flight,
        log=config.study / "engine.log",
    )


def first_load(family: Family) -> Mixture:
    """A mixture that reads every checkpoint, the base too: a NaN in any of them is then found at once."""
    parts = len(family.names) + (family.base is not None)
    return Mixture(family.names, tuple(1.0 / parts for _ in family.names))


def utility_of(
    config: RunConfig, suite: Suite, references: Mapping[str, CandidateRecord], spec: str | None = None
) -> Utility:
    """The utility of this study; its normalisation reads the scores of the baselines that succeeded.

    spec: another one than the study's, such as a capability alone: the mean of its normalised scores.
    """
    scores = {name: record.scores for name, record in references.items() if record.done}
    return make_utility(
        suite.capabilities,
        spec or config.utility,
        config.normalize,
        directions=suite.directions,
        uniform=scores.pop("uniform", None),
        base=scores.pop("base", None),
        experts=scores,
    )


def open_holdout(
    config: RunConfig, holdout: Suite | None, identity: Mapping[str, Any], info: Mapping[str, Any]
) -> AbstractContextManager[Study | None]:
    """The study of the held-out items, in a directory of its own; opened early, so that it fails before any cost."""
    if holdout is None:
        return nullcontext()
    own = {key: value for key, value in identity.items() if not key.startswith("benchmark ")}
    own |= {f"benchmark {benchmark.name}": benchmark.fingerprint() for benchmark in holdout.benchmarks}
    return Study.open(config.study / "holdout", own, info)
