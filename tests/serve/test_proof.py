"""The self-test and the fallback, on engines that are wrong in known ways."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import pytest

from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError, EngineError, ProofError
from mergemix.mixture import Mixture
from mergemix.serve import open as opening
from mergemix.serve.engine import (
    Engine,
    EngineSpec,
    Generated,
    Likelihood,
    LogLikelihood,
    Output,
    Request,
    Swap,
)
from mergemix.serve.proof import distance, prove
from mergemix.serve.restarting import RestartingEngine

NAMES = ("math", "code")
UNIFORM = Mixture.uniform(NAMES)


class Toy(Engine):
    """Log-probabilities are a function of the weights it holds; `fault` says how a swap goes wrong."""

    kind = "toy"

    def __init__(self, initial: Mixture, fault: str = "", noise: Sequence[float] = (0.0,)) -> None:
        self.held = initial.weights
        self.fault = fault
        self.noise = noise
        self.asked = 0
        self.closed = 0

    def apply(self, mixture: Mixture) -> Swap:
        if self.fault == "raises":
            raise EngineError("injected")
        if self.fault == "ignores":
            return Swap(0.0, 0)
        self.held = mixture.weights
        if self.fault == "drifts":
            self.held = (self.held[0], self.held[1] + 1e-6)
        return Swap(0.0, 8)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        if self.closed:
            raise EngineError("closed")
        self.asked += 1
        noise = self.noise[self.asked % len(self.noise)]
        return [
            Likelihood(-sum((i + 2) * w for i, w in enumerate(self.held)) + noise, 1, False)
            if isinstance(request, LogLikelihood)
            else Generated(str(self.held), 1)
            for request in requests
        ]

    def checksum(self) -> str:
        return str(self.held)

    def close(self) -> None:
        self.closed += 1


class Checked(Toy):
    def __init__(self, initial: Mixture, problems: Sequence[str]) -> None:
        super().__init__(initial)
        self.problems = list(problems)
        self.unseen: list[str] = []

    def apply_checked(self, mixture: Mixture, *, thorough: bool) -> list[str]:
        self.apply(mixture)
        return self.problems

    def describe(self) -> list[dict[str, Any]]:
        return [{"problems": [], "unseen": self.unseen, "uncovered": {"embed": 64}}]


def test_a_good_engine_is_proven_and_holds_the_initial_mixture_again() -> None:
    engine = Toy(UNIFORM)
    evidence = prove(engine, UNIFORM)
    assert evidence.problems == ()
    assert evidence.noise == 0.0
    assert evidence.moved == pytest.approx(0.5)
    assert engine.held == UNIFORM.weights


def test_it_swaps_to_an_expert_that_is_not_the_initial_mixture() -> None:
    assert prove(Toy(Mixture.one_hot(NAMES, "math")), Mixture.one_hot(NAMES, "math")).moved == pytest.approx(
        1.0
    )
    alone = Mixture.one_hot(("only",), "only")
    evidence = prove(Toy(alone), alone)
    assert evidence.moved is None
    assert evidence.problems == ()


def test_faults_are_problems() -> None:
    assert any("answer differently" in problem for problem in prove(Toy(UNIFORM, "drifts"), UNIFORM).problems)
    assert any("not the same" in problem for problem in prove(Toy(UNIFORM, "drifts"), UNIFORM).problems)
    problems = prove(Checked(UNIFORM, ["q: stale"]), UNIFORM).problems
    assert len([problem for problem in problems if "q: stale" in problem]) == 2


def test_experts_that_answer_alike_are_no_problem_where_the_weights_were_compared() -> None:
    alike = Checked(UNIFORM, [])
    alike.fault = "ignores"  # so that no answer changes
    assert prove(alike, UNIFORM).problems == ()
    alike.unseen = ["layers.0.mlp.experts"]  # a module that nothing but answers can show to be right
    [problem] = prove(alike, UNIFORM).problems
    assert "changed no answer" in problem
    assert "layers.0.mlp.experts" in problem


def test_differences_within_the_measured_noise_are_none() -> None:
    noisy = Toy(UNIFORM, noise=(0.0, 0.01, -0.01, 0.005))
    evidence = prove(noisy, UNIFORM)
    assert evidence.noise > 0
    assert evidence.problems == ()


def test_distance() -> None:
    assert distance([1.0, math.nan, -math.inf], [1.5, math.nan, -math.inf]) == 0.5
    assert distance([math.nan], [1.0]) == math.inf
    assert distance([-math.inf], [1.0]) == math.inf


class Starts:
    """Stands in for start_engine; gives the engines it was given, in turn, then good ones."""

    def __init__(self, *first: Toy) -> None:
        self.waiting = list(first)
        self.started: list[tuple[Toy, Mixture]] = []

    def __call__(self, spec: EngineSpec, initial: Mixture) -> Toy:
        engine = self.waiting.pop(0) if self.waiting else Toy(initial)
        self.started.append((engine, initial))
        return engine


@pytest.fixture
def spec() -> EngineSpec:
    return EngineSpec(Family(None, ()))


def test_a_proven_engine_is_returned_as_it_is(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Toy(UNIFORM)
    monkeypatch.setattr(opening, "start_engine", Starts(good))
    assert opening.open_engine(spec, UNIFORM) is good
    assert good.proven
    assert not good.closed


@pytest.mark.parametrize("fault", ["drifts", "raises"])
def test_an_unproven_engine_is_replaced_by_fresh_ones_with_a_warning(
    spec: EngineSpec, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Toy(UNIFORM, fault)
    starts = Starts(bad)
    monkeypatch.setattr(opening, "start_engine", starts)
    with caplog.at_level(logging.WARNING):
        engine = opening.open_engine(spec, UNIFORM)
    assert "fresh engine" in caplog.text
    assert bad.closed == 1
    assert not engine.proven
    assert engine.kind == "toy"
    math_only = Mixture.one_hot(NAMES, "math")
    for mixture in (UNIFORM, math_only, math_only, UNIFORM):
        engine.apply(mixture)
        assert engine.loglikelihood([LogLikelihood("a", "b")]) == Toy(mixture).loglikelihood(
            [LogLikelihood("a", "b")]
        )
    assert [mixture for _, mixture in starts.started] == [UNIFORM, UNIFORM, math_only, UNIFORM]
    assert [started.closed for started, _ in starts.started] == [1, 1, 1, 0]
    engine.close()
    with pytest.raises(EngineError):
        engine.submit([LogLikelihood("a", "b")])


def test_fresh_engines_that_disagree_are_the_end(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        opening, "start_engine", Starts(Toy(UNIFORM, "drifts"), other := Toy(Mixture.one_hot(NAMES, "code")))
    )
    with pytest.raises(ProofError, match="answer differently"):
        opening.open_engine(spec, UNIFORM)
    assert other.closed == 1


def test_a_failed_start_of_the_slow_path_leaves_nothing_running_and_may_be_tried_again() -> None:
    starts = Starts()
    engine = RestartingEngine(lambda mixture: starts(None, mixture), UNIFORM)  # type: ignore[arg-type]
    monkey = Mixture.one_hot(NAMES, "math")

    def fail(mixture: Mixture) -> Engine:
        raise EngineError("no memory")

    engine._start, good = fail, engine._start
    with pytest.raises(EngineError, match="no memory"):
        engine.apply(monkey)
    with pytest.raises(EngineError, match="no engine is running"):
        engine.submit([])
    engine._start = good
    engine.apply(monkey)
    assert engine.submit([LogLikelihood("a", "b")])


def test_the_kind_of_engine_is_resolved_once_and_unknown_ones_refused() -> None:
    assert opening.resolve_kind("auto") == "vllm"
    assert opening.resolve_kind("hf") == "hf"
    with pytest.raises(ConfigError, match="auto, vllm or hf"):
        opening.resolve_kind("tgi")
