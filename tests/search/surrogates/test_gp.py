"""The Gaussian process against its definition."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from mergemix.search.surrogates import GaussianProcess
from mergemix.search.surrogates.gp import JITTER, Kernel, negative_log_posterior


def data(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(k, 0.5), n)
    return shares, np.log(shares + 0.05) @ np.linspace(1, 2, k) + 0.1 * rng.normal(size=n)


@pytest.mark.parametrize("k", [2, 5])
def test_gradient(k: int) -> None:
    shares, scores = data(15, k)
    shares[0] = np.eye(k)[0]  # zeros and ones too
    known = np.linspace(0, 0.3, 15)
    rng = np.random.default_rng(k)
    theta = np.append([-0.5, -1.2, 0.0, -3.5, -1.5], np.zeros(k)) + 0.4 * rng.normal(size=5 + k)
    _, gradient = negative_log_posterior(theta, shares, scores, known)
    numeric = approx_fprime(theta, lambda t: negative_log_posterior(t, shares, scores, known)[0], 1e-6)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-3)


def test_posterior_is_that_of_the_textbook() -> None:
    shares, scores = data(25, 3)
    model = GaussianProcess().fit(shares, scores)
    more, _ = data(8, 3, seed=1)
    u, v = model.kernel.warped(shares), model.kernel.warped(more)
    noisy = model.kernel.covariance(u, u) + (model.kernel.nugget**2 + JITTER) * np.eye(25)
    cross = model.kernel.covariance(v, u)
    standard = (scores - scores.mean()) / scores.std()
    found = model.predict(more)
    np.testing.assert_allclose(
        found.mean, scores.mean() + scores.std() * cross @ np.linalg.solve(noisy, standard)
    )
    joint = model.kernel.covariance(v, v) - cross @ np.linalg.solve(noisy, cross.T)
    scale = found.sd[0] ** 2 / joint[0, 0]
    np.testing.assert_allclose(model.covariance(more), scale * joint, rtol=1e-6, atol=1e-9 * scale)
    np.testing.assert_allclose(found.sd**2, np.diag(model.covariance(more)), rtol=1e-6)


def test_a_large_share_from_which_domains_count_is_linear() -> None:
    kernel = Kernel(1.0, 1.0, 1.0, 1e6, 0.1, np.array([1.0, 2.0]))
    shares = np.array([[0.25, 0.75], [1.0, 0.0]])
    np.testing.assert_allclose(kernel.warped(shares), shares * [1.0, 2.0], rtol=1e-5)


def test_samples_follow_the_joint_posterior() -> None:
    model = GaussianProcess().fit(*data(20, 3))
    more, _ = data(4, 3, seed=2)
    draws = model.sample(more, 20_000, np.random.default_rng(0))
    assert draws.shape == (20_000, 4)
    covariance = model.covariance(more)
    np.testing.assert_allclose(
        draws.mean(axis=0), model.predict(more).mean, atol=0.05 * covariance.max() ** 0.5
    )
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.05 * covariance.max())


def test_conditioning_keeps_hyperparameters_and_narrows() -> None:
    shares, scores = data(30, 4)
    model = GaussianProcess().fit(shares, scores)
    new = np.array([[0.05, 0.9, 0.05, 0.0]])
    before = model.predict(new)
    after = model.condition(new, before.mean + before.sd)
    assert np.array_equal(after.theta, model.theta)
    assert after.num_points == 31
    assert model.num_points == 30
    found = after.predict(new)
    assert found.sd[0] < before.sd[0]
    assert before.mean[0] < found.mean[0] < before.mean[0] + before.sd[0]
    # A measurement known to be worthless changes next to nothing.
    worthless = model.condition(new, before.mean + 10 * before.sd, np.array([1e8 * scores.var()]))
    np.testing.assert_allclose(worthless.predict(new).mean, before.mean, rtol=1e-5)


def test_uncertainty_grows_away_from_the_data() -> None:
    rng = np.random.default_rng(0)
    shares = np.abs(np.array([0.5, 0.5, 0.0]) + 0.05 * rng.normal(size=(20, 3)))
    shares /= shares.sum(axis=1, keepdims=True)
    model = GaussianProcess().fit(shares, shares @ [1.0, 2.0, 3.0] + 0.01 * rng.normal(size=20))
    found = model.predict(np.array([[0.5, 0.48, 0.02], [0.0, 0.0, 1.0]]))
    assert found.sd[1] > 3 * found.sd[0]


def test_with_hardly_any_points_it_can_still_be_conditioned_and_sampled() -> None:
    shares, scores = data(2, 3)
    model = GaussianProcess().fit(shares, scores)
    assert model.warnings
    more, values = data(3, 3, seed=5)
    assert model.condition(more, values).sample(more, 7, np.random.default_rng(0)).shape == (7, 3)
