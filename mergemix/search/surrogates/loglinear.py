"""Log-linear surrogate: a score that is linear in logarithms of the shares, or whose own logarithm is linear in them.

Two forms, of which the one that predicts left-out points best is taken:

    c + sum_k b_k log(1 + x_k / e)     what a domain adds falls off with its share; e from SHARES
    c +- exp(b_0 + sum_k b_k x_k)      the law of data mixing (Ye et al., arXiv 2403.16952) with its asymptote c, for
                                       losses that fall to a floor (+) and scores that rise to a ceiling (-)

Both by ridge regression on the points left out one at a time.
"""

from __future__ import annotations

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate
from mergemix.search.surrogates.linear import Ridge

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # e above
FLOORS = (0.05, 0.2, 0.6)  # from the nearest score to the asymptote, in ranges of the scores


class LogLinear(Surrogate):
    """See the module. After `fit`: `form`, which of the two it is, in words."""

    name = "loglinear"
    title = "linear in logarithms of the shares"

    def needs(self, k: int) -> int:
        return 6

    def _freedom(self) -> float:
        return self._ridge.freedom

    def _fit(self, data: Data, seed: int) -> None:
        shares, scores, noise_var = data
        best = np.inf
        for share in SHARES:
            ridge = Ridge.fit(logs(shares, share), scores, noise_var)
            error = float(np.mean((ridge.loo - scores) ** 2))
            if error < best:
                best = error
                self._ridge, self._share, self._sign, self._floor = ridge, share, 0, 0.0
        reach = float(np.ptp(scores))
        for sign in (1, -1):
            for gap in FLOORS:
                floor = float((sign * scores).min()) - gap * reach
                above = sign * scores - floor
                ridge = Ridge.fit(shares, np.log(above), None if noise_var is None else noise_var / above**2)
                loo = sign * (floor + np.exp(ridge.loo))
                error = float(np.mean((loo - scores) ** 2))
                if error < best:
                    best = error
                    self._ridge, self._sign, self._floor = ridge, sign, floor

    @property
    def form(self) -> str:
        if self._sign == 0:
            return f"linear in log(1 + share / {self._share:g})"
        return f"{self._sign * self._floor:.4g} {'+' if self._sign > 0 else '-'} exp(linear in the shares)"

    def _predict(self, shares: np.ndarray) -> Prediction:
        if self._sign == 0:
            return self._ridge.predict(logs(shares, self._share))
        found = self._ridge.predict(shares)
        above = np.exp(found.mean)  # the delta method: d score = above * d log(above)
        return Prediction(
            self._sign * (self._floor + above), above * found.sd, above * found.noise_sd, found.freedom
        )


def logs(shares: np.ndarray, share: float) -> np.ndarray:
    """log(1 + x / share), scaled to 0..1, of the same shape."""
    return np.log1p(np.maximum(shares, 0.0) / share) / np.log1p(1 / share)
