"""What is known of the utility of mixtures after some have been measured: surrogates of the capabilities, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from mergemix.mixture import SUM_TOLERANCE, Mixture
from mergemix.search.one_thread import one_thread

if TYPE_CHECKING:
    from mergemix.search.base import Objective, Outcome
    from mergemix.search.surrogates.base import Prediction, Surrogate

UTILITY = "utility"  # the score that is modelled where there is no objective
SAMPLES = 64  # quasi-random draws of the capabilities, for utilities of several


class Model(Protocol):
    """What a posterior needs of a fitted surrogate."""

    def predict(self, shares: np.ndarray) -> Prediction: ...


@dataclass(frozen=True)
class Measured:
    """What n mixtures scored.

    shares: (n, K). scores, noise: (n,) by name, the latter variances of the measurement; NaN where a mixture has no
    such score. of_capabilities: the scores are those of capabilities, not the utility itself.
    """

    shares: np.ndarray
    scores: Mapping[str, np.ndarray]
    noise: Mapping[str, np.ndarray]
    of_capabilities: bool

    def __len__(self) -> int:
        return len(self.shares)

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shares, scores, noise) of the mixtures that have this score."""
        known = np.isfinite(self.scores[name])
        return self.shares[known], self.scores[name][known], self.noise[name][known]


def measured(evidence: Sequence[tuple[Mixture, Outcome]], objective: Objective | None) -> Measured:
    """What surrogates are fitted to: capabilities where the utility is a function of them, else the utility.

    Failed candidates are left out, as are layer groups and what is no mixture of the domains alone (the base). With an
    objective, so are outcomes without capabilities, unless none has them: then the utilities are modelled.

    A standard error that all candidates have in common comes from the items, which are the same for all: it is no noise
    between them. The noise is therefore what a variance has above the smallest one, as that of a candidate that was
    stopped early; what is left, such as answers that flip at random, a surrogate estimates by itself.
    """
    known = [
        (m, o)
        for m, o in evidence
        if o.utility is not None and not m.groups and abs(m.base_weight) <= SUM_TOLERANCE
    ]
    detailed = [(m, o) for m, o in known if o.capabilities] if objective is not None else []
    if detailed:
        known = detailed
        names = sorted({name for _, outcome in known for name in outcome.capabilities})
        missing = (np.nan, np.nan)
        pairs = {name: [outcome.capabilities.get(name, missing) for _, outcome in known] for name in names}
    else:
        pairs = {UTILITY: [(float(outcome.utility or 0.0), outcome.stderr) for _, outcome in known]}
    columns = {name: np.array(values, np.float64).reshape(-1, 2) for name, values in pairs.items()}
    return Measured(
        np.array([mixture.weights for mixture, _ in known], np.float64),
        {name: column[:, 0] for name, column in columns.items()},
        {name: _own_noise(column[:, 1] ** 2) for name, column in columns.items()},
        bool(detailed),
    )


def _own_noise(variances: np.ndarray) -> np.ndarray:
    """What each has above the smallest; NaN stays."""
    return variances - np.nanmin(variances) if len(variances) else variances


