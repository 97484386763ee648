"""The evidence of a study as it is read back, to decide again, to compare, or to begin another search with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError, StudyError
from mergemix.evals.stats import ItemScores
from mergemix.evals.utility_spec import parse_utility
from mergemix.mixture import Mixture
from mergemix.search import Outcome
from mergemix.study import CandidateRecord, Study
from mergemix.valuation import Valuation, value_study


@dataclass(frozen=True)
class Candidate:
    """One evaluated mixture: its item scores by benchmark (NaN: none) and what it is worth now."""

    record: CandidateRecord
    items: ItemScores
    outcome: Outcome

    @property
    def mixture(self) -> Mixture:
        return self.record.mixture


@dataclass(frozen=True)
class StoredEvidence:
    """Everything that a study has measured, valued by one utility.

    names: of the experts. identity: of the study. suite: by benchmark {capability higher_is_better metric items}.
    utility, normalize: the specs by which it is valued. candidates: mixtures of data, each once, whole-model ones only;
    neither failed ones nor the base. again: second evaluations, with their item scores.
    """

    directory: Path
    names: tuple[str, ...]
    identity: Mapping[str, Any]
    suite: Mapping[str, Mapping[str, Any]]
    utility: str
    normalize: str
    valuation: Valuation
    candidates: tuple[Candidate, ...]
    again: tuple[tuple[CandidateRecord, ItemScores], ...]

    def outcomes(self) -> list[tuple[Mixture, Outcome]]:
        """What searches and models learn from."""
        return [(each.mixture, each.outcome) for each in self.candidates]

    def repeats(self) -> list[tuple[ItemScores, ItemScores]]:
        """Item scores of both evaluations of every mixture that was evaluated twice."""
        first = {each.mixture: each.items for each in self.candidates if each.record.done}
        return [(first[record.mixture], items) for record, items in self.again if record.mixture in first]


def read_evidence(
    directory: Path, *, utility: str | None = None, normalize: str | None = None
) -> StoredEvidence:
    """Read a study, also while it is running. utility, normalize: other ones than the study's own.

    Raises StudyError when there is no such study, it does not say what its benchmarks are, or it has no
    evaluated mixture yet; ConfigError for a utility that does not fit it.
    """
    with Study.read(directory) as study:
        identity, suite = study.identity, _suite(study)
        records = [record for record in study.candidates() if record.status != "failed"]
        items = _item_scores(study, list(suite), records)
    spec, normalize = utility or identity["utility"], normalize or identity["normalize"]
    valuation = _valuation(suite, spec, normalize, records, items)
    valued = [
        Candidate(record, items[record.id], valuation.outcome(record, items[record.id]))
        for record in records
        if record.repeat == 0 and any(record.mixture.weights) and not record.mixture.groups
    ]
    if not valued:
        raise StudyError(f"a study must have an evaluated mixture, but {directory} has none: run it first")
    # Without a utility are those that were stopped by another utility, which did not ask what this one counts.
    candidates = tuple(each for each in valued if each.outcome.utility is not None)
    if not candidates:
        raise ConfigError(
            f"a utility must have a finite value for a mixture that was measured, but {spec!r} has none in {directory}"
        )
    again = tuple((record, items[record.id]) for record in records if record.repeat and record.done)
    names = tuple(identity["experts"])
    return StoredEvidence(directory, names, identity, suite, spec, normalize, valuation, candidates, again)


def _suite(study: Study) -> dict[str, dict[str, Any]]:
    """By benchmark what the study says of it. Raises StudyError when it was written before it did."""
    suite: dict[str, dict[str, Any]] | None = study.info.get("suite")
    if suite is None:
        raise StudyError(
            f"a study must say which capability its benchmarks measure, but {study.directory} was written by a version "
            "that did not: run the same `mergemix run` command once more, which adds it and evaluates nothing again"
        )
    return suite


def _item_scores(
    study: Study, benchmarks: Sequence[str], records: Sequence[CandidateRecord]
) -> dict[int, dict[str, np.ndarray]]:
    """By candidate and benchmark the scores of all items, in the same order for all; NaN: none."""
    matrices = study.score_matrices([record.id for record in records])
    return {
        record.id: {name: matrices[name][row] for name in benchmarks} for row, record in enumerate(records)
    }


def _valuation(
    suite: Mapping[str, Mapping[str, Any]],
    spec: str,
    normalize: str,
    records: Sequence[CandidateRecord],
    items: Mapping[int, ItemScores],
) -> Valuation:
    capabilities: dict[str, list[str]] = {}
    for name in sorted(suite):
        capabilities.setdefault(suite[name]["capability"], []).append(name)
    directions = {name: 1 if about["higher_is_better"] else -1 for name, about in suite.items()}
    baselines = {
        baseline: (record, items[record.id])
        for record in records
        if record.done and record.repeat == 0 and (baseline := _baseline(record.mixture)) is not None
    }
    parse_utility(spec, list(capabilities), list(baselines))
    if not baselines:
        raise StudyError(
            "a decision needs the baselines of a study, but none of them was evaluated: run it first"
        )
    return value_study(capabilities, directions, spec, normalize, baselines)


def _baseline(mixture: Mixture) -> str | None:
    """uniform, base or the name of an expert; None for other mixtures."""
    if mixture.groups:
        return None
    if mixture == Mixture.uniform(mixture.names):
        return "uniform"
    if not any(mixture.weights):
        return "base"
    name = mixture.names[int(np.argmax(mixture.weights))]
    return name if mixture == Mixture.one_hot(mixture.names, name) else None
