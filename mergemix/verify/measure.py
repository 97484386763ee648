"""Scores that a verification needs and a study does not have: of proxies, and of trained checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergemix.checkpoints.adapter import fingerprint
from mergemix.checkpoints.family import Family, is_adapter_source, open_family
from mergemix.config import RunConfig
from mergemix.errors import ConfigError, MergeMixError
from mergemix.evals.suite import Suite
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Observer, Progress
from mergemix.identity import is_measured_by, measured_by, provenance, stored_config
from mergemix.mixture import Mixture
from mergemix.preparation import engine_spec, first_load, load_suites
from mergemix.serve import open_engine, resolve_kind
from mergemix.stored import StoredEvidence
from mergemix.study import VERIFICATION, CandidateRecord, ItemRecord, Study
from mergemix.trained import TrainedRun

# What decides how a candidate is searched for or valued, and not what a checkpoint scores.
NOT_OF_CHECKPOINTS = ("experts", "utility", "normalize", "race", "lora_in_flight")
# Options that say where what was measured is.
PLACES = ("experts", "base", "bench", "include_path")


@dataclass(frozen=True)
class Scored:
    """Mean score by benchmark, and where they are known the scores of items by benchmark and name."""

    means: Mapping[str, float]
    items: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def of(cls, record: CandidateRecord, results: Iterable[ItemRecord]) -> Scored:
        items: dict[str, dict[str, float]] = {}
        for result in results:
            if result.score is not None:
                items.setdefault(result.benchmark, {})[result.item] = result.score
        return cls(record.scores, items)


@dataclass(frozen=True)
class Reopened:
    """A study with all that it takes to measure more of it. identity: as the study has it, with today's contents."""

    config: RunConfig
    family: Family
    suite: Suite
    identity: dict[str, Any]
    info: dict[str, Any]

    @property
    def kind(self) -> Any:
        return self.identity["engine"]


@dataclass(frozen=True)
class TrainedFamily:
    """Trained checkpoints, each an expert named by its line. stored_as: by expert, what its contents are stored by."""

    family: Family
    stored_as: Mapping[str, str]


def reopen(evidence: StoredEvidence, config: RunConfig | None, engine: str | None) -> Reopened:
    """Load the study's experts and benchmarks again.

    config: in place of the stored one. engine: None for the study's own.
    Raises StudyError where the study does not say how it was configured, or is of other contents or engine;
    CheckpointError, BenchmarkError and ConfigError for what is not where it was.
    """
    directory = evidence.directory
    with Study.read(directory) as study:
        stored, info = study.identity, study.info
    given, config = config, config or stored_config(info, directory)
    kind = resolve_kind(engine or stored["engine"])
    try:
        family = open_family(config.base, config.experts)
        suite, _ = load_suites(config, family, kind)
    except MergeMixError as error:
        if given is not None:
            raise
        raise type(error)(
            f"the study cannot measure more: {error}. If what it was run with has moved, give --config study.yaml that "
            "says where it is now"
        ) from error
    kept = {key: value for key, value in stored.items() if not is_measured_by(key)}
    identity = {**kept, **measured_by(config, family, suite, kind)}
    config = replace(config, study=directory, engine=kind)
    current = provenance(config, family, suite)
    if given is not None and "config" in info:
        # It was given for where things are now: how the study was searched stays.
        places = {key: current["config"][key] for key in PLACES}
        current |= {"budget": info["budget"], "config": {**info["config"], **places}}
    return Reopened(config, family, suite, identity, current)


def stored_proxies(study: Study, mixtures: Sequence[Mixture]) -> dict[Mixture, Scored]:
    """Scores of those that have answered everything, be it beside a result that the search stopped early."""
    found = {}
    for mixture in mixtures:
        records = [study.find(mixture, repeat) for repeat in (0, 1)]
        if done := [record for record in records if record is not None and record.done]:
            found[mixture] = Scored.of(done[0], study.results(done[0].id))
    return found


def measure_proxies(
    study: Study, opened: Reopened, evidence: StoredEvidence, mixtures: Sequence[Mixture], observer: Observer
) -> dict[Mixture, Scored | str]:
    """Evaluate mixtures that the study has no complete scores of, into the study; why not where one failed.

    One that the search stopped early keeps that result, and is evaluated in full beside it.
    """
    stopped = {each.mixture for each in evidence.candidates if not each.record.done}
    expected = sum(record.repeat == 0 for record in study.candidates()) + len(set(mixtures) - stopped)
    spec = engine_spec(opened.config, opened.family, opened.kind)
    found: dict[Mixture, Scored | str] = {}
    with LocalEvaluator(lambda: open_engine(spec, first_load(opened.family))) as pool:
        collected = Evidence(study, opened.suite, pool, observer, expected=expected)
        collected.value(evidence.valuation)
        for repeat in (0, 1):
            wanted = [mixture for mixture in mixtures if (mixture in stopped) == bool(repeat)]
            for record in collected.collect(wanted, VERIFICATION, repeat=repeat):
                results = study.results(record.id)
                found[record.mixture] = Scored.of(record, results) if record.done else str(record.reason)
    return found


