"""Designs: distinct mixtures, inside the region, and good ones."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from mergemix.mixture import Mixture
from mergemix.search import simplex
from mergemix.search.constraints import Constraints
from mergemix.search.corners import _highest
from mergemix.search.designs import d_optimal, dirichlet, lattice, maximin, vertices
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS
from tests.search.regions import assert_satisfies, names, random_constraints


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32))
def test_designs_are_distinct_and_inside(seed):
    hidden, constraints = random_constraints(seed)
    region = constraints.region(hidden.names)
    rng = np.random.default_rng(seed)
    existing = [region.snap(shares) for shares in region.sample(3, rng)]
    for design in (
        lattice(region, 30),
        vertices(region, 20),
        dirichlet(region, 10, hidden, 5.0, rng),
        maximin(region, 10, rng, existing=existing),
        d_optimal(region, 10, rng, existing=existing, model="linear"),
    ):
        assert len(set(design)) == len(design) <= 30
        for mixture in design:
            assert_satisfies(mixture, constraints)
            assert region.contains(mixture)
    for model in (maximin, d_optimal):
        assert not set(existing) & set(model(region, 5, rng, existing=existing))


@pytest.mark.parametrize(("k", "count"), [(2, 7), (3, 28), (3, 27), (5, 100), (17, 153)])
def test_the_lattice_of_the_simplex_is_the_finest_that_fits(k, count):
    steps = max(s for s in range(1, 99) if math.comb(s + k - 1, k - 1) <= count)
    assert lattice(Region.simplex(names(k)), count) == list(simplex.lattice(names(k), steps))


def test_the_lattice_of_a_region_is_complete():
    region = Constraints(min={"a": 0.1}, max={"a": 0.6, "b": 0.5}, groups={"g": ("b", "c")}).region("abc")
    found = lattice(region, 40)
    spacing = min(
        np.abs(np.subtract(first.weights, second.weights)).max()
        for first, second in itertools.combinations(found, 2)
    )
    steps = round(0.9 / spacing)
    expected = {
        (i, j)
        for i in range(steps + 1)
        for j in range(steps + 1 - i)
        if 0.1 + 0.9 * i / steps <= 0.6 + 1e-9 and 0.9 * j / steps <= 0.5 + 1e-9
    }
    assert len(found) == len(expected) <= 40


def test_no_lattice_fits_a_small_count():
    assert lattice(Constraints(max=dict.fromkeys(names(17), 0.1)).region(names(17)), 40) == []


def test_the_vertices_under_bounds_are_all_of_them():
    region = Constraints(max={"a": 0.5, "b": 0.4}, min={"c": 0.2}).region("abc")
    corners = {(0.5, 0.3, 0.2), (0.5, 0.0, 0.5), (0.0, 0.4, 0.6), (0.4, 0.4, 0.2), (0.0, 0.0, 1.0)}
    assert {mixture.weights for mixture in vertices(region, 10)} == corners
    assert set(vertices(Region.simplex(names(9)), 9)) == {Mixture.one_hot(names(9), n) for n in names(9)}
    assert len(vertices(Constraints(max=dict.fromkeys(names(17), 0.1)).region(names(17)), 50)) == 50


def test_the_vertices_under_groups_are_extreme():
    region = Constraints(groups={"g": ("a", "b")}, max={"g": 0.5}, min={"g": 0.2}).region("abc")
    corners = {(0.5, 0.0, 0.5), (0.0, 0.5, 0.5), (0.2, 0.0, 0.8), (0.0, 0.2, 0.8)}
    assert {mixture.weights for mixture in vertices(region, 20)} == corners


def test_dirichlet_draws_lie_around_the_prior():
    region, prior = Region.simplex("abc"), Mixture(tuple("abc"), (0.6, 0.4, 0.0))
    wide, narrow = (
        np.array([m.weights for m in dirichlet(region, 300, prior, size, np.random.default_rng(0))])
        for size in (5, 500)
    )
    for draws in (wide, narrow):
        assert (draws[:, 2] == 0).all()
        np.testing.assert_allclose(draws.mean(axis=0), prior.weights, atol=0.04)
    np.testing.assert_allclose(narrow[:, 0].std(), np.sqrt(0.24 / 501), rtol=0.15)
    assert wide[:, 0].std() > 3 * narrow[:, 0].std()
    with pytest.raises(ValueError, match="concentration"):
        dirichlet(region, 1, prior, 0.0, np.random.default_rng(0))


def smallest_distance(mixtures: list[Mixture]) -> float:
    return min(math.dist(a.weights, b.weights) for a, b in itertools.combinations(mixtures, 2))


def test_space_filling_points_are_farther_apart_than_any_random_ones():
    region = Constraints(max={"a": 0.4, "b": 0.5}).region("abcd")
    rng = np.random.default_rng(0)
    design = maximin(region, 12, rng)
    random = [[region.snap(shares) for shares in region.sample(12, rng)] for _ in range(200)]
    assert len(design) == 12
    assert smallest_distance(design) > 1.3 * max(map(smallest_distance, random))
    more = maximin(region, 6, rng, existing=design)
    assert smallest_distance([*design, *more]) > 0.5 * smallest_distance(design)


def test_d_optimal_points_of_known_designs():
    three = Region.simplex("abc")
    ends = set(vertices(three, 3))
    assert set(d_optimal(three, 3, np.random.default_rng(0), model="linear")) == ends
    # Scheffe's quadratic model on the simplex: vertices and midpoints of edges (Kiefer 1961).
    middles = {
        Mixture(tuple("abc"), weights) for weights in ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
    }
    assert set(d_optimal(three, 6, np.random.default_rng(0))) == ends | middles
    assert set(d_optimal(three, 3, np.random.default_rng(0), existing=sorted(ends, key=str))) == middles
    with pytest.raises(ValueError, match="model"):
        d_optimal(three, 3, np.random.default_rng(0), model="cubic")


def test_a_region_of_few_mixtures_gives_no_more():
    region = Constraints(pin={"a": 0.5}, max={"b": 0.3}, min={"b": 0.2999}).region("abc")
    for design in (
        maximin(region, 5, np.random.default_rng(0)),
        d_optimal(region, 5, np.random.default_rng(0)),
    ):
        assert sorted(mixture.weights for mixture in design) == [(0.5, 0.2999, 0.2001), (0.5, 0.3, 0.2)]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_corners_under_groups_that_share_no_domain_are_those_of_a_linear_program(seed):
    rng = np.random.default_rng(seed)
    own = names(8)
    groups = {"g": own[:3], "h": own[3 : 3 + int(rng.integers(1, 5))]}
    share = rng.dirichlet(np.ones(8))  # inside, so that the constraints can be met
    low, high = (
        {name: float(np.clip(round(x * f, 4), 0, 1)) for name, x in zip(own, share, strict=True)}
        for f in (0.4, 1.9)
    )
    sums = {name: float(sum(share[own.index(d)] for d in members)) for name, members in groups.items()}
    region = Constraints(
        groups=groups,
        min={**low, "g": round(sums["g"] * 0.9, 4)},
        max={**high, **{name: min(round(x * 1.05 + 1e-3, 4), 1.0) for name, x in sums.items()}},
    ).region(own)
    slopes = rng.normal(size=8)
    polytope = region.polytope
    exact = linprog(
        -slopes,
        np.vstack([polytope.rows, -polytope.rows]),
        np.append(polytope.row_upper, -polytope.row_lower),
        np.ones((1, 8)),
        [UNITS],
        np.column_stack([polytope.lower, polytope.upper]),
    )
    found = _highest(polytope, slopes)
    assert region.holds(found[None])[0]
    assert slopes @ found == pytest.approx(-exact.fun / UNITS, abs=1e-9)
