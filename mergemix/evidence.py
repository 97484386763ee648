"""What a study knows of its candidates: recalled from the store, or else evaluated and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mergemix.evals.suite import Suite
from mergemix.evals.utility import Utility
from mergemix.evaluator import LocalEvaluator
from mergemix.mixture import Mixture
from mergemix.study import CandidateRecord, Study


class Observer(Protocol):
    """What a run tells while it goes on. Calls come from one thread, in order."""

    def stage(self, text: str) -> None:
        """A new stage began."""

    def candidate(
        self, done: int, total: int, mixture: Mixture, utility: float | None, timings: dict[str, float]
    ) -> None:
        """Candidate `done` of `total` was evaluated; utility is None while unknown or when it failed."""


class Silent:
    """The observer of programs."""

    def stage(self, text: str) -> None:
        pass

    def candidate(
        self, done: int, total: int, mixture: Mixture, utility: float | None, timings: dict[str, float]
    ) -> None:
        pass


class Evidence:
    """Candidates of one study on one suite of benchmarks. A candidate that is stored is never paid for again.

    utility: None until the reference candidates that a normalisation needs are known.
    """

    def __init__(
        self, study: Study, suite: Suite, pool: LocalEvaluator, observer: Observer, *, expected: int
    ) -> None:
        self.study = study
        self.suite = suite
        self.utility: Utility | None = None
        self._pool = pool
        self._observer = observer
        self._expected = expected

    def collect(self, mixtures: Sequence[Mixture], origin: str, *, repeat: int = 0) -> list[CandidateRecord]:
        """Records of `mixtures`, in their order; those not stored are evaluated now.

        repeat: 0, or 1 to evaluate a mixture again for the noise floor. One transaction a result: a kill
        loses at most the candidate in flight.
        """
        missing = [m for m in dict.fromkeys(mixtures) if self.study.find(m, repeat=repeat) is None]
        begin = time.perf_counter()
        for evaluation in self._pool.evaluate(missing, self.suite):
            if evaluation.failure is not None:
                self.study.record_failure(
                    evaluation.mixture, repeat=repeat, origin=origin, reason=evaluation.failure
                )
            else:
                # All that is neither generation nor swap nor grading, the store's own last write included.
                total_s = time.perf_counter() - begin
                self.study.record(
                    evaluation.mixture,
                    repeat=repeat,
                    origin=origin,
                    results=evaluation.results,
                    timings={**evaluation.timings, "total_s": total_s},
                    proven=evaluation.proven,
                )
            record = self._recall(evaluation.mixture, repeat)
            done = len(self.study.candidates())
            self._observer.candidate(
                done, max(done, self._expected), record.mixture, self.utility_of(record), evaluation.timings
            )
            begin = time.perf_counter()
        return [self._recall(mixture, repeat) for mixture in mixtures]

    def utility_of(self, record: CandidateRecord) -> float | None:
        """The utility of a candidate; None when it failed, or while there is no utility yet."""
        if self.utility is None or not record.done:
            return None
        return self.utility(record.scores)

    def item_scores(self, record: CandidateRecord) -> dict[str, np.ndarray]:
        """By benchmark, float64 of shape (items,) in suite order."""
        return self.suite.item_scores(self.study.results(record.id))

    def _recall(self, mixture: Mixture, repeat: int) -> CandidateRecord:
        record = self.study.find(mixture, repeat=repeat)
        assert record is not None, "every mixture that was collected is stored"
        return record
