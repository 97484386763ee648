"""What the scores of a study's candidates are worth: capabilities, utility, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergemix.evals.estimate import estimate, item_variance, reference_scores
from mergemix.evals.stats import ItemScores
from mergemix.evals.utility import CapabilityUtility, Utility, make_utility
from mergemix.evals.utility_spec import Objective, capability_objective, parse_utility
from mergemix.search import Outcome
from mergemix.study import CandidateRecord


@dataclass(frozen=True)
class Valuation:
    """How candidates of one study are valued.

    utility: of a candidate's benchmark means or item scores. capabilities: by name, that of each one alone: the mean of
    its benchmarks' normalised scores. objective: the utility as a function of those. reference: mean score of each
    item over the baselines, which tells hard items from easy ones.
    """

    utility: Utility | CapabilityUtility
    capabilities: Mapping[str, Utility]
    objective: Objective
    reference: ItemScores

    def outcome(self, record: CandidateRecord, items: ItemScores) -> Outcome:
        """A candidate as searches and surrogates are told it: without a utility where it has no finite one.

        items: NaN where it has no score.
        """
        if record.status == "failed":
            return Outcome(None)
        scores = {}
        for name, each in self.capabilities.items():
            found = (
                _stopped(each, record, items, self.reference)
                if record.estimate
                else estimate(each, items, self.reference)
            )
            if found is not None:
                scores[name] = found
        known = {name: scores[name] for name in self.objective.spec.counted if name in scores}
        complete = len(known) == len(self.objective.spec.counted)
        utility: float | None
        if record.estimate is None:
            utility = self.utility(record.scores)
        elif complete:
            at = {name: np.array([value]) for name, (value, _) in known.items()}
            utility = float(self.objective(at)[0])
        else:  # stopped by another utility, which does not ask what this one counts
            utility = None
        stderr = propagate(self.objective, known) if complete else 0.0
        return Outcome.of(Outcome(utility, stderr, scores, partial=record.estimate is not None))


def value_study(
    capabilities: Mapping[str, Sequence[str]],
    directions: Mapping[str, int],
    spec: str,
    normalize: str,
    references: Mapping[str, tuple[CandidateRecord, ItemScores]],
) -> Valuation:
    """The valuation that `--utility spec --normalize normalize` means.

    capabilities: names of the benchmarks of each. directions: 1 or -1 by benchmark. references: the baselines that were
    evaluated, by name (uniform, base, experts), with their item scores. Raises ConfigError where the utility or the
    normalisation need one that is missing.
    """
    scores = {name: record.scores for name, (record, _) in references.items()}
    named = {"uniform": scores.pop("uniform", None), "base": scores.pop("base", None)}

    def make(what: str) -> Utility | CapabilityUtility:
        return make_utility(capabilities, what, normalize, directions=directions, experts=scores, **named)

    alone = {name: make(f'"{name}"') for name in parse_utility(spec, list(capabilities)).capabilities}
    linear = {name: each for name, each in alone.items() if isinstance(each, Utility)}
    levels = {
        name: {capability: each(record.scores) for capability, each in linear.items()}
        for name, (record, _) in references.items()
    }
    objective = capability_objective(spec, list(capabilities), levels)
    reference = reference_scores([items for _, items in references.values()])
    return Valuation(make(spec), linear, objective, reference)


def propagate(objective: Objective, scores: Mapping[str, tuple[float, float]]) -> float:
    """Standard error of the utility from those of capability scores, by the slope of the objective over them.

    Capabilities over which the utility has no finite value count as without an effect.
    """
    count = len(scores)
    up_and_down = np.concatenate([np.eye(count), -np.eye(count)])  # one capability a row, by its error
    at = {
        name: value + error * up_and_down[:, column]
        for column, (name, (value, error)) in enumerate(scores.items())
    }
    up, down = np.split(objective(at), 2)
    known = np.isfinite(up) & np.isfinite(down)
    return float(np.linalg.norm(up[known] - down[known]) / 2)


def _stopped(
    each: Utility, record: CandidateRecord, items: ItemScores, reference: ItemScores
) -> tuple[float, float] | None:
    """(score, standard error) of a capability of a candidate that was stopped early; None where it is not known.

    The error is of the estimate for all items, and of all items as a sample, as a candidate has it that was asked all.
    """
    assert record.estimate is not None, "a stopped candidate has an estimate"
    found = record.estimate.benchmarks
    if any(name not in found for name in each.weights):
        return None
    value, variance = each.offset, 0.0
    for name, weight in each.weights.items():
        mean, error = found[name]
        value += weight * mean
        variance += weight**2 * (error**2 + item_variance(items[name], reference[name]) / len(items[name]))
    return value, math.sqrt(variance)