def measure_checkpoints(
    opened: Reopened,
    runs: Sequence[TrainedRun],
    trained: TrainedFamily,
    evidence: StoredEvidence,
    observer: Observer,
) -> tuple[dict[int, Scored | str], int]:
    """By line the scores of trained checkpoints on the study's items, or why one failed; how many are new.

    trained: of the runs, as `open_checkpoints` gives it.
    They are kept in a study of their own, STUDY/trained, by their contents: none is scored twice, also after a kill,
    and others may follow later.
    """
    directory = opened.config.study / "trained"
    family, names = trained.family, trained.stored_as
    identity = {
        key: value
        for key, value in opened.identity.items()
        if key.startswith("benchmark ") or key in ("engine", "max_model_len", "tensor_parallel")
    }
    with Study.open(directory, identity, _trained_info(opened.info, family)) as study:
        missing = [each for each in family.experts if study.find(_alone(names[each.name])) is None]
        if missing:
            part = replace(family, experts=tuple(missing))
            _score(study, opened, part, names, directory, evidence, observer)
        found: dict[int, Scored | str] = {}
        for run, expert in zip(runs, family.experts, strict=True):
            record = study.find(_alone(names[expert.name]))
            assert record is not None, "every checkpoint has been scored"
            scored = Scored.of(record, study.results(record.id)) if record.done else str(record.reason)
            found[run.line] = scored
    return found, len(missing)


def open_checkpoints(config: RunConfig, runs: Sequence[TrainedRun]) -> TrainedFamily:
    """The checkpoints of the runs; before any cost.

    The base is only there for adapters: references may be of another size than the proxies.
    Raises CheckpointError for one that is not there or does not fit the others, ConfigError for one given twice.
    """
    sources = {f"line {run.line}": run.checkpoint for run in runs if run.checkpoint is not None}
    adapters = any(is_adapter_source(name, source) for name, source in sources.items())
    family = open_family(config.base if adapters else None, sources)
    names: dict[str, str] = {}
    for expert in family.experts:
        contents = f"reference-{fingerprint(expert)[:16]}"
        if adapters and family.base is not None:
            contents += f"-on-{fingerprint(family.base)[:16]}"
        if contents in names.values():
            other = next(name for name, each in names.items() if each == contents)
            raise ConfigError(
                f"each training run is a checkpoint of its own, but {expert.name} ({expert.source}) has the "
                f"contents of {other}: take one out, or give the right path"
            )
        names[expert.name] = contents
    return TrainedFamily(family, names)


def _trained_info(info: Mapping[str, Any], family: Family) -> dict[str, Any]:
    sources = {each.name: {"source": each.source, "commit": each.revision} for each in family.members}
    return {**{key: info[key] for key in ("versions", "suite")}, "checkpoints": sources}


def _alone(name: str) -> Mixture:
    """How a checkpoint is stored: as a mixture of itself, whatever others are scored beside it."""
    return Mixture((name,), (1.0,))


def _score(
    study: Study,
    opened: Reopened,
    family: Family,
    names: Mapping[str, str],
    directory: Path,
    evidence: StoredEvidence,
    observer: Observer,
) -> None:
    """Score all experts of `family` in one live engine, one after the other; each is stored at once."""
    own = replace(opened.config, study=directory, device_cache=0, host_cache=0, lora_in_flight=0)
    spec = engine_spec(own, family, opened.kind)
    stored_as = {Mixture.one_hot(family.names, name): _alone(names[name]) for name in family.names}
    with LocalEvaluator(lambda: open_engine(spec, first_load(family))) as pool:
        for done, evaluation in enumerate(pool.evaluate(list(stored_as), opened.suite), start=1):
            mixture = stored_as[evaluation.mixture]
            utility = None
            if evaluation.failure is not None:
                record = study.record_failure(mixture, origin=VERIFICATION, reason=evaluation.failure)
            else:
                record = study.record(
                    mixture,
                    origin=VERIFICATION,
                    results=evaluation.results,
                    timings=evaluation.timings,
                    proven=evaluation.proven,
                    metrics=opened.suite.report(evaluation.results),
                )
                utility = evidence.valuation.utility(record.scores)
            seconds = sum(evaluation.timings.values())
            observer.candidate(Progress(done, len(stored_as), record, utility, None, seconds))


def open_study(opened: Reopened) -> Study:
    """The study itself, to be continued with the proxies of a verification."""
    return Study.open(opened.config.study, opened.identity, opened.info)