@dataclass(frozen=True)
class Posterior:
    """The utility of mixtures, less `penalty`, as far as surrogates of its parts know it.

    objective: the utility of the modelled scores; None: the only score is the utility. penalty: (n,) of shares (n, K).
    lowest: of each score, what was measured.
    """

    models: Mapping[str, Model]
    objective: Objective | None
    penalty: Callable[[np.ndarray], np.ndarray]
    lowest: Mapping[str, float]

    def moments(self, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard deviation) of the surface at `shares` (n, K): each (n,)."""
        if self.objective is None:
            predicted = self.models[UTILITY].predict(shares)
            return predicted.mean - self.penalty(shares), predicted.sd
        drawn = self._drawn(shares)
        return drawn.mean(axis=0), drawn.std(axis=0)

    def expected_improvement(self, shares: np.ndarray, best: float) -> np.ndarray:
        """(n,): by how much the surface at `shares` (n, K) is expected to exceed `best`, counted where it does."""
        if self.objective is None:
            return _normal_improvement(*self.moments(shares), best)
        return np.maximum(self._drawn(shares) - best, 0.0).mean(axis=0)

    def noise_sd(self, shares: np.ndarray) -> float:
        """What a new measurement of the utility adds to the surface: the root of its mean variance at `shares`."""
        predicted = {name: model.predict(shares) for name, model in self.models.items()}
        if self.objective is None:
            return float(np.sqrt(np.mean(predicted[UTILITY].noise_sd ** 2)))
        draws = _normals(len(self.models))
        value = self.objective({name: p.mean for name, p in predicted.items()})
        noisy = [
            self.objective(
                {n: p.mean + z * p.noise_sd for (n, p), z in zip(predicted.items(), draw, strict=True)}
            )
            for draw in draws
        ]
        return float(np.sqrt(np.mean((np.array(noisy) - value) ** 2)))

    def given(self, shares: np.ndarray) -> Self:
        """The posterior once `shares` (n, K) will have been measured, and found to be as expected (Ginsbourger's
        kriging believer): its mean is the same, its standard deviation smaller there.

        Only of models that can be conditioned; others stay as they are.
        """
        return self._conditioned(shares, {name: m.predict(shares).mean for name, m in self.models.items()})

    def failed(self, shares: np.ndarray) -> Self:
        """The posterior once `shares` (n, K) have failed, which counts as the lowest score of all. As for `given`."""
        return self._conditioned(
            shares, {name: np.full(len(shares), low) for name, low in self.lowest.items()}
        )

    def _conditioned(self, shares: np.ndarray, scores: Mapping[str, np.ndarray]) -> Self:
        models = {}
        for name, model in self.models.items():
            own = model.rest if isinstance(model, Trended) else model
            condition = getattr(model, "condition", None) if hasattr(own, "condition") else None
            models[name] = model if condition is None else condition(shares, scores[name])
        return replace(self, models=models)

    def _drawn(self, shares: np.ndarray) -> np.ndarray:
        """(SAMPLES, n) utilities of scores that are drawn independently, with the same random numbers everywhere."""
        assert self.objective is not None, "one score needs no draws"
        draws = _normals(len(self.models))
        scores = {}
        for (name, model), z in zip(self.models.items(), draws.T, strict=True):
            predicted = model.predict(shares)
            scores[name] = (predicted.mean + z[:, None] * predicted.sd).ravel()
        return self.objective(scores).reshape(SAMPLES, len(shares)) - self.penalty(shares)


@lru_cache(maxsize=16)
def _normals(dimensions: int) -> np.ndarray:
    """(SAMPLES, dimensions) standard normal numbers, well spread (scrambled Sobol), of mean 0 and variance 1."""
    from scipy.stats import norm, qmc

    uniform = qmc.Sobol(dimensions, rng=np.random.default_rng(0)).random(SAMPLES)
    normal = norm.ppf(np.clip(uniform, 1e-9, 1 - 1e-9))
    return (normal - normal.mean(axis=0)) / normal.std(axis=0)


def _normal_improvement(mean: np.ndarray, sd: np.ndarray, best: float) -> np.ndarray:
    """E max(X - best, 0) of normal X (Mockus 1978; Jones et al. 1998)."""
    from scipy.special import ndtr

    sd = np.maximum(sd, 1e-300)
    z = (mean - best) / sd
    return sd * (z * ndtr(z) + np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))


@dataclass(frozen=True)
class Trended:
    """A model of what a score is above `slope` times another surface, such as that of an earlier checkpoint."""

    rest: Model
    trend: Model
    slope: float

    def predict(self, shares: np.ndarray) -> Prediction:
        predicted = self.rest.predict(shares)
        return predicted._replace(mean=predicted.mean + self.slope * self.trend.predict(shares).mean)

    def condition(self, shares: np.ndarray, scores: np.ndarray) -> Trended:
        """As of a Gaussian process, which `rest` must be."""
        rest = scores - self.slope * self.trend.predict(shares).mean
        return replace(self, rest=self.rest.condition(shares, rest))  # type: ignore[attr-defined]


Memory = dict[
    str, tuple[tuple[bytes, ...], "Surrogate"]
]  # by name of the score: what a model was fitted to, and it


def fit_posterior(
    evidence: Sequence[tuple[Mixture, Outcome]],
    objective: Objective | None,
    penalty: Callable[[np.ndarray], np.ndarray],
    *,
    surrogate: str = "gp",
    seed: int = 0,
    trends: Mapping[str, Model] | None = None,
    memory: Memory | None = None,
) -> Posterior | None:
    """Surrogates of all scores of the measured mixtures; None where none was measured.

    trends: by name of a score, a surface that may be like it (see `slope_of`). memory: kept by the caller from one
    fit to the next of growing evidence; a model is then fitted to the first `fitted_of(n)` points, remembered, and
    conditioned on the rest. The result is the same whatever is remembered. Only for surrogates that can be conditioned.
    """
    data = measured(evidence, objective)
    if not len(data):
        return None
    with one_thread():
        return _fit(data, objective, penalty, surrogate, seed, trends or {}, memory)


def _fit(
    data: Measured,
    objective: Objective | None,
    penalty: Callable[[np.ndarray], np.ndarray],
    surrogate: str,
    seed: int,
    trends: Mapping[str, Model],
    memory: Memory | None,
) -> Posterior:
    models: dict[str, Model] = {}
    lowest = {}
    for name in data.scores:
        shares, scores, noise = data.of(name)
        count = len(scores) if memory is None else fitted_of(len(scores))
        trend = trends.get(name)
        guess = np.zeros(len(scores)) if trend is None else trend.predict(shares).mean
        slope = slope_of(guess[:count], scores[:count])
        rest = scores - slope * guess
        parts = shares[:count], rest[:count], noise[:count] if noise.any() else None
        fitted = _remembered({} if memory is None else memory, name, surrogate, parts, seed)
        model: Model = fitted
        if count < len(scores):
            model = fitted.condition(shares[count:], rest[count:], noise[count:])  # type: ignore[attr-defined]
        models[name] = model if trend is None or slope == 0 else Trended(model, trend, slope)
        lowest[name] = float(scores.min())
    return Posterior(models, objective if data.of_capabilities else None, penalty, lowest)


def fitted_of(n: int) -> int:
    """To how many of n points hyperparameters are fitted: to all of the first dozen, then at every sixth more."""
    return n - n % max(1, n // 6)


def _remembered(
    memory: Memory,
    name: str,
    surrogate: str,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    seed: int,
) -> Surrogate:
    from mergemix.search.surrogates import open_surrogate
    from mergemix.search.surrogates.base import Data, checked

    shares, scores, noise = parts
    key = (shares.tobytes(), scores.tobytes(), b"" if noise is None else noise.tobytes())
    if name not in memory or memory[name][0] != key:
        model = open_surrogate(surrogate)
        # Without cross-validated intervals, which cost most of the time.
        quick = surrogate == "gp"
        fitted = model._fitted(Data(*checked(*parts)), seed) if quick else model.fit(*parts, seed=seed)
        memory[name] = key, fitted
    return memory[name][1]


def slope_of(guess: np.ndarray, scores: np.ndarray) -> float:
    """What to multiply `guess` (n,) with to follow `scores` (n,), shrunk towards 0 by its own uncertainty.

    The least-squares slope times 1 - (its variance / its square), and 0 where that or the slope is negative: a guess
    that does not correlate with the scores has no say (the positive-part rule of James and Stein).
    """
    if len(scores) < 4 or not (guess := guess - guess.mean()).any():
        return 0.0
    slope = float(guess @ (scores - scores.mean()) / (guess @ guess))
    left = float(((scores - scores.mean() - slope * guess) ** 2).sum() / (len(scores) - 2))
    certain = 1 - left / float(guess @ guess) / slope**2 if slope > 0 else 0.0
    return slope * max(certain, 0.0)
