"""What a study knows of its candidates: recalled from the store, or else evaluated and stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mergemix.evals.suite import Suite
from mergemix.evals.utility import Utility
from mergemix.evaluator import LocalEvaluator
from mergemix.mixture import Mixture
from mergemix.serve.engine import Swap
from mergemix.study import CandidateRecord, Study


@dataclass(frozen=True)
class Progress:
    """One candidate was evaluated and stored.

    done, total: distinct candidates so far and expected. utility: None while unknown or when it failed.
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

    def candidate(self, progress: Progress) -> None:
        """A candidate was evaluated."""


class Silent:
    """The observer of programs."""

    def stage(self, text: str) -> None:
        pass

    def candidate(self, progress: Progress) -> None:
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
        self._previous_end = time.perf_counter()

    def collect(self, mixtures: Sequence[Mixture], origin: str, *, repeat: int = 0) -> list[CandidateRecord]:
        """Records of `mixtures`, in their order; those not stored are evaluated now.

        repeat: 0, or 1 to evaluate a mixture again for the noise floor. One transaction a result: a kill
        loses at most the candidate in flight.
        """
        missing = [m for m in dict.fromkeys(mixtures) if self.study.find(m, repeat=repeat) is None]
        for evaluation in self._pool.evaluate(missing, self.suite):
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
            )
            self._tell(record, seconds)
        return [self._recall(mixture, repeat) for mixture in mixtures]

    def utility_of(self, record: CandidateRecord) -> float | None:
        """The utility of a candidate; None when it failed, or while there is no utility yet."""
        if self.utility is None or not record.done:
            return None
        return self.utility(record.scores)

    def item_scores(self, record: CandidateRecord) -> dict[str, np.ndarray]:
        """By benchmark, float64 of shape (items,) in suite order."""
        return self.suite.item_scores(self.study.results(record.id))

    def mixtures(self) -> list[CandidateRecord]:
        """Candidates of the search, each once: no repeats, and not the base, which is no mixture of data."""
        return [r for r in self.study.candidates() if r.repeat == 0 and any(r.mixture.weights)]

    def _tell(self, record: CandidateRecord, seconds: float) -> None:
        done = sum(candidate.repeat == 0 for candidate in self.study.candidates())
        known = [u for candidate in self.mixtures() if (u := self.utility_of(candidate)) is not None]
        best = max(known, default=None)
        utility = self.utility_of(record)
        total = max(done, self._expected)
        self._observer.candidate(Progress(done, total, record, utility, best, seconds))

    def _recall(self, mixture: Mixture, repeat: int) -> CandidateRecord:
        record = self.study.find(mixture, repeat=repeat)
        assert record is not None, "every mixture that was collected is stored"
        return record


def _counts(swap: Swap | None) -> dict[str, Any]:
    """What a swap moved, without its time, which is among the timings."""
    return {} if swap is None else {key: value for key, value in asdict(swap).items() if key != "seconds"}
