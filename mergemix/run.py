"""The search loop: propose mixtures, serve each one live, score it, tell the search; then answer honestly."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from mergemix.checkpoints.family import Family, open_family
from mergemix.config import RunConfig
from mergemix.errors import ConfigError
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evals.utility import Utility, make_utility
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Observer, Silent
from mergemix.identity import check_suites, identify, provenance
from mergemix.mixture import Mixture
from mergemix.report.summary import baseline_mixtures, best_candidate, compare, summarize, write_json
from mergemix.search import Search, layer_groups, open_search, start_points
from mergemix.serve import open_engine, resolve_kind
from mergemix.serve.engine import EngineSpec
from mergemix.study import CandidateRecord, Study


def run(config: RunConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Search the mixture of `config.experts` that scores best on `config.bench`; returns the summary.

    Everything is kept in the study directory as it happens. Running the same configuration again asks
    the same proposals and takes every result that is stored from there: it continues where a killed run
    stopped, pays for no candidate twice, and needs no engine when nothing is missing.
    Source: the paper's search over merged proxies, as ask/tell over live swaps.

    Raises MergeMixError for everything that a user can mend. KeyboardInterrupt leaves a resumable study.
    """
    observer = observer or Silent()
    observer.stage("reading checkpoints")
    family = open_family(config.base, config.experts)
    suite = Suite(load_benchmarks(config.bench))
    holdout = Suite(load_benchmarks(config.holdout)) if config.holdout else None
    check_suites(config, suite, holdout)
    baselines = baseline_mixtures(family.names, has_base=family.base is not None)
    search = _open_search(config, family)
    kind = resolve_kind(config.engine)
    spec = _engine_spec(config, family, kind)
    identity, info = identify(config, family, suite, search, kind), provenance(config, family)

    with (
        Study.open(config.study, identity, info) as study,
        _open_holdout(config, holdout, identity, info) as holdout_study,
        LocalEvaluator(lambda: open_engine(spec, _first_load(family))) as pool,
    ):
        evidence = Evidence(study, suite, pool, observer, expected=config.budget)
        if config.normalize == "raw":
            evidence.utility = _utility(config, suite, {})  # known at once, so that progress shows it
        observer.stage("scoring the baselines")
        references = evidence.collect(list(baselines.values()), origin="baseline")
        evidence.utility = _utility(config, suite, dict(zip(baselines, references, strict=True)))
        observer.stage("searching")
        while not (stopped := search.stop()):
            for record in evidence.collect(search.ask(), origin=search.kind):
                search.tell([(record.mixture, evidence.utility_of(record))])
        best = best_candidate(evidence).mixture
        observer.stage("measuring the noise floor")
        evidence.collect([baselines["uniform"], best], origin="repeat", repeat=1)
        summary = summarize(evidence, baselines, engine=kind, stopped=stopped)
        write_json(config.study / "mixture.json", summary)
        if holdout is not None and holdout_study is not None:
            observer.stage("scoring the finalists on held-out items")
            held_out = Evidence(holdout_study, holdout, pool, observer, expected=len(baselines) + 1)
            summary["holdout"] = _score_finalists(config, held_out, {"best": best, **baselines})
            write_json(config.study / "mixture.json", summary)
    return summary


def _open_search(config: RunConfig, family: Family) -> Search:
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


def _engine_spec(config: RunConfig, family: Family, kind: Literal["vllm", "hf"]) -> EngineSpec:
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


def _first_load(family: Family) -> Mixture:
    """A mixture that reads every checkpoint, the base too: a NaN in any of them is then found at once."""
    parts = len(family.names) + (family.base is not None)
    return Mixture(family.names, tuple(1.0 / parts for _ in family.names))


def _utility(config: RunConfig, suite: Suite, references: Mapping[str, CandidateRecord]) -> Utility:
    """The utility of this study; its normalisation reads the scores of the baselines that succeeded."""
    scores = {name: record.scores for name, record in references.items() if record.done}
    return make_utility(
        suite.capabilities,
        config.utility,
        config.normalize,
        uniform=scores.pop("uniform", None),
        base=scores.pop("base", None),
        experts=scores,
    )


def _open_holdout(
    config: RunConfig, holdout: Suite | None, identity: Mapping[str, Any], info: Mapping[str, Any]
) -> AbstractContextManager[Study | None]:
    """The study of the held-out items, in a directory of its own; opened early, so that it fails before any cost."""
    if holdout is None:
        return nullcontext()
    own = {key: value for key, value in identity.items() if not key.startswith("benchmark ")}
    own |= {f"benchmark {benchmark.name}": benchmark.fingerprint() for benchmark in holdout.benchmarks}
    return Study.open(config.study / "holdout", own, info)


def _score_finalists(
    config: RunConfig, evidence: Evidence, finalists: Mapping[str, Mixture]
) -> dict[str, Any]:
    """Utilities of the finalists on items that the search never saw, and how far "best" is ahead of each."""
    records = evidence.collect(list(finalists.values()), origin="finalist")
    named = dict(zip(finalists, records, strict=True))
    evidence.utility = _utility(config, evidence.suite, {n: r for n, r in named.items() if n != "best"})
    return compare(evidence, named)
