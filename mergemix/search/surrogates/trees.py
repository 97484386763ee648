"""LightGBM: as in the paper, one regression with the library's own trees; and what predicts better from few points."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate

COMMON: dict[str, Any] = {
    "objective": "regression",
    "verbose": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
}
MANY = 250  # points; with more than that one seed is enough


class LightGBM(Surrogate):
    """The paper's surrogate (arXiv 2601.17858): the library's settings, but for leaves of five points.

    With the library's own least of 20 points a leaf, 40 points are split once. Of 2, 3, 5 and 8, five was best on
    held-out mixtures. Its spread is that of points left out, the same everywhere: trees know no distance.
    """

    name = "lightgbm"
    title = "LightGBM"
    parameters: ClassVar[dict[str, Any]] = {"min_data_in_leaf": 5}
    rounds: ClassVar[int] = 100
    seeds: ClassVar[int] = 1

    def needs(self, k: int) -> int:
        return 10

    def _fit(self, data: Data, seed: int) -> None:
        seeds = self.seeds if len(data.scores) <= MANY else 1
        self._boosters = [self._trained(data, 1000 * seed + number) for number in range(seeds)]
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

    def _trained(self, data: Data, seed: int) -> Any:
        import lightgbm

        shares, scores, noise_var = data
        weights = None
        if noise_var is not None:
            weights = 1 / (noise_var + 0.1 * scores.var())
            weights /= weights.mean()  # the least of a leaf means the same, whatever the unit of the scores
        table = lightgbm.Dataset(shares, scores, weight=weights, params={"verbose": -1, "min_data_in_bin": 1})
        settings = {**COMMON, **self.parameters, "seed": seed}
        # What it would turn into text and back otherwise, for nothing.
        return lightgbm.train(settings, table, self.rounds, keep_training_booster=True)


class BaggedTrees(LightGBM):
    """Trees of few leaves, each grown on some of the points and domains: better than the paper's from few points."""

    name = "trees"
    title = "bagged LightGBM trees"
    parameters: ClassVar[dict[str, Any]] = {
        "num_leaves": 4,
        "min_data_in_leaf": 3,
        # At 0, LightGBM counts a leaf of unequal weights wrongly, and fails where it turns out to be empty.
        "min_sum_hessian_in_leaf": 1e-3,
        "learning_rate": 0.05,
        "bagging_fraction": 0.7,
        "bagging_freq": 1,
        "feature_fraction": 0.8,
    }
    rounds: ClassVar[int] = 300
    seeds: ClassVar[int] = 2
