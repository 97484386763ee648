"""The search loop: propose mixtures, serve each one live, score it, tell the search; then answer honestly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergemix.checkpoints.family import open_family
from mergemix.config import RunConfig
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Observer, Silent
from mergemix.identity import identify, provenance
from mergemix.mixture import Mixture
from mergemix.preparation import (
    check_item_budget,
    early_utility,
    engine_spec,
    first_load,
    load_suites,
    load_warm_starts,
    make_search,
    open_holdout,
    preflight_once,
    valuation_of,
)
from mergemix.report.summary import baseline_mixtures, best_candidate, compare, lead, summarize
from mergemix.serve import open_engine, resolve_kind
from mergemix.study import Study, write_json


def run(config: RunConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Search the mixture of `config.experts` that scores best on `config.bench`; returns the summary.

    Everything is kept in the study directory as it happens. Running the same configuration again asks
    the same proposals and takes every result that is stored from there: it continues where a killed run
    stopped, pays for no candidate twice, and needs no engine when nothing is missing.
    Source: the paper's search over merged proxies, as ask/tell over live swaps.

    Raises MergeMixError for everything that a user can mend. KeyboardInterrupt leaves a resumable study.
    """
    observer = observer or Silent()
    observer.stage("reading checkpoints and benchmarks")
    family = open_family(config.base, config.experts)
    kind = resolve_kind(config.engine)
    suite, holdout = load_suites(config, family, kind)
    baselines = baseline_mixtures(family.names, has_base=family.base is not None)
    search = make_search(config, family, baselines.values())
    check_item_budget(config, suite, baselines.values(), search)
    spec = engine_spec(config, family, kind)
    identity, info = identify(config, family, suite, search, kind), provenance(config, family, suite)
    warm_starts = load_warm_starts(config, family, identity)

    with (
        Study.open(config.study, identity, info) as study,
        open_holdout(config, holdout, identity, info) as holdout_study,
        LocalEvaluator(lambda: open_engine(spec, first_load(family))) as pool,
    ):
        evidence = Evidence(
            study, suite, pool, observer, expected=config.budget, item_budget=config.item_budget
        )
        evidence.utility, evidence.region = early_utility(config, suite), search.region
        observer.stage("checking that the experts can be merged")
        checked = preflight_once(config, family, identity, observer.note)
        observer.stage("scoring the baselines")
        references = evidence.collect(list(baselines.values()), origin="baseline")
        evidence.value(valuation_of(config, evidence, dict(zip(baselines, references, strict=True))))
        observer.stage("searching")
        search.objective = evidence.valuation.objective
        search.learn(evidence.outcomes(references), same=True)
        for earlier in warm_starts:
            search.learn(earlier.outcomes(evidence.valuation), same=earlier.same)
        if config.race:
            evidence.race(config.seed)
        while not (stopped := search.stop() or evidence.stop()):
            for record in evidence.collect(search.ask(), origin=search.kind, searched=True):
                search.tell([(record.mixture, evidence.outcome_of(record))])
        best = best_candidate(evidence).mixture
        observer.stage("measuring the noise floor")
        evidence.collect([baselines["uniform"], best], origin="repeat", repeat=1)
        summary = summarize(evidence, baselines, search, engine=kind, seed=config.seed, stopped=stopped)
        summary["preflight"] = checked
        write_json(config.study / "mixture.json", summary)
        if holdout is not None and holdout_study is not None:
            observer.stage("scoring the finalists on held-out items")
            held_out = Evidence(holdout_study, holdout, pool, observer, expected=len(baselines) + 1)
            summary["holdout"] = _score_finalists(config, held_out, {"best": best, **baselines})
            summary["holdout"]["lead"] = lead(summary)
            write_json(config.study / "mixture.json", summary)
    return summary


def _score_finalists(
    config: RunConfig, evidence: Evidence, finalists: Mapping[str, Mixture]
) -> dict[str, Any]:
    """Utilities of the finalists on items that the search never saw, and how far "best" is ahead of each."""
    records = evidence.collect(list(finalists.values()), origin="finalist")
    named = dict(zip(finalists, records, strict=True))
    evidence.value(valuation_of(config, evidence, {n: r for n, r in named.items() if n != "best"}))
    return compare(evidence, named)
