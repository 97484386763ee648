"""Scheffé's quadratic mixture model, by ridge regression (J. R. Stat. Soc. B, 1958).

sum_k b_k x_k + sum_{j<k} b_jk x_j x_k. With K domains it has K (K + 1) / 2 terms, more than there are points
as a rule: the penalty makes up for it.
"""

from __future__ import annotations

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate
from mergemix.search.surrogates.linear import Ridge

PRODUCT_SCALES = (0.3, 1.0, 3.0)  # of the products beside the shares: the larger, the less they are penalised


class Scheffe(Surrogate):
    name = "scheffe"
    title = "Scheffé's quadratic"

    def needs(self, k: int) -> int:
        return k + 3

    def _freedom(self) -> float:
        return self._ridge.freedom

    def _fit(self, data: Data, seed: int) -> None:
        shares, scores, noise_var = data
        fits = [(scale, Ridge.fit(quadratic(shares, scale), scores, noise_var)) for scale in PRODUCT_SCALES]
        self._scale, self._ridge = min(fits, key=lambda fit: float(np.mean((fit[1].loo - scores) ** 2)))

    def _predict(self, shares: np.ndarray) -> Prediction:
        return self._ridge.predict(quadratic(shares, self._scale))


def quadratic(shares: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """(n, K (K + 1) / 2): the shares, then `scale` times 4 times the products of pairs (at most 1)."""
    rows, columns = np.triu_indices(shares.shape[1], 1)
    return np.concatenate([shares, scale * 4 * shares[:, rows] * shares[:, columns]], axis=1)
