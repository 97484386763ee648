"""LightGBM, the paper's surrogate (arXiv 2601.17858): boosted regression trees on the shares."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergemix.search.surrogates.base import Prediction, Surrogate
from mergemix.search.surrogates.folds import out_of_fold

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
SEEDS = 3
FOLDS = 5


class LightGBM(Surrogate):
    """Its spread is that of points left out in folds, the same everywhere: trees know no distance."""

    name = "lightgbm"

    def needs(self, k: int) -> int:
        return 10

    @property
    def title(self) -> str:
        return "LightGBM"

    def _fit(self, shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None, seed: int) -> None:
        self._boosters = _trained(shares, scores, noise_var, seed)
        self.loo = out_of_fold(
            lambda kept, held: _average(
                _trained(
                    shares[kept], scores[kept], None if noise_var is None else noise_var[kept], seed
                ),
                shares[held],
            ),
            len(scores),
            FOLDS,
            seed,
        )
        self._spread = float(np.sqrt(np.mean((scores - self.loo) ** 2)))
        known = 0.0 if noise_var is None else float(noise_var.mean())
        self._noise_sd = float(np.sqrt(min(known, self._spread**2))) if known else self._spread / 2
        self._freedom = float(max(len(scores) // 2, 2))

    def _predict(self, shares: np.ndarray) -> Prediction:
        ones = np.ones(len(shares))
        sd = float(np.sqrt(max(self._spread**2 - self._noise_sd**2, 0.0)))
        return Prediction(
            _average(self._boosters, shares), sd * ones, self._noise_sd * ones, self._freedom
        )


def _trained(shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None, seed: int) -> list[Any]:
    import lightgbm

    weights = None if noise_var is None else 1 / (noise_var + 0.1 * scores.var())
    data = lightgbm.Dataset(
        shares, scores, weight=weights, params={"verbose": -1, "min_data_in_bin": 1}, free_raw_data=False
    )
    return [
        lightgbm.train({**PARAMETERS, "seed": 1000 * seed + number}, data, ROUNDS) for number in range(SEEDS)
    ]


def _average(boosters: list[Any], shares: np.ndarray) -> np.ndarray:
    return np.mean([booster.predict(shares) for booster in boosters], axis=0)
