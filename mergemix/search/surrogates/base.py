"""What every surrogate is: a regression from shares to one score, with intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

import numpy as np

from mergemix.evals.stats import t_quantile
from mergemix.search.one_thread import one_thread

CONFIDENCE = 0.9
INFLATION = (0.05, 3.0)
LEARNING = 0.2


class Data(NamedTuple):
    """Measured points. shares: (n, K). scores: (n,). noise_var: (n,) or None where it is not known."""

    shares: np.ndarray
    scores: np.ndarray
    noise_var: np.ndarray | None

    def at(self, chosen: np.ndarray) -> Data:
        noise_var = None if self.noise_var is None else self.noise_var[chosen]
        return Data(self.shares[chosen], self.scores[chosen], noise_var)

    @property
    def mean_noise_var(self) -> float:
        return 0.0 if self.noise_var is None else float(self.noise_var.mean())


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

    def widened(self, factor: float) -> Prediction:
        """The same with `factor` times the spread."""
        return self._replace(sd=self.sd * factor, noise_sd=self.noise_sd * factor)

    def _around(self, sd: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        reach = t_quantile((1 + confidence) / 2, self.freedom) * sd
        return self.mean - reach, self.mean + reach


class Surrogate(ABC):
    """A regression from shares to a score. Open one by name with `open_surrogate`; `fit` gives a fitted one.

    name: as in SURROGATES. title: what the model is, in words. After `fit`: `warnings`, what the user should know,
    such as a simpler model that took its place; `held_out`, what models of the other folds predict of each point it
    was fitted to, with the intervals that `predict` gives.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        self.held_out: Prediction
        self._inflation = 1.0
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
        data = Data(*checked(shares, scores, noise_var))
        with one_thread():
            fitted = self._fitted(data, seed)
            fitted._calibrate(fitted._cross_validated(data, seed), data, fitted._num_chosen())
        return fitted

    def _calibrate(self, held_out: Prediction, data: Data, chosen: int = 0) -> None:
        """chosen: how many numbers were fitted to the points left out themselves."""
        n = len(data.scores)
        self._inflation = _inflation(held_out, data) * math.sqrt(n / max(n - chosen, n / 2))
        self.held_out = held_out.widened(self._inflation)

    def predict(self, shares: np.ndarray) -> Prediction:
        """What to expect at `shares` (m, K)."""
        shares = np.asarray(shares, np.float64)
        model = self._stand_in or self
        return model._predict(shares).widened(self._inflation)

    def mean(self, shares: np.ndarray) -> np.ndarray:
        """The mean alone, (m,): what is maximised needs no more, and it is cheaper."""
        return (self._stand_in or self)._mean(np.asarray(shares, np.float64))

    def _fitted(self, data: Data, seed: int) -> Self:
        """Fitted or replaced by a simpler model; not cross-validated."""
        fitted = type(self)()
        simpler = self._simpler(data)
        if simpler is None:
            fitted._fit(data, seed)
        else:
            model, warning = simpler
            fitted._stand_in = model._fitted(data, seed)
            fitted.warnings = (warning,)
        return fitted

    def _simpler(self, data: Data) -> tuple[Surrogate, str] | None:
        """The model that takes this one's place on such data, and why."""
        from mergemix.search.surrogates.linear import Constant, LinearRidge

        n, k = data.shares.shape
        if n > 1 and np.ptp(data.scores) == 0:
            return Constant(), f"all {n} scores are equal ({data.scores[0]:g}): predicted to be so everywhere"
        different = len(np.unique(data.shares, axis=0))
        if different >= self.needs(k):
            return None
        model: Surrogate = LinearRidge() if different >= LinearRidge().needs(k) else Constant()
        return model, (
            f"{self.name} needs at least {self.needs(k)} different mixtures of {k} domains, but there are {different}: "
            f"{model.title} takes its place"
        )

    def _cross_validated(self, data: Data, seed: int) -> Prediction:
        """Each point, predicted by a model of the other folds; not yet widened."""
        found: list[tuple[np.ndarray, Prediction]] = []
        for kept, held in folds(data.shares, seed):
            found.append((held, self._refitted(data.at(kept), seed).predict(data.shares[held])))
        if not found:  # a single mixture
            return self.predict(data.shares)
        order = np.argsort(np.concatenate([held for held, _ in found]))
        mean, sd, noise_sd = (
            np.concatenate([prediction[part] for _, prediction in found])[order] for part in range(3)
        )
        return Prediction(mean, sd, noise_sd, (self._stand_in or self)._freedom())

    def _refitted(self, data: Data, seed: int) -> Surrogate:
        """The same model of a part of the points; it may start from what this one has found for all."""
        return type(self._stand_in or self)()._fitted(data, seed)

    @abstractmethod
    def _fit(self, data: Data, seed: int) -> None: ...

    @abstractmethod
    def _predict(self, shares: np.ndarray) -> Prediction: ...

    def _mean(self, shares: np.ndarray) -> np.ndarray:
        return self._predict(shares).mean

    def _num_chosen(self) -> int:
        return 0

    @abstractmethod
    def _freedom(self) -> float:
        """Degrees of freedom of its intervals."""


def _inflation(held_out: Prediction, data: Data) -> float:
    """By how much intervals must widen so that left-out points are within them as often as they should be.

    The geometric mean of two answers: the root mean square of the standardised errors, which a few large ones carry,
    and what makes the 90% intervals hold 90% of the points, which depends on a few of the others. Models of fewer
    points miss by more than the one of all: their errors are taken to fall with n ** -LEARNING.
    """
    count = num_folds(len(np.unique(data.shares, axis=0)))
    if len(data.scores) < 4 or count < 2:
        return 1.0
    total = np.maximum(np.hypot(held_out.sd, held_out.noise_sd), 1e-9 * float(np.ptp(data.scores)) or 1e-300)
    errors = np.abs(data.scores - held_out.mean) / total
    by_square = np.sqrt(np.mean(errors**2))
    by_count = np.quantile(errors, CONFIDENCE) / t_quantile((1 + CONFIDENCE) / 2, held_out.freedom)
    return float(np.clip(np.sqrt(by_square * by_count), *INFLATION)) * (1 - 1 / count) ** LEARNING


def folds(shares: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(kept, held) of each fold: each of the n points is held once, repeats of a mixture together.

    The order depends on the seed and on which points are repeats, not on anything else.
    """
    _, group = np.unique(shares, axis=0, return_inverse=True)
    firsts: dict[int, int] = {}
    group = np.array(
        [firsts.setdefault(int(g), len(firsts)) for g in group.ravel()]
    )  # in order of appearance
    rank = np.random.default_rng((seed, len(firsts))).permutation(len(firsts))[group]
    count = num_folds(len(firsts))
    for number in range(count if len(firsts) > 1 else 0):
        held = rank % count == number
        yield np.flatnonzero(~held), np.flatnonzero(held)


def num_folds(n: int) -> int:
    """Many where points are few, few where fitting takes long."""
    return min(n, 10) if n <= 20 else 5 if n <= 200 else 4


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
