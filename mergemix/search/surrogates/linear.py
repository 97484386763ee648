"""The simplest surrogates, a constant and a plane; and the ridge regression that others use on their features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate

# Of the penalty, in units of the mean square of a feature times the number of points.
PENALTIES = 10.0 ** np.arange(-5.0, 1.6, 0.5)


@dataclass(frozen=True)
class Ridge:
    """Ridge regression with an intercept that is not penalised; the penalty is the best of PENALTIES left-one-out.

    directions: (d, r), whose outer product is the coefficients' covariance in units of the noise's variance. loo: (n,),
    each target predicted from the others. sd, freedom: of the residuals, from `loo`. Errors of unequal variance weigh
    by its inverse.
    """

    coefficients: np.ndarray
    intercept: float
    means: np.ndarray
    directions: np.ndarray
    sd: float
    noise_sd: float
    freedom: float
    loo: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray, targets: np.ndarray, noise_var: np.ndarray | None = None) -> Ridge:
        """features: (n, d). targets: (n,). noise_var: (n,), known variance of the targets' errors."""
        n = len(targets)
        weights = np.ones(n) if noise_var is None else _weights(targets, noise_var)
        weights = weights / weights.mean()
        means, centre = np.average(features, axis=0, weights=weights), np.average(targets, weights=weights)
        root = np.sqrt(weights)
        design, goal = (features - means) * root[:, None], (targets - centre) * root
        left, singular, right = np.linalg.svd(design, full_matrices=False)
        unit = (singular**2).sum() / max(len(singular), 1)
        penalties = PENALTIES * max(unit, 1e-12)
        kept = singular**2 / (singular**2 + penalties[:, None])  # (penalties, r), and so on
        # The intercept is a column as well: of the weighted ones, orthogonal to the design.
        leverage = kept @ (left**2).T + weights / n
        fitted = (kept * (left.T @ goal)) @ left.T
        left_out = (goal - fitted) / np.maximum(1 - leverage, 1e-6)
        errors = np.mean(left_out**2, axis=1)
        best = int(errors.argmin())
        error, penalty, left_out, kept = (
            float(errors[best]),
            float(penalties[best]),
            left_out[best],
            kept[best],
        )
        coefficients = right.T @ (singular / (singular**2 + penalty) * (left.T @ goal))
        freedom = max(n - 1 - float(kept.sum()), 1.0)
        residual = goal - design @ coefficients
        within = float(residual @ residual) / freedom
        directions = right.T / np.sqrt(singular**2 + penalty)
        return cls(
            coefficients, float(centre), means, directions, float(np.sqrt(error)), float(np.sqrt(min(within, error))),
            float(max(n - 1 - min(kept.sum(), n / 2), 1.0)), targets - left_out / root,
        )  # fmt: skip

    def predict(self, features: np.ndarray) -> Prediction:
        """The spread of a new measurement is that of the targets left out, more where the features are unusual."""
        off = features - self.means
        mean = self.intercept + off @ self.coefficients
        unusual = ((off @ self.directions) ** 2).sum(axis=1) + 1 / len(self.loo)
        sd = self.noise_sd * np.sqrt(unusual)
        missing = max(self.sd**2 - self.noise_sd**2, 0.0)
        return Prediction(mean, np.sqrt(sd**2 + missing / 2), np.full(len(mean), self.noise_sd), self.freedom)


def _weights(targets: np.ndarray, noise_var: np.ndarray) -> np.ndarray:
    """Inverse variances, where the model's own error counts as a tenth of the targets' variance beside the noise."""
    return 1 / (noise_var + 0.1 * max(float(targets.var()), 1e-300))


class Constant(Surrogate):
    """The mean of the scores, everywhere."""

    name = "constant"
    title = "the mean of the scores"

    def needs(self, k: int) -> int:
        return 1

    def _simpler(self, data: Data) -> None:
        return None

    def _fit(self, data: Data, seed: int) -> None:
        self._num, self._level = len(data.scores), float(data.scores.mean())
        spread = float(data.scores.std(ddof=1)) if self._num > 1 else 0.0
        # A single score says nothing of its spread: only the noise of measurement is left, if that is known.
        self._noise_sd = max(spread, math.sqrt(data.mean_noise_var))

    def _predict(self, shares: np.ndarray) -> Prediction:
        ones = np.ones(len(shares))
        sd = self._noise_sd / math.sqrt(self._num)
        return Prediction(self._level * ones, sd * ones, self._noise_sd * ones, self._freedom())

    def _freedom(self) -> float:
        return float(max(self._num - 1, 1))


class LinearRidge(Surrogate):
    """A plane over the shares."""

    name = "linear"
    title = "a plane (ridge regression on the shares)"

    def needs(self, k: int) -> int:
        return 4

    def _fit(self, data: Data, seed: int) -> None:
        self._ridge = Ridge.fit(*data)

    def _predict(self, shares: np.ndarray) -> Prediction:
        return self._ridge.predict(shares)

    def _freedom(self) -> float:
        return self._ridge.freedom
