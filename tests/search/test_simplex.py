"""Coordinates, projection and the grid of proposals."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.simplex import UNITS, basis, lattice, project, snap, start_points, uniform_sample

sizes = st.integers(2, 12)
points = sizes.flatmap(lambda k: arrays(np.float64, k, elements=st.floats(-5, 5, width=32)))


def names(k: int) -> tuple[str, ...]:
    return tuple(f"domain{i}" for i in range(k))


def units_of(mixture: Mixture) -> list[int]:
    """The whole ten-thousandths of a snapped mixture; fails when a weight is anything else."""
    units = [round(weight * UNITS) for weight in mixture.weights]
    assert mixture.weights == tuple(n / UNITS for n in units)
    return units


@given(sizes)
def test_coordinates_are_isometric_and_keep_the_sum(k):
    columns = basis(k)
    np.testing.assert_allclose(columns.T @ columns, np.eye(k - 1), atol=1e-14)
    np.testing.assert_allclose(columns.sum(axis=0), 0.0, atol=1e-14)


@given(points)
def test_projection_is_the_nearest_point_of_the_simplex(shares):
    projected = project(shares)
    assert (projected >= 0).all()
    assert projected.sum() == pytest.approx(1.0, abs=1e-12)
    # The nearest point p of a convex set is the one with (x - p).(y - p) <= 0 for all its points y; of a
    # simplex, for all its vertices.
    assert ((shares - projected) @ (np.eye(len(shares)) - projected).T <= 1e-9).all()


@pytest.mark.parametrize("far", [1e3, 1e9, 1e300])
def test_projection_is_exact_far_away(far):
    np.testing.assert_array_equal(project(np.array([far, -far, 0.0])), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(project(np.array([far, far, -far])), [0.5, 0.5, 0.0])


def test_projection_keeps_mixtures_and_reaches_faces_and_vertices():
    np.testing.assert_allclose(project(np.array([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5], atol=1e-15)
    np.testing.assert_array_equal(project(np.array([0.75, 0.75, -0.5])), [0.5, 0.5, 0.0])
    np.testing.assert_array_equal(project(np.array([2.0, -0.5, -0.5])), [1.0, 0.0, 0.0])


@given(points)
def test_snapping_gives_whole_ten_thousandths_that_sum_to_one(shares):
    mixture = snap(names(len(shares)), project(shares))
    assert mixture.base_weight == 0.0
    if mixture != Mixture.uniform(mixture.names):
        units = units_of(mixture)
        assert sum(units) == UNITS
        assert min(units) >= 0
    assert np.abs(np.array(mixture.weights) - project(shares)).max() < 1 / UNITS


@given(points)
def test_snapping_is_idempotent_and_survives_text(shares):
    mixture = snap(names(len(shares)), project(shares))
    assert snap(mixture.names, mixture.weights) == mixture
    assert snap(mixture.names, json.loads(json.dumps(mixture.weights))) == mixture
    assert all(len(str(weight)) <= 6 or weight == 1 / len(shares) for weight in mixture.weights)


@given(sizes)
def test_the_cell_of_the_centroid_is_uniform(k):
    assert snap(names(k), np.full(k, 1 / k)) == Mixture.uniform(names(k))
    nudge = np.zeros(k)
    nudge[0], nudge[-1] = 1e-9, -1e-9
    assert snap(names(k), np.full(k, 1 / k) + nudge) == Mixture.uniform(names(k))


@given(sizes, st.data())
def test_snapping_keeps_vertices(k, data):
    name = data.draw(st.sampled_from(names(k)))
    vertex = Mixture.one_hot(names(k), name)
    assert snap(names(k), vertex.weights) == vertex


@pytest.mark.parametrize("shares", [[0.5, 0.4], [0.6, 0.6], [1.2, -0.2], [math.nan, 1.0]])
def test_snapping_refuses_what_is_not_a_mixture(shares):
    with pytest.raises(ValueError, match="sum to 1"):
        snap(("a", "b"), shares)


@given(st.integers(1, 5), st.integers(1, 8))
def test_the_lattice_is_complete_and_distinct(k, steps):
    mixtures = list(lattice(names(k), steps))
    assert len(set(mixtures)) == len(mixtures) == math.comb(steps + k - 1, k - 1)
    assert set(mixtures) >= {Mixture.one_hot(names(k), name) for name in names(k)}


def test_samples_are_uniform_on_the_simplex():
    rng = np.random.default_rng(0)
    samples = np.array([uniform_sample(names(4), rng).weights for _ in range(4000)])
    np.testing.assert_allclose(samples.mean(axis=0), 0.25, atol=0.02)
    np.testing.assert_allclose(samples.var(axis=0), 3 / 80, atol=0.005)  # Dirichlet(1): (k-1)/(k^2 (k+1))


def test_start_points_come_in_order_without_duplicates():
    three = names(3)
    corners = [Mixture.one_hot(three, name) for name in three]
    uniform = Mixture.uniform(three)
    prior = Mixture(three, (0.5, 0.25, 0.25))
    assert start_points(three) == [uniform, *corners]
    assert start_points(three, prior) == [uniform, *corners, prior]
    assert start_points(three, corners[1]) == [uniform, *corners]
    assert start_points(three, Mixture(three, (0.33333, 0.33333, 0.33334))) == [uniform, *corners]


@pytest.mark.parametrize(
    ("prior", "rule"),
    [
        (Mixture(("a", "c"), (0.5, 0.5)), "must name the experts"),
        (Mixture(("b", "a"), (0.5, 0.5)), "must name the experts"),
        (Mixture(("a", "b"), (0.5, 0.4)), "sum to 1"),
        (Mixture(("a", "b"), (1.5, -0.5)), ">= 0"),
    ],
)
def test_a_prior_that_is_not_a_mixture_of_the_experts_is_refused(prior, rule):
    with pytest.raises(ConfigError, match=rule):
        start_points(("a", "b"), prior)
