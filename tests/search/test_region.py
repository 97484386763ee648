"""Regions of mixtures: every proposal satisfies every constraint, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.mixture import LayerGroup, Mixture
from mergemix.search import simplex
from mergemix.search.constraints import Constraints
from mergemix.search.region import Region
from tests.search.regions import assert_satisfies, names, random_constraints

seeds = st.integers(0, 2**32)
some = settings(deadline=None, max_examples=12)


@some
@given(st.integers(2, 17), seeds)
def test_the_simplex_is_as_without_constraints(k, seed):
    region = Region.simplex(names(k))
    rng = np.random.default_rng(seed)
    far = rng.normal(size=k)
    np.testing.assert_array_equal(region.project(far), simplex.project(far))
    assert region.snap(simplex.project(far)) == simplex.snap(names(k), simplex.project(far))
    assert region.start_points() == simplex.start_points(names(k))
    one_by_one = np.random.default_rng(seed)
    rows = [one_by_one.dirichlet(np.ones(k)) for _ in range(5)]
    np.testing.assert_array_equal(region.sample(5, np.random.default_rng(seed)), rows)
    assert region.is_simplex
    assert region.describe() == {}
    assert (region.penalty(np.array(rows)) == 0).all()


@some
@given(seeds)
def test_everything_proposed_satisfies_the_constraints(seed):
    hidden, constraints = random_constraints(seed)
    region = constraints.region(hidden.names)
    assert region.contains(hidden)
    rng = np.random.default_rng(seed)
    sample = region.sample(12, rng)
    far = rng.normal(1 / len(hidden.names), 0.4, size=(12, len(hidden.names)))
    proposed = [region.snap(region.project(shares)) for shares in (*sample, *far)]
    for mixture in (*proposed, *region.start_points(hidden)):
        assert_satisfies(mixture, constraints)
        assert region.contains(mixture)
        assert region.snap(mixture.weights) == mixture
    np.testing.assert_allclose(sample.sum(axis=1), 1, atol=1e-9)


@some
@given(seeds)
def test_projection_is_the_nearest_point(seed):
    hidden, constraints = random_constraints(seed)
    region = constraints.region(hidden.names)
    rng = np.random.default_rng(seed)
    points = np.vstack([region.sample(60, rng), hidden.weights])
    for far in rng.normal(1 / len(hidden.names), 0.4, size=(5, len(hidden.names))):
        nearest = region.project(far)
        assert region.holds(nearest[None])[0]
        # The nearest point p of a convex set is the one with (x - p).(y - p) <= 0 for all its points y.
        error = 1e-9 if region.kl_limit is None else 1e-5
        assert ((points - nearest) @ (far - nearest)).max() <= error


@some
@given(seeds)
def test_snapping_stays_near(seed):
    hidden, constraints = random_constraints(seed, kl=False)
    region = constraints.region(hidden.names)
    for shares in region.sample(8, np.random.default_rng(seed)):
        distance = np.abs(np.array(region.snap(shares).weights) - shares) * simplex.UNITS
        assert distance.max() < (6 if constraints.groups else 1 + 1e-6)


def test_groups_that_only_half_units_share_out_are_rounded_further_away():
    pairs = {"ab": ("a", "b"), "bc": ("b", "c"), "ac": ("a", "c")}
    region = Constraints(groups=pairs, max=dict.fromkeys(pairs, 0.3333)).region("abcd")
    mixture = region.snap([0.16665, 0.16665, 0.16665, 0.50005])
    assert region.contains(mixture)
    assert np.abs(np.array(mixture.weights) - [0.16665, 0.16665, 0.16665, 0.50005]).max() < 3e-4


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(max={"a": 0.4, "c": 0.5}, min={"b": 0.1}),
        Constraints(max={"a": 0.05}, min={"b": 0.9}),  # thin: hit-and-run
        Constraints(groups={"g": ("a", "b"), "h": ("b", "c")}, pin={"g": 0.6}, max={"h": 0.5}),
        Constraints(prior={"a": 0.2, "b": 0.5, "c": 0.2, "d": 0.1}, kl_limit=0.05),
    ],
)
def test_samples_are_uniform_over_the_region(constraints):
    region = constraints.region("abcd")
    sample = region.sample(4000, np.random.default_rng(0))
    draws = np.random.default_rng(1).dirichlet(np.ones(4), size=600_000)
    if "g" in constraints.pin:
        draws[:, :2] *= 0.6 / draws[:, :2].sum(axis=1, keepdims=True)
        draws[:, 2:] *= 0.4 / draws[:, 2:].sum(axis=1, keepdims=True)
    draws = draws[region.holds(draws)]
    assert len(draws) > 200
    error = np.sqrt(draws.var(axis=0) * (1 / len(draws) + 1 / len(sample)))
    assert (np.abs(sample.mean(axis=0) - draws.mean(axis=0)) < 6 * error + 1e-12).all()
    np.testing.assert_allclose(sample.std(axis=0), draws.std(axis=0), rtol=0.12)


def test_hit_and_run_forgets_its_start_with_17_domains():
    region = Constraints(max=dict.fromkeys(names(17), 0.1)).region(names(17))
    sample = region.sample(3000, np.random.default_rng(0))
    np.testing.assert_allclose(sample.mean(axis=0), 1 / 17, atol=0.003)  # by symmetry
    assert sample.std(axis=0).min() > 0.9 * sample.std(axis=0).max()
    # An independent draw: Gibbs exchanges from there on leave a uniform sample as spread as it was.
    rng, walkers = np.random.default_rng(1), sample.copy()
    for _ in range(600):
        i, j = rng.choice(17, 2, replace=False)
        both = walkers[:, i] + walkers[:, j]
        low, high = np.maximum(0, both - 0.1), np.minimum(0.1, both)
        walkers[:, i] = low + rng.random(len(walkers)) * (high - low)
        walkers[:, j] = both - walkers[:, i]
    np.testing.assert_allclose(sample.std(), walkers.std(), rtol=0.03)


def test_samples_depend_on_the_seed_alone():
    region = Constraints(max={"d0": 0.1, "d3": 0.2}, pin={"d1": 0.3}).region(names(6))
    first, again, other = (region.sample(9, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_contains_is_exact_to_the_unit():
    region = Constraints(max={"a": 0.3, "g": 0.5}, min={"c": 0.2}, groups={"g": ("a", "b")}).region("abc")
    assert region.contains(Mixture(("a", "b", "c"), (0.3, 0.2, 0.5)))
    assert not region.contains(Mixture(("a", "b", "c"), (0.3001, 0.1999, 0.5)))
    assert not region.contains(Mixture(("a", "b", "c"), (0.3, 0.2001, 0.4999)))
    assert not region.contains(Mixture(("a", "b", "c"), (0.3, 0.2, 0.4)))  # the base has a part
    assert not region.contains(Mixture(("b", "a", "c"), (0.3, 0.2, 0.5)))
    layers = (LayerGroup(("model.*",), (0.4, 0.1, 0.5)),)
    assert not region.contains(Mixture(("a", "b", "c"), (0.3, 0.2, 0.5), layers))


def test_uniform_is_one_mixture_where_it_is_inside():
    assert Constraints(max={"a": 0.5}).region("abc").snap([1 / 3] * 3) == Mixture.uniform("abc")
    outside = Constraints(max={"a": 0.3333}).region("abc").snap([1 / 3] * 3)
    assert outside != Mixture.uniform("abc")
    assert outside.weights[0] == 0.3333


def test_a_region_of_one_mixture():
    region = Constraints(pin={"a": 0.25, "b": 0.35}, max={"c": 0.4}).region("abc")
    only = Mixture(("a", "b", "c"), (0.25, 0.35, 0.4))
    assert region.start_points() == [only]
    assert region.snap([5.0, -1.0, 3.0]) == only
    np.testing.assert_allclose(region.sample(3, np.random.default_rng(0)), [only.weights] * 3)
    at_prior = Constraints(prior={"a": 0.2, "b": 0.8}, kl_limit=0.0).region("ab")
    assert at_prior.start_points() == [Mixture(("a", "b"), (0.2, 0.8))]


def test_what_holds_a_mixture_back_and_the_region_without_it():
    constraints = Constraints(
        max={"a": 0.3},
        min={"g": 0.2},
        pin={"d": 0.1},
        groups={"g": ("b", "c")},
        prior=dict.fromkeys("abcd", 1.0),
        kl_limit=2.0,
    )
    region = constraints.region("abcd")
    at = Mixture(tuple("abcd"), (0.3, 0.3, 0.3, 0.1))
    assert [bound.key for bound in region.active(at)] == ["max a", "pin d"]
    freed = region.without(region.active(at)[0])
    assert freed.contains(Mixture(tuple("abcd"), (0.7, 0.2, 0.0, 0.1)))
    assert not region.contains(Mixture(tuple("abcd"), (0.7, 0.2, 0.0, 0.1)))
    tight = Constraints(prior=dict.fromkeys("abcd", 1.0), kl_limit=0.05).region("abcd")
    corner = tight.snap([1.0, 0, 0, 0])
    assert [bound.text for bound in tight.active(corner)] == ["KL <= 0.05"]
    assert tight.active(Mixture.uniform("abcd")) == []
    assert tight.without(tight.bounds[0]).is_simplex


def test_the_penalty_is_per_nat():
    region = Constraints(prior={"a": 1, "b": 3}, kl_penalty=2.0).region("ab")
    at_prior, corner = region.penalty(np.array([[0.25, 0.75], [1.0, 0.0]]))
    assert at_prior == pytest.approx(0)
    assert corner == pytest.approx(2 * np.log(4))
    assert region.is_simplex
    assert region.describe() == {"prior": {"a": 0.25, "b": 0.75}, "kl_penalty": 2.0}


def test_domains_without_prior_get_no_share():
    for constraint in ({"kl_limit": 1.0}, {"kl_penalty": 0.1}):
        region = Constraints(prior={"a": 0.5, "b": 0.5}, **constraint).region("abc")
        assert all(mixture.weights[2] == 0 for mixture in region.start_points())
        assert (region.sample(20, np.random.default_rng(0))[:, 2] == 0).all()
