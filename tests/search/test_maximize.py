"""Maximisation over a region, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mergemix.search.constraints import Constraints
from mergemix.search.maximize import maximize
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS
from tests.search.regions import assert_satisfies, names, random_constraints

NAMES = tuple("abcd")
REGIONS = {
    "simplex": Constraints(),
    "bounds": Constraints(max={"a": 0.4}, min={"b": 0.1}),
    "groups": Constraints(
        groups={"g": ("a", "b"), "h": ("b", "c")}, max={"g": 0.6, "h": 0.55}, min={"a": 0.05}
    ),
    "pinned group": Constraints(groups={"g": ("a", "b"), "h": ("b", "c")}, pin={"g": 0.6, "h": 0.5}),
    "kl": Constraints(prior=dict.fromkeys(NAMES, 1), kl_limit=0.2),
}


def surface(kind: str, seed: int):
    """An objective with interior optima, vertices, edges, kinks, steps, or several hills."""
    rng = np.random.default_rng(seed)
    target, mix, slope = rng.dirichlet(np.ones(4)), rng.normal(size=(4, 4)), rng.normal(size=4)
    return {
        "quadratic": lambda x: -(((x - target) @ mix) ** 2).sum(axis=1),
        "linear": lambda x: x @ slope,
        "hills": lambda x: 0.3 * np.sin(9 * x @ mix).sum(axis=1) + x @ slope,
        "steps": lambda x: np.round(8 * x @ mix).sum(axis=1) / 8,
        "worst": lambda x: (x / target).min(axis=1),
    }[kind]


@pytest.mark.parametrize("where", REGIONS)
@pytest.mark.parametrize("kind", ["quadratic", "linear", "hills", "steps", "worst"])
def test_it_finds_what_brute_force_finds(kind, where):
    region = REGIONS[where].region(NAMES)
    for seed in range(2):
        objective = surface(kind, seed)
        many = objective(region.sample(20_000, np.random.default_rng(99)))
        found = maximize(objective, region, np.random.default_rng(seed))
        assert region.holds(found[None])[0]
        assert objective(found[None])[0] >= many.max() - 2e-3 * np.ptp(many)


def test_interior_optima_are_exact_to_the_grid():
    target = np.random.default_rng(0).dirichlet(np.ones(17))
    found = maximize(
        lambda x: -((x - target) ** 2).sum(axis=1), Region.simplex(names(17)), np.random.default_rng(1)
    )
    assert np.abs(found - target).max() < 1e-4


def test_linear_optima_are_vertices_of_the_region():
    region = Constraints(max=dict.fromkeys(names(17), 0.15), min={"d3": 0.05}).region(names(17))
    slope = np.random.default_rng(0).normal(size=17)
    mixture = region.snap(maximize(lambda x: x @ slope, region, np.random.default_rng(1)))
    greedy = np.zeros(17)
    greedy[3] = 0.05
    for k in np.argsort(-slope):
        greedy[k] += min(0.15 - greedy[k], 1 - greedy.sum())
    np.testing.assert_allclose(mixture.weights, greedy, atol=1e-4)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32))
def test_what_it_finds_satisfies_every_constraint(seed):
    hidden, constraints = random_constraints(seed)
    region = constraints.region(hidden.names)
    slope = np.random.default_rng(seed).normal(size=len(hidden.names))

    def objective(shares: np.ndarray) -> np.ndarray:
        return shares @ slope + np.sqrt(np.maximum(shares, 0)) @ slope[::-1]

    best = region.snap(maximize(objective, region, np.random.default_rng(0)))
    assert_satisfies(best, constraints)
    assert objective(np.array([best.weights]))[0] >= objective(np.array([hidden.weights]))[0] - 1e-2


def test_a_start_that_no_sample_would_meet_is_used():
    needle = np.array([0.123, 0.456, 0.321, 0.1])

    def objective(shares: np.ndarray) -> np.ndarray:
        return np.where(np.abs(shares - needle).max(axis=1) < 1e-6, 1.0, 0.0)

    region = Region.simplex(NAMES)
    found = maximize(objective, region, np.random.default_rng(0), starts=needle[None])
    np.testing.assert_allclose(found, needle, atol=1e-6)


def test_not_a_number_is_never_the_best():
    def objective(shares: np.ndarray) -> np.ndarray:
        return np.where(
            shares[:, 0] > 0.5, np.nan, np.round(200 * shares[:, 0])
        )  # steps: only exchanges climb them

    found = maximize(objective, Region.simplex(names(17)), np.random.default_rng(0))
    assert 0.49 < found[0] <= 0.5


def test_same_seed_same_bits():
    region, objective = REGIONS["groups"].region(NAMES), surface("hills", 3)
    first, again = (maximize(objective, region, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("where", ["simplex", "groups"])
def test_kinks_are_followed_to_the_end_where_the_parts_are_known(where):
    """The largest minimum of linear functions, which a linear program knows."""
    own = names(17)
    groups = {"g": own[:4], "h": own[4:9]}
    constraints = (
        Constraints() if where == "simplex" else Constraints(groups=groups, max={"g": 0.3, "h": 0.4})
    )
    region = constraints.region(own)
    slopes = np.random.default_rng(3).normal(size=(6, 17)) + 2 * np.eye(6, 17)

    def parts(shares: np.ndarray) -> np.ndarray:
        return shares @ slopes.T

    rows = region.polytope.rows
    above = np.vstack([np.column_stack([-slopes, np.ones(6)]), np.column_stack([rows, np.zeros(len(rows))])])
    exact = linprog(
        np.append(np.zeros(17), -1.0),
        above,
        np.append(np.zeros(6), region.polytope.row_upper / UNITS),
        np.append(np.ones(17), 0.0)[None],
        [1.0],
        [(0, 1)] * 17 + [(None, None)],
    )
    found = maximize(lambda shares: parts(shares).min(axis=1), region, np.random.default_rng(0), parts=parts)
    assert region.holds(found[None])[0]
    assert parts(found[None]).min() == pytest.approx(-exact.fun, abs=1e-6)
