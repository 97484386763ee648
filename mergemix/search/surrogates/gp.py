"""Gaussian process on warped shares: the surrogate of Bayesian optimisation, and the strongest single one.

What a domain adds to a score grows fast with its first percents and slowly after: losses fall about with the logarithm
of the tokens seen. So the process lives on u_k = w_k log(1 + x_k / e) (scaled to 0..w_k), where e, the share from which
on a domain counts, and the weights w_k of the domains are learnt. Large e makes u linear in the shares, e of some
percent makes it much like their square roots (the Hellinger geometry). The covariance of two mixtures is

    constant + trend^2 u.u' + amplitude^2 Matern52(|u - u'| / length)

and a score adds its own noise_var and a nugget. Hyperparameters maximise the marginal likelihood times the priors below
(Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, chapter 5), with analytic gradients; the priors
shrink the w_k towards each other, without which 40 points cannot carry 17 of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Self

import numpy as np

from mergemix.search.surrogates.base import Prediction, Surrogate, checked

# Of the logarithms of the hyperparameters, for scores of standard deviation 1: (start = prior mean, prior sd).
AMPLITUDE = (-0.5, 1.5)
TREND = (-1.2, 1.5)
LENGTH = (0.0, 1.0)
SHARE = (-4.5, 1.5)
NUGGET = (-2.0, 1.5)
WEIGHT = (0.0, 0.7)
REACH = 4.0  # prior standard deviations that the optimiser may go from the mean
CONSTANT_VAR = 4.0
JITTER = 1e-8
NUM_GLOBAL = 5
MANY = 150  # with more points than this, hyperparameters are first fitted on so many of them
ITERATIONS, FINAL_ITERATIONS, FOLD_ITERATIONS = 100, 12, 20
FOLDS, MORE_FOLDS, FEW = 5, 10, 80


class Kernel(NamedTuple):
    """Hyperparameters in natural units. weights: (K,)."""

    amplitude: float
    trend: float
    length: float
    share: float
    nugget: float
    weights: np.ndarray

    @classmethod
    def of(cls, theta: np.ndarray) -> Kernel:
        values = np.exp(theta)
        return cls(*(float(value) for value in values[:NUM_GLOBAL]), values[NUM_GLOBAL:])

    def warped(self, shares: np.ndarray) -> np.ndarray:
        """(n, K): from 0 at no share to the domain's weight at all of it."""
        return self.weights * np.log1p(np.maximum(shares, 0.0) / self.share) / math.log1p(1 / self.share)

    def covariance(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Of the surface, (n, m), between warped shares (n, K) and (m, K)."""
        scaled = np.sqrt(5 * squared_distances(u, v)) / self.length
        matern = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
        return CONSTANT_VAR + self.trend**2 * (u @ v.T) + self.amplitude**2 * matern

    def variance(self, u: np.ndarray) -> np.ndarray:
        """The diagonal of covariance(u, u)."""
        return CONSTANT_VAR + self.trend**2 * (u**2).sum(axis=1) + self.amplitude**2


def squared_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(n, m), never negative."""
    cross = (u**2).sum(axis=1)[:, None] + (v**2).sum(axis=1)[None, :] - 2 * (u @ v.T)
    return np.maximum(cross, 0.0)


class GaussianProcess(Surrogate):
    """See the module. After `fit`: `kernel`, `num_points`; `loo` holds leave-one-out predictions of the scores."""

    name = "gp"

    def needs(self, k: int) -> int:
        return 3

    @property
    def title(self) -> str:
        return "a Gaussian process on warped shares"

    def _fit(self, shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None, seed: int) -> None:
        self._centre, self._scale = float(scores.mean()), float(scores.std())
        self._known_noise = None if noise_var is None else noise_var / self._scale**2
        known = np.zeros(len(scores)) if self._known_noise is None else self._known_noise
        standard = (scores - self._centre) / self._scale
        self.theta = _fitted_theta(shares, standard, known, seed)
        self.kernel = Kernel.of(self.theta)
        self._inflation = 1.0
        self._hold(shares, standard, known)
        self._inflation = self._calibrated(seed)

    def _calibrated(self, seed: int) -> float:
        """By how much the intervals must widen: the likelihood takes its best hyperparameters for the true ones.

        Folds are left out and predicted with hyperparameters that have not seen them.
        """
        shares, standard, known = self.shares, self._standard, self._known
        n = len(standard)
        start = (self.theta + _priors(shares.shape[1])[0]) / 2
        chosen = np.random.default_rng((seed, 1)).permutation(n)[:MANY]
        off = np.empty(len(chosen))
        count = MORE_FOLDS if n <= FEW else FOLDS
        for fold in range(count):
            held = np.arange(len(chosen)) % count == fold
            if not held.any():
                continue
            kept = chosen[~held]
            other = object.__new__(type(self))
            other.__dict__.update(self.__dict__)
            other.kernel = Kernel.of(_best_theta(start, shares[kept], standard[kept], known[kept], FOLD_ITERATIONS))
            other._hold(shares[kept], standard[kept], known[kept])
            found = other._predict(shares[chosen[held]])
            total = np.sqrt(found.sd**2 + (self._scale * other.kernel.nugget) ** 2 + self._scale**2 * known[chosen[held]])
            off[held] = (self._centre + self._scale * standard[chosen[held]] - found.mean) / total
        return float(np.clip(np.sqrt(np.mean(off**2)), 1.0, 3.0))

    def _hold(self, shares: np.ndarray, standard: np.ndarray, known: np.ndarray) -> None:
        from scipy.linalg import cho_solve, cholesky

        self.shares, self._standard, self._known = shares, standard, known
        self._warped = self.kernel.warped(shares)
        noisy = self.kernel.covariance(self._warped, self._warped)
        noisy[np.diag_indices_from(noisy)] += self.kernel.nugget**2 + known + JITTER
        self._root = cholesky(noisy, lower=True)
        self._solved = cho_solve((self._root, True), standard)

    @property
    def num_points(self) -> int:
        return len(self.shares)

    def condition(self, shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None = None) -> Self:
        """The same process given more measurements (m, K), (m,); hyperparameters stay. For points that are pending."""
        shares, scores, noise_var = checked(shares, scores, noise_var)
        more = object.__new__(type(self))
        more.__dict__.update(self.__dict__)
        if self._stand_in is not None:
            return more
        extra = np.zeros(len(scores)) if noise_var is None else noise_var / self._scale**2
        standard = (scores - self._centre) / self._scale
        more._hold(
            np.concatenate([self.shares, shares]),
            np.concatenate([self._standard, standard]),
            np.concatenate([self._known, extra]),
        )
        return more

    def _predict(self, shares: np.ndarray) -> Prediction:
        from scipy.linalg import solve_triangular

        u = self.kernel.warped(shares)
        cross = self.kernel.covariance(u, self._warped)
        reduced = solve_triangular(self._root, cross.T, lower=True, check_finite=False)
        variance = np.maximum(self.kernel.variance(u) - (reduced**2).sum(axis=0), JITTER)
        mean = self._centre + self._scale * (cross @ self._solved)
        sd = self._inflation * self._scale * np.sqrt(variance)
        return Prediction(mean, sd, np.full(len(u), self._noise_sd()), self._freedom())

    def _noise_sd(self) -> float:
        measured = 0.0 if self._known_noise is None else float(self._known_noise.mean())
        return self._inflation * self._scale * math.sqrt(self.kernel.nugget**2 + measured)

    def _freedom(self) -> float:
        return float(max(self.num_points - 3, 2))

    def covariance(self, shares: np.ndarray) -> np.ndarray:
        """Joint posterior covariance of the surface at (m, K): (m, m), in squared units of the scores."""
        from scipy.linalg import solve_triangular

        shares = np.asarray(shares, np.float64)
        if self._stand_in is not None:
            return np.diag(self._stand_in.predict(shares).sd ** 2)
        u = self.kernel.warped(shares)
        reduced = solve_triangular(
            self._root, self.kernel.covariance(self._warped, u), lower=True, check_finite=False
        )
        joint = self.kernel.covariance(u, u) - reduced.T @ reduced
        return (self._inflation * self._scale) ** 2 * (joint + joint.T) / 2

    def sample(self, shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draws of the surface at (m, K) from the joint posterior: (count, m)."""
        mean = self.predict(shares).mean
        values, vectors = np.linalg.eigh(self.covariance(shares))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        return mean + rng.standard_normal((count, len(mean))) @ root.T


def _priors(k: int) -> tuple[np.ndarray, np.ndarray]:
    """(means, sds) of the logarithms of the hyperparameters, in the order of Kernel."""
    both = np.array([AMPLITUDE, TREND, LENGTH, SHARE, NUGGET, *[WEIGHT] * k])
    return both[:, 0], both[:, 1]


def _fitted_theta(shares: np.ndarray, scores: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """Logarithms of the hyperparameters with the highest posterior density; from a subset first where there are many."""
    start, iterations = _priors(shares.shape[1])[0], ITERATIONS
    if len(scores) > MANY:
        some = np.sort(np.random.default_rng(seed).permutation(len(scores))[:MANY])
        start = _best_theta(start, shares[some], scores[some], known[some], ITERATIONS)
        iterations = FINAL_ITERATIONS
    return _best_theta(start, shares, scores, known, iterations)


def _best_theta(
    start: np.ndarray, shares: np.ndarray, scores: np.ndarray, known: np.ndarray, iterations: int
) -> np.ndarray:
    from scipy.optimize import minimize

    mean, sd = _priors(shares.shape[1])
    bounds = list(zip(mean - REACH * sd, mean + REACH * sd, strict=True))
    found = minimize(
        negative_log_posterior, start, (shares, scores, known), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": iterations},
    )  # fmt: skip
    return found.x


def negative_log_posterior(
    theta: np.ndarray, shares: np.ndarray, scores: np.ndarray, known: np.ndarray
) -> tuple[float, np.ndarray]:
    """(value, gradient (5 + K,)) of minus the log of marginal likelihood times priors, up to a constant."""
    from scipy.linalg import LinAlgError, cho_solve, cholesky

    n, k = shares.shape
    kernel = Kernel.of(theta)
    u = kernel.warped(shares)
    scaled = np.sqrt(5 * squared_distances(u, u)) / kernel.length
    decay = np.exp(-scaled)
    matern = (1 + scaled + scaled**2 / 3) * decay
    inner = u @ u.T
    total = CONSTANT_VAR + kernel.trend**2 * inner + kernel.amplitude**2 * matern
    total[np.diag_indices(n)] += kernel.nugget**2 + known + JITTER
    mean, sd = _priors(k)
    try:
        root = cholesky(total, lower=True, check_finite=False)
    except LinAlgError:
        return 1e10, np.zeros_like(theta)
    inverse = cho_solve((root, True), np.eye(n), check_finite=False)
    solved = inverse @ scores
    off = (theta - mean) / sd
    value = 0.5 * scores @ solved + np.log(np.diag(root)).sum() + 0.5 * off @ off
    # d value / d covariance; what follows is its product with d covariance / d each hyperparameter.
    slope = 0.5 * (inverse - np.outer(solved, solved))
    # d Matern52 / d (squared distance), with r = distance / length: -5/6 (1 + sqrt(5) r) exp(-sqrt(5) r) / length^2
    by_distance = slope * kernel.amplitude**2 * (-5 / 6) * (1 + scaled) * decay / kernel.length**2
    # d value / d u (n, K), from both terms
    by_u = 4 * (by_distance.sum(axis=1)[:, None] * u - by_distance @ u) + 2 * kernel.trend**2 * (slope @ u)
    gradient = np.empty_like(theta)
    gradient[0] = 2 * kernel.amplitude**2 * (slope * matern).sum()
    gradient[1] = 2 * kernel.trend**2 * (slope * inner).sum()
    gradient[2] = -2 * (by_distance * squared_distances(u, u)).sum()
    gradient[3] = (by_u * _by_share(kernel, shares, u)).sum()
    gradient[4] = 2 * kernel.nugget**2 * np.trace(slope)
    gradient[NUM_GLOBAL:] = (by_u * u).sum(axis=0)
    return float(value), gradient + off / sd


def _by_share(kernel: Kernel, shares: np.ndarray, u: np.ndarray) -> np.ndarray:
    """d u / d log(share), (n, K)."""
    whole = math.log1p(1 / kernel.share)
    top = -kernel.weights * (shares / (kernel.share + shares)) / whole
    return top + u / (whole * (1 + kernel.share))
