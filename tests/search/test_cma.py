"""CMA-ES finds optima inside the simplex, on its faces and at its vertices."""

from dataclasses import dataclass

import numpy as np
import pytest

from mergemix.mixture import Mixture
from mergemix.search import Outcome, open_search
from mergemix.search.constraints import Constraints
from tests.search.conformance import drive

SEEDS = range(5)


@dataclass(frozen=True)
class Quadratic:
    """score(x) = -(x - peak)^T H (x - peak) with H positive definite; `best` is its maximum on the simplex."""

    hessian: np.ndarray
    peak: np.ndarray
    best: np.ndarray

    @classmethod
    def random(cls, k: int, where: str, seed: int) -> "Quadratic":
        rng = np.random.default_rng([k, seed])
        factor = rng.normal(size=(k, k))
        hessian = factor @ factor.T / k + 0.2 * np.eye(k)
        best = rng.dirichlet(np.full(k, 3.0))
        if where == "face":
            best[-1] = 0.0
            best /= best.sum()
        if where == "vertex":
            best = np.eye(k)[0]
        # The gradient at `best`, 2 H (peak - best), is zero for shares that are in use and negative for the
        # others: the optimality conditions of the simplex, so that the unconstrained peak lies outside.
        gradient = np.where(best > 0, 0.0, -0.4)
        return cls(hessian, best + np.linalg.solve(hessian, gradient / 2), best)

    def __call__(self, mixture: Mixture) -> float:
        return self.value(np.array(mixture.weights))

    def value(self, shares: np.ndarray) -> float:
        return -float((shares - self.peak) @ self.hessian @ (shares - self.peak))

    def regret(self, mixtures: list[Mixture]) -> float:
        return self.value(self.best) - max(map(self, mixtures))


def median_regret(kind: str, k: int, where: str, budget: int) -> float:
    regrets = []
    for seed in range(3):
        quadratic = Quadratic.random(k, where, seed)
        search = open_search(kind, tuple("abcdef"[:k]), budget=budget, seed=seed)
        regrets.append(quadratic.regret(drive(search, quadratic)))
    return float(np.median(regrets))


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("where", ["inside", "face"])
def test_cma_beats_random_search(k, where):
    budget = 25 * k
    cma, random = (median_regret(kind, k, where, budget) for kind in ("cma", "random"))
    assert cma < random
    assert cma < 0.01


@pytest.mark.parametrize("k", [2, 4, 6])
def test_cma_settles_at_a_vertex(k):
    """The vertex is a start point; what counts is that the samples end up on it and the search says so."""
    names = tuple("abcdef"[:k])
    for seed in SEEDS:
        quadratic = Quadratic.random(k, "vertex", seed)
        search = open_search("cma", names, budget=400, seed=seed)
        proposed = drive(search, quadratic)
        assert "budget" not in search.stop()
        assert quadratic.regret(proposed) == 0.0
        # Samples that fall on the vertex propose nothing new: the last new one is on the way to it.
        np.testing.assert_allclose(proposed[-1].weights, np.eye(k)[0], atol=0.03)


@pytest.mark.parametrize("k", [2, 3])
def test_cma_converges_and_says_so(k):
    for seed in SEEDS:
        quadratic = Quadratic.random(k, "inside", seed)
        search = open_search("cma", tuple("abcdef"[:k]), budget=1000, seed=seed)
        assert quadratic.regret(drive(search, quadratic)) < 1e-6
        assert "budget" not in search.stop()


def test_cma_reaches_faces_exactly():
    names = tuple("abcd")
    quadratic = Quadratic.random(4, "face", 0)
    proposed = drive(open_search("cma", names, budget=120), quadratic)
    assert sum(mixture.weights[-1] == 0.0 for mixture in proposed[-20:]) >= 10


@pytest.mark.parametrize("k", [3, 5])
def test_cma_finds_the_best_allowed_mixture(k):
    """The unconstrained best is all of the first domain."""
    names = tuple("abcdef"[:k])
    region = Constraints(max={"a": 0.3, "b": 0.5}).region(names)
    search = open_search("cma", names, budget=120, region=region)
    proposed = drive(search, lambda mixture: 2 * mixture.weights[0] + mixture.weights[1])
    assert all(region.contains(mixture) for mixture in proposed)
    assert max(2 * mixture.weights[0] + mixture.weights[1] for mixture in proposed) > 1.08  # of 1.1


def test_cma_goes_on_while_one_result_is_missing():
    """With one engine stuck on its candidate for ever, the others bring the search to its optimum."""
    quadratic = Quadratic.random(4, "inside", 1)
    search = open_search("cma", tuple("abcd"), budget=150)
    search.tell([(mixture, quadratic(mixture)) for mixture in search.ask()])
    stuck = search.ask(4)[0]
    told = []
    while len(told) < 140:
        free = [mixture for mixture in search.ask(4) if mixture != stuck]
        search.tell([(free[-1], quadratic(free[-1]))])
        told.append(free[-1])
    assert quadratic.regret(told[-20:]) < 0.005
    assert np.mean([quadratic(m) for m in told[-20:]]) > np.mean([quadratic(m) for m in told[:20]])


def late_regret(stderr: float, sd: float = 0.2) -> float:
    """Of the last 15 of 60 proposals, the mean over seeds."""
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        quadratic = Quadratic.random(4, "inside", seed)
        search = open_search("cma", tuple("abcd"), budget=60, seed=seed)
        proposed = drive(search, lambda m, q=quadratic, r=rng: Outcome(q(m) + sd * r.normal(), stderr))
        late = np.mean([quadratic(mixture) for mixture in proposed[-15:]])
        found.append(quadratic.value(quadratic.best) - late)
    return float(np.mean(found))


def test_cma_smooths_scores_that_it_is_told_are_noisy():
    assert late_regret(stderr=0.2) < 0.9 * late_regret(stderr=0.0)


def test_a_model_preselects_what_cma_evaluates(monkeypatch):
    helped = late_regret(stderr=0.0, sd=0.0)
    monkeypatch.setattr("mergemix.search.cma_search.MODELLED", 0)
    assert helped < 0.5 * late_regret(stderr=0.0, sd=0.0)
