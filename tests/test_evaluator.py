"""The pool of one engine: batches, failures, and what is counted, with an engine that stands in for a real one."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mergemix.errors import ConfigError, EngineError
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import Evaluation, LocalEvaluator
from mergemix.evidence import Evidence, Silent
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Likelihood, Output, Request, Swap
from mergemix.study import Study
from tests.study_fixture import write_benchmark

NAMES = ("math", "code")
MIXTURES = [Mixture(NAMES, (n / 10, 1 - n / 10)) for n in range(1, 8)]
SLOW_S = 0.05


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    directory = tmp_path_factory.mktemp("bench")
    return Suite(
        load_benchmarks(
            [str(write_benchmark(directory, "words", 3, random.Random(0), metric="loglikelihood"))]
        )
    )


@dataclass
class Script:
    """Starts stand-ins. calls: what was asked of which engine. fails: for each mixture, how often it still fails."""

    in_flight: int = 1
    fails: dict[Mixture, int] = field(default_factory=dict)
    error: Exception = field(default_factory=lambda: EngineError("injected"))
    proven: bool = True
    engines: list[StandIn] = field(default_factory=list)
    calls: list[tuple[int, str, tuple[Mixture, ...]]] = field(default_factory=list)

    def __call__(self) -> StandIn:
        time.sleep(SLOW_S)
        engine = StandIn(self, len(self.engines))
        self.engines.append(engine)
        return engine


class StandIn(Engine):
    """Stands in for an engine: the log-probability of everything is minus the share of the first expert."""

    kind = "stand-in"

    def __init__(self, script: Script, number: int) -> None:
        self._script, self._number = script, number
        self.in_flight, self.proven = script.in_flight, script.proven
        self.closed = 0
        self._mixture = MIXTURES[0]

    def apply(self, mixture: Mixture) -> Swap:
        self._called("apply", mixture)
        self._mixture = mixture
        return Swap(0.25, 1000, {"device": 1, "host": 2, "disk": 3}, destinations=7, skipped=2, process_s=0.1)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        self._called("submit", self._mixture)
        return self._answers(self._mixture, requests)

    def submit_each(self, mixtures: Sequence[Mixture], requests: Sequence[Request]) -> list[list[Output]]:
        self._called("submit_each", *mixtures)
        time.sleep(SLOW_S)
        return [self._answers(mixture, requests) for mixture in mixtures]

    def close(self) -> None:
        self.closed += 1

    def _answers(self, mixture: Mixture, requests: Sequence[Request]) -> list[Output]:
        return [Likelihood(-mixture.weights[0], 1, False) for _ in requests]

    def _called(self, what: str, *mixtures: Mixture) -> None:
        assert not self.closed
        script = self._script
        script.calls.append((self._number, what, mixtures))
        for mixture in mixtures:
            if what != "apply" and script.fails.get(mixture, 0) > 0:
                script.fails[mixture] -= 1
                raise script.error


def evaluate(script: Script, suite: Suite, mixtures: Sequence[Mixture]) -> list[Evaluation]:
    with LocalEvaluator(script) as pool:
        return list(pool.evaluate(mixtures, suite))


def check_scores(evaluations: Sequence[Evaluation], mixtures: Sequence[Mixture]) -> None:
    """In their order, each with the scores of its own mixture."""
    assert [evaluation.mixture for evaluation in evaluations] == list(mixtures)
    for evaluation in evaluations:
        if evaluation.failure is None:
            assert {result.score for result in evaluation.results} == {-evaluation.mixture.weights[0]}
            assert len(evaluation.results) == 3
        else:
            assert evaluation.results == ()


def test_no_candidates_start_no_engine(suite: Suite) -> None:
    script = Script()
    assert evaluate(script, suite, []) == []
    assert script.engines == []


def test_an_engine_of_one_swaps_to_each_in_turn(suite: Suite) -> None:
    script = Script()
    found = evaluate(script, suite, MIXTURES[:3])
    check_scores(found, MIXTURES[:3])
    assert [(what, mixtures[0]) for _, what, mixtures in script.calls] == [
        (what, mixture) for mixture in MIXTURES[:3] for what in ("apply", "submit")
    ]
    assert [evaluation.swap is not None and evaluation.swap.bytes_written for evaluation in found] == [
        1000
    ] * 3
    assert [evaluation.timings["swap_s"] for evaluation in found] == [0.25] * 3
    assert script.engines[0].closed == 1


def test_batches_are_of_what_the_engine_can_have_in_flight_and_one_alone_is_swapped_to(suite: Suite) -> None:
    script = Script(in_flight=3)
    check_scores(evaluate(script, suite, MIXTURES), MIXTURES)
    assert [(what, len(mixtures)) for _, what, mixtures in script.calls] == [
        ("submit_each", 3),
        ("submit_each", 3),
        ("apply", 1),
        ("submit", 1),
    ]
    assert len(script.engines) == 1


def test_time_is_shared_out_and_a_start_counts_for_the_first_only(suite: Suite) -> None:
    found = evaluate(Script(in_flight=2), suite, MIXTURES[:4])
    assert found[0].start_s >= SLOW_S
    assert [evaluation.start_s < SLOW_S / 2 for evaluation in found[1:]] == [True] * 3
    assert found[1].start_s == found[3].start_s == 0.0
    for one, other in ((found[0], found[1]), (found[2], found[3])):
        assert one.timings == other.timings
        assert SLOW_S / 2 <= one.timings["generate_s"] < SLOW_S
        assert one.timings.keys() == {"swap_s", "generate_s", "score_s"}
        assert one.swap is None


def test_a_batch_that_fails_is_tried_again_one_by_one_on_a_new_engine(suite: Suite) -> None:
    script = Script(in_flight=3, fails={MIXTURES[1]: 1})
    found = evaluate(script, suite, MIXTURES[:4])
    check_scores(found, MIXTURES[:4])
    assert [evaluation.failure for evaluation in found] == [None] * 4
    assert [(number, what, len(mixtures)) for number, what, mixtures in script.calls] == [
        (0, "submit_each", 3),
        *[(1, what, 1) for _ in range(4) for what in ("apply", "submit")],
    ]
    assert found[0].start_s >= SLOW_S
    assert found[1].start_s < SLOW_S / 2
    assert [engine.closed for engine in script.engines] == [1, 1]


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_candidate_that_fails_twice_fails_alone(suite: Suite, in_flight: int) -> None:
    script = Script(in_flight=in_flight, fails={MIXTURES[1]: 2})
    found = evaluate(script, suite, MIXTURES[:3])
    check_scores(found, MIXTURES[:3])
    assert [evaluation.failure for evaluation in found] == [None, "injected", None]
    assert found[1].timings == {}
    asked = [
        number for number, what, mixtures in script.calls if MIXTURES[1] in mixtures and "submit" in what
    ]
    assert asked == [0, 1], "once more, and on another engine"
    assert [engine.closed for engine in script.engines] == [1, 1, 1], (
        "an engine that failed is not used again"
    )


def test_what_is_no_failure_of_the_engine_ends_the_run(suite: Suite) -> None:
    script = Script(fails={MIXTURES[0]: 1}, error=ConfigError("a prompt is too long"))
    with pytest.raises(ConfigError, match="too long"):
        evaluate(script, suite, MIXTURES[:2])
    assert [engine.closed for engine in script.engines] == [1]


def test_an_engine_that_cannot_start_again_ends_the_run(suite: Suite) -> None:
    script = Script(fails={MIXTURES[0]: 1})

    def start() -> Engine:
        if script.engines:
            raise EngineError("no memory")
        return script()

    with LocalEvaluator(start) as pool, pytest.raises(EngineError, match="no memory"):
        list(pool.evaluate(MIXTURES[:2], suite))


@pytest.mark.parametrize("proven", [True, False])
def test_what_the_engine_says_of_its_swaps_is_stored(suite: Suite, tmp_path: Path, proven: bool) -> None:
    script = Script(proven=proven, fails={MIXTURES[2]: 2})
    with Study.open(tmp_path, {}, {}) as study, LocalEvaluator(script) as pool:
        Evidence(study, suite, pool, Silent(), expected=3).collect(MIXTURES[:3], origin="test")
    with Study.read(tmp_path) as study:
        *done, failed = study.candidates()
    for record in done:
        assert record.proven is proven
        assert record.swap == {
            "bytes_written": 1000,
            "bytes_read": {"device": 1, "host": 2, "disk": 3},
            "destinations": 7,
            "skipped": 2,
            "process_s": 0.1,
        }
        assert record.timings["swap_s"] == 0.25
    assert (failed.status, failed.proven, failed.swap, failed.scores) == ("failed", False, {}, {})
