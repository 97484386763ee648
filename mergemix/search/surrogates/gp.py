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
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate, checked

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
MANY, MOST = (
    120,
    300,
)  # with more points than MANY, hyperparameters are fitted to so many of them, then to MOST of them
ITERATIONS, FINAL_ITERATIONS, FOLD_ITERATIONS = 80, 6, 20
BLOCK = 1 << 16  # covariances that are computed at once for predictions


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
        amplitude, trend, length, share, nugget = values[:NUM_GLOBAL].tolist()
        return cls(amplitude, trend, length, share, nugget, values[NUM_GLOBAL:])

    def warped(self, shares: np.ndarray) -> np.ndarray:
        """(n, K): from 0 at no share to the domain's weight at all of it."""
        return self.weights * np.log1p(np.maximum(shares, 0.0) / self.share) / math.log1p(1 / self.share)

    def covariance(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Of the surface, (n, m), between warped shares (n, K) and (m, K)."""
        matern, _, _ = self.matern(u, v)
        matern *= self.amplitude**2
        matern += CONSTANT_VAR
        matern += (self.trend**2 * u) @ v.T
        return matern

    def matern(self, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(Matern52, r, exp(-r)), each (n, m), with r = sqrt(5) |u - v| / length."""
        unit = math.sqrt(5) / self.length
        scaled = squared_distances(unit * u, unit * v)
        # In place: new memory and passes over it are what these matrices cost.
        np.sqrt(scaled, out=scaled)
        decay = np.negative(scaled)
        np.exp(decay, out=decay)
        matern = scaled / 3
        matern += 1
        matern *= scaled
        matern += 1
        matern *= decay
        return matern, scaled, decay

    def variance(self, u: np.ndarray) -> np.ndarray:
        """The diagonal of covariance(u, u)."""
        return CONSTANT_VAR + self.trend**2 * (u**2).sum(axis=1) + self.amplitude**2


def squared_distances(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(n, m), never negative."""
    found = (-2 * u) @ v.T
    found += (u**2).sum(axis=1)[:, None]
    found += (v**2).sum(axis=1)
    return np.maximum(found, 0.0, out=found)


class GaussianProcess(Surrogate):
    """See the module. After `fit`: `kernel`, `num_points`."""

    name = "gp"
    title = "a Gaussian process on warped shares"

    def needs(self, k: int) -> int:
        return 3

    def _fit(self, data: Data, seed: int) -> None:
        self._centre, self._scale = float(data.scores.mean()), float(data.scores.std())
        self._measured = data.mean_noise_var / self._scale**2
        parts = self._parts(data)
        self.theta = _fitted_theta(*parts, seed)
        self.kernel = Kernel.of(self.theta)
        self._hold(*parts)

    def _parts(self, data: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shares, scores, known noise variance), the last two standardised."""
        known = np.zeros(len(data.scores)) if data.noise_var is None else data.noise_var / self._scale**2
        return data.shares, (data.scores - self._centre) / self._scale, known

    def _refitted(self, data: Data, seed: int) -> Surrogate:
        """Hyperparameters are sought again from halfway to where every search for them starts."""
        if self._stand_in is not None:
            return super()._refitted(data, seed)
        other = type(self)()
        other._centre, other._scale, other._measured = self._centre, self._scale, self._measured
        parts = other._parts(data)
        start = (self.theta + _priors(data.shares.shape[1])[0]) / 2
        other.theta = _best_theta(start, _some(parts, seed), FOLD_ITERATIONS)
        other.kernel = Kernel.of(other.theta)
        other._hold(*parts)
        return other

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
        more = object.__new__(type(self))
        more.__dict__.update(self.__dict__)
        if self._stand_in is None:
            added = self._parts(Data(*checked(shares, scores, noise_var)))
            held = (self.shares, self._standard, self._known)
            more._hold(*(np.concatenate(pair) for pair in zip(held, added, strict=True)))
        return more

    def _predict(self, shares: np.ndarray) -> Prediction:
        from scipy.linalg import solve_triangular

        mean, variance = np.empty(len(shares)), np.empty(len(shares))
        for rows in self._blocks(len(shares)):
            u = self.kernel.warped(shares[rows])
            cross = self.kernel.covariance(u, self._warped)
            reduced = solve_triangular(self._root, cross.T, lower=True, check_finite=False)
            variance[rows] = self.kernel.variance(u) - (reduced**2).sum(axis=0)
            mean[rows] = self._centre + self._scale * (cross @ self._solved)
        noise_sd = self._scale * math.sqrt(self.kernel.nugget**2 + self._measured)
        sd = self._scale * np.sqrt(np.maximum(variance, JITTER))
        return Prediction(mean, sd, np.full(len(shares), noise_sd), self._freedom())

    def _mean(self, shares: np.ndarray) -> np.ndarray:
        kernel = self.kernel
        u = kernel.warped(shares)
        # The constant and the trend need no matrix.
        found = CONSTANT_VAR * self._solved.sum() + u @ (kernel.trend**2 * (self._solved @ self._warped))
        for rows in self._blocks(len(shares)):
            matern, _, _ = kernel.matern(u[rows], self._warped)
            found[rows] += kernel.amplitude**2 * (matern @ self._solved)
        return self._centre + self._scale * found

    def _blocks(self, count: int) -> list[slice]:
        """`count` mixtures in parts, so that matrices stay in the processor's cache: twice as fast."""
        size = max(16, BLOCK // self.num_points)
        return [slice(begin, begin + size) for begin in range(0, count, size)]

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
    """Logarithms of the hyperparameters with the highest posterior density; of many points, from a subset first."""
    parts = (shares, scores, known)
    theta = _best_theta(_priors(shares.shape[1])[0], _some(parts, seed), ITERATIONS)
    if len(scores) <= MANY:
        return theta
    return _best_theta(theta, _some(parts, seed, MOST), FINAL_ITERATIONS)


def _some(parts: Sequence[np.ndarray], seed: int, count: int = MANY) -> list[np.ndarray]:
    """`count` of the points, drawn at random, or all."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(parts[0]))[:count])
    return [part[chosen] for part in parts]


def _best_theta(start: np.ndarray, parts: Sequence[np.ndarray], iterations: int) -> np.ndarray:
    """parts: (shares, scores, known), as of `negative_log_posterior`."""
    from scipy.optimize import minimize

    mean, sd = _priors(parts[0].shape[1])
    bounds = list(zip(mean - REACH * sd, mean + REACH * sd, strict=True))
    found = minimize(
        negative_log_posterior, start, tuple(parts), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": iterations},
    )  # fmt: skip
    return found.x


def negative_log_posterior(
    theta: np.ndarray, shares: np.ndarray, scores: np.ndarray, known: np.ndarray
) -> tuple[float, np.ndarray]:
    """(value, gradient (5 + K,)) of minus the log of marginal likelihood times priors, up to a constant."""
    from scipy.linalg import LinAlgError, cholesky
    from scipy.linalg.lapack import dpotri

    n, k = shares.shape
    kernel = Kernel.of(theta)
    u = kernel.warped(shares)
    matern, scaled, decay = kernel.matern(u, u)
    matern *= kernel.amplitude**2
    total = (kernel.trend**2 * u) @ u.T
    total += matern
    total += CONSTANT_VAR
    total[np.diag_indices(n)] += kernel.nugget**2 + known + JITTER
    mean, sd = _priors(k)
    try:
        root = cholesky(total.T, lower=True, check_finite=False, overwrite_a=True)
    except LinAlgError:
        return 1e10, np.zeros_like(theta)
    half_log_det = np.log(np.diag(root)).sum()
    lower, _ = dpotri(root, lower=1, overwrite_c=1)  # of the inverse, the lower half; the rest is 0
    inverse = np.add(
        lower, lower.T, order="C"
    )  # as everything it will be multiplied with, element by element
    inverse[np.diag_indices(n)] /= 2
    solved = inverse @ scores
    off = (theta - mean) / sd
    value = 0.5 * scores @ solved + half_log_det + 0.5 * off @ off
    # d value / d covariance; what follows is its product with d covariance / d each hyperparameter.
    slope = inverse
    slope -= np.multiply(solved[:, None], solved, out=lower.T)
    slope *= 0.5
    trended = slope @ u
    gradient = np.empty_like(theta)
    gradient[0] = 2 * np.vdot(slope, matern)
    gradient[1] = 2 * kernel.trend**2 * np.vdot(trended, u)
    gradient[4] = 2 * kernel.nugget**2 * np.trace(slope)
    # slope * d covariance / d (squared distance): d Matern52 is -5/6 (1 + r) exp(-r) / length^2, r as in `matern`
    by_distance = slope
    decay *= -5 / 6 * (kernel.amplitude / kernel.length) ** 2
    by_distance *= decay
    np.add(scaled, 1, out=decay)
    by_distance *= decay
    np.square(scaled, out=scaled)
    gradient[2] = -2 * kernel.length**2 / 5 * np.vdot(by_distance, scaled)
    # d value / d u (n, K), from both terms
    by_u = 4 * (by_distance.sum(axis=1)[:, None] * u - by_distance @ u) + 2 * kernel.trend**2 * trended
    gradient[3] = (by_u * _by_share(kernel, shares, u)).sum()
    gradient[NUM_GLOBAL:] = (by_u * u).sum(axis=0)
    return float(value), gradient + off / sd


def _by_share(kernel: Kernel, shares: np.ndarray, u: np.ndarray) -> np.ndarray:
    """d u / d log(share), (n, K)."""
    whole = math.log1p(1 / kernel.share)
    top = -kernel.weights * (shares / (kernel.share + shares)) / whole
    return top + u / (whole * (1 + kernel.share))
