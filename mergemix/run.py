"""The search loop: propose mixtures, serve each one live, score it, tell the search; then answer honestly."""

from __future__ import annotations

from typing import Any

from mergemix.checkpoints.family import Family, open_family
from mergemix.config import RunConfig
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence
from mergemix.mixture import Mixture
from mergemix.report.progress import Observer, Silent
from mergemix.report.summary import summarize, write_mixture
from mergemix.search import open_search
from mergemix.serve import open_engine, resolve_kind
from mergemix.serve.engine import EngineSpec
from mergemix.study import Study, study_identity


def run(config: RunConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Search the mixture of `config.experts` that scores best on `config.bench`; returns the summary.

    Everything is kept in the study directory as it happens. A second run of the same configuration
    repeats the same proposals and takes every result that is stored already from there, so that it
    continues where a killed one stopped, and pays for no candidate twice.
    Paper section: search (seed mixtures, merge, evaluate, propose); here with ask/tell over live swaps.

    Raises MergeMixError for everything a user can mend. KeyboardInterrupt leaves a resumable study.
    """
    observer = observer or Silent()
    observer.stage("reading checkpoints")
    family = open_family(config.base, config.experts)
    suite, holdout = Suite(load_benchmarks(config.bench)), _holdout_suite(config)
    kind = resolve_kind(config.engine)
    prior = None if config.prior is None else Mixture.of(family.names, config.prior)
    baselines = _baselines(family)
    search = open_search(config.search, family.names, budget=_search_budget(config), seed=config.seed, prior=prior)

    observer.stage("opening the study")
    identity = study_identity(family, suite, holdout, search, config, kind)
    with (
        Study.open(config.study, identity) as study,
        LocalEvaluator(lambda: open_engine(_engine_spec(config, family, kind), Mixture.uniform(family.names))) as pool,
    ):
        evidence = Evidence(study, suite, pool, observer, budget=config.budget)
        utility = evidence.reference(config, baselines, search.ask())
        while not (stopped := search.stop()):
            for record in evidence.collect(search.ask(), origin=search.kind):
                search.tell([(record.mixture, evidence.utility_of(record))])

        best = evidence.best()
        observer.stage("measuring the noise floor")
        evidence.collect([best.mixture], origin="repeat", repeat=1)
        if holdout is not None:
            observer.stage("scoring the finalists on held-out items")
        summary = summarize(evidence, stopped)
        write_mixture(config.study, summary)
        return summary
