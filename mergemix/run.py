"""The search loop: propose mixtures, serve each one live, score it, tell the search; then answer honestly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergemix.checkpoints.family import open_family
from mergemix.config import RunConfig
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evals.utility import Utility, make_utility, parse_utility
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Observer, Silent
from mergemix.identity import identify, provenance
from mergemix.mixture import Mixture
from mergemix.report.summary import baseline_mixtures, best_candidate, compare, summarize, write_json
from mergemix.search import open_search
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
    for each in filter(None, (suite, holdout)):
        parse_utility(config.utility, list(each.capabilities))  # refuse now what would be refused at the end
    baselines = baseline_mixtures(family.names, has_base=family.base is not None)
    prior = None if config.prior is None else Mixture.of(family.names, config.prior)
    budget = config.budget - (family.base is not None)  # the base is a candidate that no search proposes
    search = open_search(config.search, family.names, budget=budget, seed=config.seed, prior=prior)
    kind = resolve_kind(config.engine)
    spec = EngineSpec(
        family, kind, config.seed, max_model_len=config.max_model_len, log=config.study / "engine.log"
    )
    uniform = Mixture.uniform(family.names)  # as first load, so that a NaN in any expert is found at once
    identity, info = identify(config, family, suite, search, kind), provenance(config, family)

    with (
        Study.open(config.study, identity, info) as study,
        LocalEvaluator(lambda: open_engine(spec, uniform)) as pool,
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
        best = best_candidate(evidence)
        observer.stage("measuring the noise floor")
        evidence.collect([best.mixture], origin="repeat", repeat=1)
        summary = summarize(evidence, engine=kind, stopped=stopped)
        if holdout is not None:
            observer.stage("scoring the finalists on held-out items")
            finalists = {"best": best.mixture, **baselines}
            summary["holdout"] = _held_out(config, holdout, identity, info, pool, observer, finalists)
    write_json(config.study / "mixture.json", summary)
    return summary


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


def _held_out(
    config: RunConfig,
    suite: Suite,
    identity: Mapping[str, Any],
    info: Mapping[str, Any],
    pool: LocalEvaluator,
    observer: Observer,
    finalists: Mapping[str, Mixture],
) -> dict[str, Any]:
    """Utilities of the finalists on items that the search never saw, from a study of their own.

    gain: best minus each baseline, with its paired interval: an honest one, as nothing was chosen on these items.
    """
    own = {key: value for key, value in identity.items() if not key.startswith("benchmark ")}
    own |= {f"benchmark {benchmark.name}": benchmark.fingerprint() for benchmark in suite.benchmarks}
    with Study.open(config.study / "holdout", own, info) as study:
        evidence = Evidence(study, suite, pool, observer, expected=len(finalists))
        records = evidence.collect(list(finalists.values()), origin="finalist")
        named = dict(zip(finalists, records, strict=True))
        evidence.utility = _utility(config, suite, {n: r for n, r in named.items() if n != "best"})
        return compare(evidence, named)
