"""What every surrogate is: a regression from shares to one score, with intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Self

import numpy as np

from mergemix.evals.stats import t_quantile

CONFIDENCE = 0.9


class Prediction(NamedTuple):
    """What a surrogate expects at m mixtures, in the unit of the scores.

    mean: (m,). sd: (m,), how far the surface itself may be from it. noise_sd: (m,), what a new measurement adds to
    that. freedom: the degrees of freedom that both were estimated from; intervals are Student's t.
    """

    mean: np.ndarray
    sd: np.ndarray
    noise_sd: np.ndarray
    freedom: float = math.inf

    def interval(self, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of a new measurement, each (m,)."""
        return self._around(np.hypot(self.sd, self.noise_sd), confidence)

    def surface_interval(self, confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of the surface, each (m,): what many new measurements would average to."""
        return self._around(self.sd, confidence)

    def _around(self, sd: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        reach = t_quantile((1 + confidence) / 2, self.freedom) * sd
        return self.mean - reach, self.mean + reach


class Surrogate(ABC):
    """A regression from shares to a score. Open one by name with `open_surrogate`; `fit` gives a fitted one.

    name: as in SURROGATES. warnings: what the user should know about a fitted one, such as a simpler model that took
    its place.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        self._stand_in: Surrogate | None = None

    @abstractmethod
    def needs(self, k: int) -> int:
        """The number of points that this surrogate needs at least, of K = `k` domains."""

    def fit(
        self,
        shares: np.ndarray,
        scores: np.ndarray,
        noise_var: np.ndarray | None = None,
        *,
        seed: int = 0,
    ) -> Self:
        """A fitted surrogate; this one is not changed.

        shares: (n, K), on the simplex. scores: (n,), finite. noise_var: (n,), the variance of each score's error of
        measurement where it is known; None: it is estimated, equal for all. With fewer points than it needs, or
        scores that are all equal, a simpler model takes its place and `warnings` says so.
        Raises ValueError for shapes that do not fit each other and for numbers that are not finite.
        """
        shares, scores, noise_var = checked(shares, scores, noise_var)
        fitted = type(self)()
        simpler = self._simpler(*shares.shape, scores)
        if simpler is None:
            fitted._fit(shares, scores, noise_var, seed)
        else:
            model, warning = simpler
            fitted._stand_in = model.fit(shares, scores, noise_var, seed=seed)
            fitted.warnings = (warning, *fitted._stand_in.warnings)
        return fitted

    def predict(self, shares: np.ndarray) -> Prediction:
        """What to expect at `shares` (m, K)."""
        shares = np.asarray(shares, np.float64)
        return self._predict(shares) if self._stand_in is None else self._stand_in.predict(shares)

    def _simpler(self, n: int, k: int, scores: np.ndarray) -> tuple[Surrogate, str] | None:
        """The model that takes this one's place on such data, and why."""
        from mergemix.search.surrogates.linear import Constant, LinearRidge

        if np.ptp(scores) == 0:
            return Constant(), f"all {n} scores are equal ({scores[0]:g}): predicted to be so everywhere"
        if n >= self.needs(k):
            return None
        model: Surrogate = LinearRidge() if n >= LinearRidge().needs(k) else Constant()
        return model, (
            f"{self.name} needs at least {self.needs(k)} points for {k} domains, but there are {n}: "
            f"{model.title} takes its place"
        )

    @property
    def title(self) -> str:
        """What the model is, in words."""
        return self.name

    @abstractmethod
    def _fit(
        self, shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None, seed: int
    ) -> None: ...

    @abstractmethod
    def _predict(self, shares: np.ndarray) -> Prediction: ...


def checked(
    shares: np.ndarray, scores: np.ndarray, noise_var: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The same as float64. Raises ValueError for shapes that do not fit and for numbers that are not finite."""
    shares, scores = np.asarray(shares, np.float64), np.asarray(scores, np.float64)
    if shares.ndim != 2 or scores.shape != (len(shares),) or not scores.size:
        raise ValueError(f"shares must be (n, K) and scores (n,), but are {shares.shape} and {scores.shape}")
    if not (np.isfinite(shares).all() and np.isfinite(scores).all()):
        raise ValueError("shares and scores must be finite")
    if noise_var is not None:
        noise_var = np.asarray(noise_var, np.float64)
        if noise_var.shape != scores.shape or not (np.isfinite(noise_var).all() and (noise_var >= 0).all()):
            raise ValueError(f"noise_var must be {scores.shape} numbers >= 0, but is {noise_var}")
    return shares, scores, noise_var
