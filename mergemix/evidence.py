"""What a study knows of its candidates: recalled from the store, or else evaluated and stored."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mergemix.course import Course
from mergemix.evals.suite import Suite
from mergemix.evals.utility import CapabilityUtility, Utility
from mergemix.evaluator import LocalEvaluator
from mergemix.mixture import Mixture
from mergemix.search import Outcome
from mergemix.search.region import Region
from mergemix.serve.engine import Swap
from mergemix.study import CandidateRecord, Study
from mergemix.valuation import Valuation

# Of fewer items a race asks most before it can tell anything.
MIN_RACED_ITEMS = 128


@dataclass(frozen=True)
class Progress:
    """One candidate was evaluated and stored.

    done, total: distinct candidates so far and expected. utility: of a stopped candidate its estimate; None while
    unknown or when it failed.
    best: the highest utility of a mixture so far, stored ones included. seconds: since the one before.
    """

    done: int
    total: int
    record: CandidateRecord
    utility: float | None
    best: float | None
    seconds: float


class Observer(Protocol):
    """What a run tells while it goes on. Calls come from one thread, in order."""

    def stage(self, text: str) -> None:
        """A new stage began."""

    def note(self, text: str) -> None:
        """Something that must be read, whatever comes after it."""

    def candidate(self, progress: Progress) -> None:
        """A candidate was evaluated."""


class Silent:
    """The observer of programs."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def candidate(self, progress: Progress) -> None:
        pass


