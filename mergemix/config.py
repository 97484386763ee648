"""What a study is asked to do: the options of `mergemix run`, from the command line or a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mergemix.errors import ConfigError
from mergemix.units import parse_size

SEARCHES = ("cma", "bo", "surrogate", "random", "grid")
DESIGNS = ("maximin", "d-optimal", "dirichlet", "lattice", "vertices")
SURROGATES = ("auto", "lightgbm", "trees", "gp", "loglinear", "scheffe")
ENGINES = ("auto", "vllm", "hf")
TEXTS = (
    "base", "study", "search", "surrogate", "engine", "utility", "normalize", "layer_groups", "verify_swaps",
    "hierarchy", "design",
)  # fmt: skip
WHOLE_NUMBERS = (
    "budget", "seed", "max_model_len", "tensor_parallel", "device_cache", "host_cache", "lora_in_flight",
    "item_budget",
)  # fmt: skip
NUMBERS = ("holdout_share", "train_tokens", "max_epochs", "kl_limit", "kl_penalty", "interval")
SHARES = ("prior", "min", "max", "pin", "tokens")
SWITCHES = ("race", "allow_code_execution")
WEIGHTS_FILES = (".yaml", ".yml", ".json")
RESERVED = ("base", "uniform", "best")
NORMALIZATIONS = ("raw", "base", "minmax", "zscore")
VERIFICATIONS = ("first", "every", "never")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One study. Raises ConfigError when values cannot go together."""

    experts: Mapping[str, str]
    """Expert name -> local directory or Hub id; at least two."""
    bench: tuple[str, ...]
    """Benchmark YAML files, or directories of them, that the search optimises."""
    study: Path
    """Directory that holds everything the study produces."""
    base: str | None = None
    """The shared base: scored as a baseline when given."""
    holdout: tuple[str, ...] = ()
    """Benchmarks that the search never sees; baselines and the best mixture are scored on them at the end."""
    holdout_share: float = 0.0
    """Share of each benchmark's items that the search does not see either; finalists are scored on them too."""
    include_path: tuple[str, ...] = ()
    """Directories with task files for lm-evaluation-harness."""
    allow_code_execution: bool = False
    """Let benchmarks run what models write, in a sandbox."""
    search: str = "bo"
    surrogate: str = "auto"
    """The model that `surrogate` searches with."""
    design: str = "maximin"
    """What `surrogate` measures before it models."""
    budget: int = 40
    """Candidates to evaluate, baselines included; the repeat that measures noise comes on top."""
    item_budget: int | None = None
    """Answers to items that the search may cost, baselines included; no limit when not given."""
    race: bool = True
    """Stop candidates that are clearly worse than the best so far before they have answered all items."""
    seed: int = 0
    engine: str = "auto"
    utility: str = "macro"
    normalize: str = "raw"
    prior: Mapping[str, float] | None = None
    """A mixture that the user believes in: becomes a start point."""
    min: Mapping[str, float] = field(default_factory=dict)
    """Smallest share of a domain, or of a group together."""
    max: Mapping[str, float] = field(default_factory=dict)
    pin: Mapping[str, float] = field(default_factory=dict)
    """Exact shares."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name -> domains whose shares are bounded together."""
    tokens: Mapping[str, float] = field(default_factory=dict)
    """Tokens that there are of a domain: with train_tokens and max_epochs a cap on its share."""
    train_tokens: float | None = None
    """Tokens that will be trained on."""
    max_epochs: float = 4.0
    """How often a domain's tokens may be repeated."""
    kl_limit: float | None = None
    """Largest Kullback-Leibler divergence from the prior, in nats."""
    kl_penalty: float = 0.0
    """What a nat of divergence from the prior takes off the utility."""
    warm_start: tuple[str, ...] = ()
    """Studies whose evidence the search begins with."""
    hierarchy: str | None = None
    """YAML file of a tree of domains: searched level by level."""
    interval: float | None = None
    """A search with a model (bo, surrogate) stops when the predicted optimum's utility is known within this (90%)."""
    max_model_len: int | None = None
    """Tokens of prompt plus answer that the engine is set up for; the model's own limit when not given."""
    layer_groups: str | None = None
    """A number of runs of layers, or NAME=PATTERN,...: half of the budget then goes to weights group by group."""
    tensor_parallel: int = 1
    """Ranks that the vllm engine divides the model among."""
    device_cache: int = 0
    """Bytes of each engine's device memory that keep experts' weights between swaps, over all its ranks."""
    host_cache: int = 0
    """Bytes of shared host memory that do so, after the device's."""
    verify_swaps: str = "first"
    """What is compared with the reference: all of the swaps of the self-test at start and a sample of each later one
    (first), all of every swap (every), or nothing (never)."""
    lora_in_flight: int = 0
    """Mixtures of LoRA adapters that the vllm engine answers at once; 0 folds adapters into the weights."""

    def __post_init__(self) -> None:
        if len(self.experts) < 2:
            named = ", ".join(self.experts) or "none"
            raise ConfigError(
                f"a search needs at least two experts, but got {len(self.experts)} ({named}); "
                "give --experts NAME=PATH once per domain"
            )
        for name in RESERVED:
            if name in self.experts:
                raise ConfigError(f"{name!r} names something else in the results; call the expert otherwise")
        if not self.bench:
            raise ConfigError("a search needs at least one benchmark; give --bench FILE.yaml")
        for key, allowed in (
            ("search", SEARCHES),
            ("surrogate", SURROGATES),
            ("design", DESIGNS),
            ("engine", ENGINES),
            ("normalize", NORMALIZATIONS),
            ("verify_swaps", VERIFICATIONS),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}, but is {getattr(self, key)!r}")
        for key, least in (
            ("max_model_len", 1),
            ("tensor_parallel", 1),
            ("device_cache", 0),
            ("host_cache", 0),
            ("lora_in_flight", 0),
            ("item_budget", 1),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key} must be at least {least}, but is {value}")
        if not 0 <= self.holdout_share <= 0.9:
            raise ConfigError(
                f"holdout_share must be from 0 to 0.9 of the items, but is {self.holdout_share}"
            )
        if self.interval is not None and not self.interval > 0:
            raise ConfigError(f"interval must be a positive difference of utilities, but is {self.interval}")
        if self.interval is not None and self.search not in ("bo", "surrogate"):
            raise ConfigError(
                f"interval ends a search that models the utility, bo or surrogate, but not {self.search}"
            )
        for key, default in (("surrogate", "auto"), ("design", "maximin")):
            if getattr(self, key) != default and self.search != "surrogate":
                raise ConfigError(f"{key} belongs to search: surrogate, but the search is {self.search}")
        if self.hierarchy is not None and self.layer_groups is not None:
            raise ConfigError("hierarchy and layer_groups cannot go together: leave one out")
        if self.normalize in ("base", "minmax") and self.base is None:
            raise ConfigError(f"normalize: {self.normalize} needs the base's scores; give --base PATH")


