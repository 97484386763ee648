"""What a run needs before its first candidate: benchmarks, the search, what the engine is to be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from mergemix import __version__
from mergemix.checkpoints.family import Family
from mergemix.config import RunConfig
from mergemix.errors import ConfigError, StudyError
from mergemix.evals.benchmark import Context, load_benchmarks
from mergemix.evals.split import split_items
from mergemix.evals.suite import Suite
from mergemix.evals.utility import CapabilityUtility, Utility, make_utility
from mergemix.evals.utility_spec import parse_utility
from mergemix.evidence import Evidence
from mergemix.identity import check_suites
from mergemix.mixture import Mixture
from mergemix.preflight.family import preflight_family
from mergemix.preflight.verdict import VERDICTS, Check
from mergemix.search import Search, layer_groups, load_tree, open_search
from mergemix.search.constraints import Constraints
from mergemix.serve.engine import EngineSpec
from mergemix.study import CandidateRecord, Study, write_json
from mergemix.valuation import Valuation, value_study
from mergemix.warm_start import WarmStart, load_warm_start


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


def make_search(config: RunConfig, family: Family, baselines: Collection[Mixture]) -> Search:
    """The search over what the budget leaves beside baselines that no search proposes: the base, what is not allowed.

    Raises ConfigError when constraints cannot be met, or the budget does not cover what is scored in any case.
    """
    prior = None if config.prior is None else Mixture.of(family.names, config.prior)
    region = constraints_of(config).region(family.names)
    starts = region.start_points(prior)
    spent = len(set(baselines) - set(starts))
    if config.budget < len(starts) + spent:
        raise ConfigError(
            f"the budget must cover the {len(starts) + spent} mixtures that are scored in any case (uniform, each "
            f"single expert, the base and the prior if given, and what is nearest to them inside the constraints), but "
            f"is {config.budget}: give --budget {len(starts) + spent} or more"
        )
    groups = layer_groups(config.layer_groups, family.template.tensors) if config.layer_groups else ()
    return open_search(
        config.search,
        family.names,
        budget=config.budget - spent,
        seed=config.seed,
        prior=prior,
        region=region,
        batch=max(1, config.lora_in_flight),
        groups=groups,
        tree=load_tree(Path(config.hierarchy), family.names) if config.hierarchy else None,
        interval=config.interval,
        surrogate=config.surrogate,
        layout=config.design,
    )


def load_warm_starts(config: RunConfig, family: Family, identity: dict[str, Any]) -> list[WarmStart]:
    """Evidence of earlier studies, in the order given; what it is becomes part of `identity`."""
    found = [
        load_warm_start(Path(each), family.names, identity, config.utility, config.normalize)
        for each in config.warm_start
    ]
    if found:
        identity["warm_start"] = [each.digest() for each in found]
    return found


def constraints_of(config: RunConfig) -> Constraints:
    """Which mixtures are allowed."""
    return Constraints(
        min=config.min,
        max=config.max,
        pin=config.pin,
        groups={name: tuple(members) for name, members in config.groups.items()},
        tokens=config.tokens,
        train_tokens=config.train_tokens,
        max_epochs=config.max_epochs,
        prior=config.prior,
        kl_limit=config.kl_limit,
        kl_penalty=config.kl_penalty,
    )


def check_item_budget(
    config: RunConfig, suite: Suite, baselines: Collection[Mixture], search: Search
) -> None:
    """Raise ConfigError unless the item budget pays for the baselines and one allowed mixture: they are not raced."""
    starts = search.region.start_points(None)
    whole = len(baselines) + (not set(baselines) & set(starts))
    needed = whole * suite.num_items
    if config.item_budget is not None and config.item_budget < needed:
        raise ConfigError(
            f"the item budget must cover the {needed} answers of {whole} mixtures to {suite.num_items} items (the "
            "baselines, and one inside the constraints), but "
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


def early_utility(config: RunConfig, suite: Suite) -> Utility | CapabilityUtility | None:
    """The utility, where it is known before any baseline is: so that progress shows it from the start."""
    spec = parse_utility(config.utility, list(suite.capabilities))
    if config.normalize != "raw" or spec.references:
        return None
    return make_utility(suite.capabilities, spec, "raw", directions=suite.directions)


def valuation_of(
    config: RunConfig, evidence: Evidence, references: Mapping[str, CandidateRecord]
) -> Valuation:
    """What candidates are worth; normalisation, floors and item difficulty read the baselines that succeeded."""
    suite = evidence.suite
    scored = {
        name: (record, evidence.item_scores(record)) for name, record in references.items() if record.done
    }
    if not scored:
        reasons = {record.reason for record in references.values() if record.reason}
        raise StudyError(f"no baseline could be evaluated: {'; '.join(sorted(reasons))}")
    valuation = value_study(suite.capabilities, suite.directions, config.utility, config.normalize, scored)
    if not any(math.isfinite(valuation.utility(record.scores)) for record, _ in scored.values()):
        raise ConfigError(
            f"the utility must have a finite value for a baseline, but {config.utility!r} has none: look at the "
            "range of normalised scores, or take --normalize minmax"
        )
    return valuation


def preflight_once(
    config: RunConfig, family: Family, identity: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Any]:
    """{verdict, checks} of the part of the preflight that needs weights alone: one read of them, once a study.

    The whole of it is kept in preflight.json beside the study, with what it is about. note: told every check that is
    not fine, before anything is searched. Raises CheckpointError when a file is gone or changed, and OutputError.
    """
    about = {
        "version": __version__,
        **{key: value for key, value in identity.items() if key == "base" or key.startswith("expert ")},
    }
    path = config.study / "preflight.json"
    found = _read_preflight(path, about)
    if found is None:
        try:
            found = preflight_family(family)
        except ConfigError as error:  # the memory bound: no reason not to search
            missing = Check("weights", "doubtful", f"not measured: {error}")
            found = {"verdict": missing.verdict, "checks": [missing.as_dict()]}
        write_json(path, {"about": about, **found})
    for check in found["checks"]:
        if check["verdict"] != "fine":
            note(f"Preflight, {check['verdict']}: {check['why']}.")
    return {"verdict": found["verdict"], "checks": found["checks"]}


def _read_preflight(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file says, if it is about this; None too for a file that somebody damaged: it is measured again."""
    try:
        found = json.loads(path.read_text())
        if found["about"] != about or found["verdict"] not in VERDICTS:
            return None
        known: dict[str, Any] = {**found, "checks": [dict(check) for check in found["checks"]]}
        if not all(isinstance(each["why"], str) and each["verdict"] in VERDICTS for each in known["checks"]):
            return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return known


def open_holdout(
    config: RunConfig, holdout: Suite | None, identity: Mapping[str, Any], info: Mapping[str, Any]
) -> AbstractContextManager[Study | None]:
    """The study of the held-out items, in a directory of its own; opened early, so that it fails before any cost."""
    if holdout is None:
        return nullcontext()
    own = {key: value for key, value in identity.items() if not key.startswith("benchmark ")}
    own |= {f"benchmark {benchmark.name}": benchmark.fingerprint() for benchmark in holdout.benchmarks}
    return Study.open(config.study / "holdout", own, info)
