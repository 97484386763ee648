"""LightGBM, the paper's surrogate (arXiv 2601.17858): boosted regression trees on the shares."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate

# Fit for 40 points: trees of few leaves, each of few points, and an average over bagged seeds.
PARAMETERS: dict[str, Any] = {
    "objective": "regression",
    "num_leaves": 4,
    "min_data_in_leaf": 3,
    "min_sum_hessian_in_leaf": 0.0,
    "learning_rate": 0.05,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "feature_fraction": 0.8,
    "verbose": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
}
ROUNDS = 300
SEEDS, MANY = 2, 250  # one seed where there are more points than that


class LightGBM(Surrogate):
    """Its spread is that of points left out, the same everywhere: trees know no distance."""

    name = "lightgbm"
    title = "LightGBM"

    def needs(self, k: int) -> int:
        return 10

    def _fit(self, data: Data, seed: int) -> None:
        seeds = SEEDS if len(data.scores) <= MANY else 1
        self._boosters = [_trained(data, 1000 * seed + number) for number in range(seeds)]
        self._num = len(data.scores)
        # Without knowledge, half the variance of what is missed counts as noise; the size is cross-validated.
        spread = float(data.scores.std())
        noise = data.mean_noise_var if data.noise_var is not None else spread**2 / 2
        self._noise_sd = math.sqrt(min(noise, spread**2))
        self._sd = math.sqrt(spread**2 - self._noise_sd**2)

    def _predict(self, shares: np.ndarray) -> Prediction:
        ones = np.ones(len(shares))
        mean = np.mean([booster.predict(shares) for booster in self._boosters], axis=0)
        return Prediction(mean, self._sd * ones, self._noise_sd * ones, self._freedom())

    def _freedom(self) -> float:
        return float(max(self._num // 2, 2))


def _trained(data: Data, seed: int) -> Any:
    import lightgbm

    shares, scores, noise_var = data
    weights = None if noise_var is None else 1 / (noise_var + 0.1 * scores.var())
    table = lightgbm.Dataset(shares, scores, weight=weights, params={"verbose": -1, "min_data_in_bin": 1})
    return lightgbm.train({**PARAMETERS, "seed": seed}, table, ROUNDS)