class Evidence:
    """Candidates of one study on one suite of benchmarks. A candidate that is stored is never paid for again.

    utility: None until the baselines that a normalisation or a floor needs are known. valuation: set when the baselines
    have been scored. region: the mixtures that are allowed; baselines may be others.
    """

    def __init__(
        self,
        study: Study,
        suite: Suite,
        pool: LocalEvaluator,
        observer: Observer,
        *,
        expected: int,
        item_budget: int | None = None,
    ) -> None:
        self.study = study
        self.suite = suite
        self.utility: Utility | CapabilityUtility | None = None
        self.region: Region | None = None
        self._valuation: Valuation | None = None
        self._pool = pool
        self._observer = observer
        self._expected = expected
        self._item_budget = item_budget
        self._spent: dict[
            int, int
        ] = {}  # items that each candidate seen in this run has answered, by its number
        self._race_seed: int | None = None
        # Of those that answered everything: item scores, and what is taken off their utility.
        self._incumbents: dict[int, tuple[dict[str, np.ndarray], float]] = {}
        self._previous_end = time.perf_counter()

    @property
    def valuation(self) -> Valuation:
        assert self._valuation is not None, "the baselines have been scored"
        return self._valuation

    def value(self, valuation: Valuation) -> None:
        """From now on candidates are worth what this says."""
        self._valuation, self.utility = valuation, valuation.utility

    def race(self, seed: int) -> None:
        """From now on stop candidates of the search that are clearly worse than the best. seed: of the items' order.

        Only a utility that is linear can be raced: under another one all candidates answer everything.
        """
        self._race_seed = seed

    def collect(
        self, mixtures: Sequence[Mixture], origin: str, *, repeat: int = 0, searched: bool = False
    ) -> list[CandidateRecord]:
        """Records of `mixtures`, in their order; those not stored are evaluated now.

        repeat: 0, or 1 to evaluate a mixture again for the noise floor. searched: proposed by the search, so that
        they may be stopped early, and are left out once the item budget is used up. One transaction a result: a kill
        loses at most the candidate in flight.
        """
        together = [[m] for m in mixtures] if searched and self._item_budget is not None else [list(mixtures)]
        records = []
        for group in together:
            if searched and self.stop():
                break
            stored = {m: self.study.find(m, repeat=repeat) for m in group}
            for record in stored.values():
                if record is not None:
                    self._see(record)
            if missing := [mixture for mixture, record in stored.items() if record is None]:
                self._evaluate(missing, origin, repeat, searched)
            records += [self._recall(mixture, repeat) for mixture in group]
        return records

    def stop(self) -> dict[str, str]:
        """Why the search must end here, by reason; empty while the item budget is not used up."""
        spent = sum(self._spent.values())
        if self._item_budget is None or spent < self._item_budget:
            return {}
        return {"item_budget": f"the item budget is used up: {spent} of {self._item_budget} items"}

    def _evaluate(self, mixtures: Sequence[Mixture], origin: str, repeat: int, searched: bool) -> None:
        courses = self._course if searched and self._race_seed is not None else None
        for evaluation in self._pool.evaluate(mixtures, self.suite, courses):
            if evaluation.failure is not None:
                record = self.study.record_failure(
                    evaluation.mixture, repeat=repeat, origin=origin, reason=evaluation.failure
                )
                self._tell(record, 0.0)
                self._previous_end = time.perf_counter()
                continue
            # From the end of one candidate to the end of the next: so storing the one before, telling the user
            # and asking the search are counted, not only what happens around the engine.
            end = time.perf_counter()
            seconds = end - self._previous_end - evaluation.start_s
            # Of several answered together, all but the first come at once: what each took is what counts.
            seconds = max(seconds / evaluation.together, sum(evaluation.timings.values()))
            self._previous_end = end
            overhead_s = seconds - evaluation.timings["generate_s"]
            record = self.study.record(
                evaluation.mixture,
                repeat=repeat,
                origin=origin,
                results=evaluation.results,
                timings={**evaluation.timings, "overhead_s": overhead_s},
                swap=_counts(evaluation.swap),
                proven=evaluation.proven,
                metrics=self.suite.report(evaluation.results) if evaluation.stopped is None else None,
                stopped=evaluation.stopped,
            )
            self._see(record)  # the next one of this batch races against it
            self._tell(record, seconds)

    def _course(self, mixture: Mixture) -> Course | None:
        """How a candidate is asked its items; None where nothing is there to race against."""
        assert self._race_seed is not None, "there is a race"
        if not isinstance(self.utility, Utility) or not self._incumbents:
            return None
        counted = sum(self.suite.item_counts[name] for name, weight in self.utility.weights.items() if weight)
        if counted < MIN_RACED_ITEMS:
            return None
        incumbents = list(self._incumbents.values())
        return Course(
            self.suite, self.utility, incumbents, mixture, self._race_seed, cost=self.penalty_of(mixture)
        )

    def _see(self, record: CandidateRecord) -> None:
        """Count a candidate of this run, stored or new: in the same order in every run of the study."""
        self._spent[record.id] = record.items
        mixture = record.mixture
        if record.done and record.repeat == 0 and any(mixture.weights) and self._allows(mixture):
            self._incumbents.setdefault(record.id, (self.item_scores(record), self.penalty_of(mixture)))

    def outcome_of(self, record: CandidateRecord) -> Outcome:
        """What a search is told."""
        return self.valuation.outcome(record, self.item_scores(record))

    def outcomes(self, records: Sequence[CandidateRecord]) -> list[tuple[Mixture, Outcome]]:
        """Mixtures of data among `records`, with what they are worth; the base is none."""
        return [(r.mixture, self.outcome_of(r)) for r in records if any(r.mixture.weights)]

    def score_of(self, record: CandidateRecord) -> float | None:
        """The utility, its estimate where a candidate was stopped early, None when it failed."""
        return self.utility_of(record) if record.estimate is None else record.estimate.utility

    def utility_of(self, record: CandidateRecord) -> float | None:
        """The utility of a candidate; None when it failed, was stopped or has none, or while none is known."""
        if self.utility is None or not record.done:
            return None
        utility = self.utility(record.scores)
        return utility if math.isfinite(utility) else None

    def item_scores(self, record: CandidateRecord) -> dict[str, np.ndarray]:
        """By benchmark, float64 of shape (items,) in suite order."""
        return self.suite.item_scores(self.study.results(record.id))

    def mixtures(self) -> list[CandidateRecord]:
        """Mixtures that are allowed, each once: no repeats, and not the base, which is no mixture of data."""
        return [
            record
            for record in self.study.candidates()
            if record.repeat == 0 and any(record.mixture.weights) and self._allows(record.mixture)
        ]

    def penalty_of(self, mixture: Mixture) -> float:
        """What its divergence from the prior takes off its utility."""
        return 0.0 if self.region is None else float(self.region.penalty(np.array([mixture.weights]))[0])

    def _allows(self, mixture: Mixture) -> bool:
        return self.region is None or self.region.contains(mixture.without_groups())

    def _tell(self, record: CandidateRecord, seconds: float) -> None:
        done = sum(candidate.repeat == 0 for candidate in self.study.candidates())
        known = [u for candidate in self.mixtures() if (u := self.utility_of(candidate)) is not None]
        best = max(known, default=None)
        utility = self.score_of(record)
        total = max(done, self._expected)
        self._observer.candidate(Progress(done, total, record, utility, best, seconds))

    def _recall(self, mixture: Mixture, repeat: int) -> CandidateRecord:
        record = self.study.find(mixture, repeat=repeat)
        assert record is not None, "every mixture that was collected is stored"
        self._see(record)
        return record


def _counts(swap: Swap | None) -> dict[str, Any]:
    """What a swap moved, without its time, which is among the timings."""
    return {} if swap is None else {key: value for key, value in asdict(swap).items() if key != "seconds"}