def config_keys() -> tuple[str, ...]:
    return tuple(field.name for field in fields(RunConfig))


def load_config_file(path: Path) -> dict[str, Any]:
    """Read study.yaml: a mapping whose keys are the fields of RunConfig.

    Relative paths in it are relative to the file. Raises ConfigError on anything that is not understood.
    """
    import yaml  # no other command needs it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of options, but holds {type(content).__name__}")
    check_keys(content, config_keys(), str(path))
    given = dict(content)
    if "experts" in given:
        experts = _mapping_of(given["experts"], str, f"{path}: experts")
        given["experts"] = {name: _beside(path, source) for name, source in experts.items()}
    for key in SHARES:
        if key in given:
            given[key] = _mapping_of(given[key], (int, float), f"{path}: {key}")
    if "groups" in given:
        given["groups"] = _groups_of(given["groups"], f"{path}: groups")
    for key in ("bench", "holdout", "include_path", "warm_start"):
        if key in given:
            values = [given[key]] if isinstance(given[key], str) else given[key]
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ConfigError(f"{path}: {key} must be a path or a list of paths, but is {given[key]!r}")
            given[key] = tuple(_beside(path, value) for value in values)
    for key in ("device_cache", "host_cache"):
        if isinstance(given.get(key), str):
            nbytes = parse_size(given[key])
            if nbytes is None:
                raise ConfigError(
                    f"{path}: {key} must be bytes or a size such as 8GiB, but is {given[key]!r}"
                )
            given[key] = nbytes
    if isinstance(given.get("layer_groups"), int) and not isinstance(given["layer_groups"], bool):
        given["layer_groups"] = str(given["layer_groups"])
    for key in WHOLE_NUMBERS:
        if key in given and (not isinstance(given[key], int) or isinstance(given[key], bool)):
            raise ConfigError(f"{path}: {key} must be a whole number, but is {given[key]!r}")
    for key in SWITCHES:
        if key in given and not isinstance(given[key], bool):
            raise ConfigError(f"{path}: {key} must be true or false, but is {given[key]!r}")
    for key in NUMBERS:
        if key in given and (not isinstance(given[key], int | float) or isinstance(given[key], bool)):
            raise ConfigError(f"{path}: {key} must be a number, but is {given[key]!r}")
    for key in TEXTS:
        if key in given and not (isinstance(given[key], str) and given[key]):
            raise ConfigError(f"{path}: {key} must be text, but is {given[key]!r}")
    for key in ("base", "hierarchy", "utility"):
        if key in given and (key != "utility" or given[key].endswith(WEIGHTS_FILES)):
            given[key] = _beside(path, given[key])
    if "study" in given:
        given["study"] = str(path.parent / given["study"])
    return given


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError on a key that is not known, naming the nearest known one."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _mapping_of(value: Any, kind: type | tuple[type, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(item, kind) and not isinstance(item, bool)
        for name, item in value.items()
    ):
        raise ConfigError(f"{where} must map names to values, but is {value!r}")
    return value


def _groups_of(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    named = _mapping_of(value, list, where)
    for name, members in named.items():
        if not all(isinstance(member, str) for member in members):
            raise ConfigError(f"{where}: {name} must list names of domains, but is {members!r}")
    return {name: tuple(members) for name, members in named.items()}


def _beside(config: Path, source: str) -> str:
    """A path that exists relative to the configuration file; anything else (a Hub id) stays as it is."""
    local = config.parent / source
    return str(local) if local.exists() else source
