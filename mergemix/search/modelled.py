"""What the searches share that propose what a model of the utility holds for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import kl
from mergemix.search.base import Search
from mergemix.search.hit_and_run import reach
from mergemix.search.posterior import Memory, Model, Posterior, fit_posterior
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS

CONFIDENCE_90 = 1.6449  # standard deviations to each side of a 90% interval
# "No gain above noise": so many proposals in a row, each of an expected improvement below this share of the noise of
# one measurement, and not before so many candidates beside the start points: of fewer, models are too sure of
# themselves (of intervals that were then narrow enough 54% held the truth in simulations, 96% after so many).
PATIENCE, GAIN, LEAST = 6, 0.05, 20
SPREAD = 5e-3  # of the standard deviation over the evaluated mixtures: differences below it are noise too

# The coarse maximisation of acquisition functions.
SAMPLES, STARTS, CLIMBERS = 500, 8, 4
MOVES = 60  # tried per climber and round
STEPS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.008, 0.004)  # shares, at most, that a move exchanges


class ModelledSearch(Search):
    """A search with a model of the utility, which is fitted anew whenever something is to be proposed.

    The model is a function of what has been told, in the order of proposal, and so are the proposals.

    interval: stop once the 90% interval of the predicted optimum's utility is at most so far to each side; None: never.
    Raises ConfigError when it is not above 0.
    """

    surrogate = "gp"

    def __init__(
        self, names: Sequence[str], *, budget: int, seed: int, interval: float | None = None, **options: Any
    ) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        if interval is not None and not interval > 0:
            raise ConfigError(f"the interval at which a search stops must be above 0, but is {interval}")
        self._seed = seed
        self._interval = interval
        self._trends: dict[str, Model] | None = None
        self._memory: Memory = {}
        self._gains: list[bool] = []  # of each modelled proposal: whether it could gain more than noise hides

    def _posterior(self) -> Posterior | None:
        """The model of everything that is known; None as long as nothing is.

        Failed candidates count as the worst, where a model can be conditioned: not with stacked ones.
        """
        posterior = fit_posterior(
            self.evidence(),
            self.objective,
            self.region.penalty,
            surrogate=self.surrogate,
            seed=self._seed,
            trends=self._fitted_trends(),
            memory=self._memory if self.surrogate == "gp" else None,
        )
        failed = [mixture.weights for mixture, outcome in self.told() if outcome.utility is None]
        return posterior.failed(np.array(failed)) if posterior is not None and failed else posterior

    def _fitted_trends(self) -> dict[str, Model]:
        """Surfaces that may be like this one, by name of the score; fitted once."""
        if self._trends is None:
            hinted = fit_posterior(self._hints, self.objective, self.region.penalty, seed=self._seed)
            self._trends = {} if hinted is None else dict(hinted.models)
        return self._trends

    def _random(self, count: int, rng: np.random.Generator) -> list[Mixture]:
        """Up to `count` new mixtures, for as long as there is nothing to fit a model to."""
        drawn = dict.fromkeys(map(self.region.snap, self.region.sample(10 * count + 100, rng)))
        return [mixture for mixture in drawn if self._is_new(mixture)][:count]

    def _predict(self, posterior: Posterior, mixture: Mixture) -> None:
        """Keep what the model says of a mixture that it proposes."""
        at = np.array([mixture.weights])
        mean, sd = posterior.moments(at)
        self.predictions[mixture] = float(mean[0] + self.region.penalty(at)[0]), float(sd[0])

    def _narrow(self, posterior: Posterior, starts: np.ndarray, rng: np.random.Generator) -> bool:
        """Whether the interval of the predicted optimum is as narrow as asked for."""
        if self._interval is None or len(self._order) < len(self._starts) + LEAST:
            return False
        points, _ = ascend(lambda shares: posterior.moments(shares)[0], self.region, rng, starts)
        reach = CONFIDENCE_90 * float(posterior.moments(points[:1])[1][0])
        if 0 < reach <= self._interval:
            self._reasons = {
                "interval": f"the predicted optimum's utility is known to {reach:.3g} to each side (90%)"
            }
        return bool(self._reasons)

    def _exhausted(self) -> bool:
        """Whether the last proposals could gain nothing that a measurement would show."""
        enough = len(self._order) >= len(self._starts) + LEAST
        if enough and len(self._gains) >= PATIENCE and not any(self._gains[-PATIENCE:]):
            self._reasons = {
                "no_gain": f"each of the last {PATIENCE} proposals was expected to gain less than {GAIN:.0%} of what "
                "noise does to one measurement"
            }
        return bool(self._reasons)

    def _generator(self) -> np.random.Generator:
        """Random numbers for the next proposal: the same whatever was drawn before, so that a search can be resumed."""
        return np.random.default_rng([self._seed, len(self._order)])


def ascend(
    objective: Callable[[np.ndarray], np.ndarray],
    region: Region,
    rng: np.random.Generator,
    starts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, K) of the region and their objective (n,), best first: a coarse and cheap maximisation.

    Samples and `starts` (s, K; inside the region), of which the best move uphill in shrinking steps, among random
    directions and exchanges of two domains. A proposal need not be exact: acquisition functions are flat where they
    are high.
    """
    points = np.concatenate([starts, region.sample(SAMPLES, rng)])
    values = objective(points)
    order = np.argsort(-values, kind="stable")
    climbers, reached = points[order[:CLIMBERS]].copy(), values[order[:CLIMBERS]].copy()
    count, k = climbers.shape
    rows = np.arange(count)
    for step in STEPS:
        pairs = rng.integers(k, size=(2, count, MOVES // 2))
        exchanges = np.eye(k)[pairs[0]] - np.eye(k)[pairs[1]]
        ways = np.concatenate([exchanges, rng.standard_normal((count, MOVES // 2, k))], axis=1)
        length = step * np.sqrt(rng.random(ways.shape[:2]))
        length[:, ::4] = np.inf  # to the boundary
        tried = _moved(region, climbers, ways, length)
        found = objective(tried.reshape(-1, k)).reshape(tried.shape[:2])
        best = found.argmax(axis=1)
        better = found[rows, best] > reached
        climbers[better], reached[better] = tried[rows, best][better], found[rows, best][better]
    points, values = np.concatenate([climbers, points]), np.concatenate([reached, values])
    order = np.argsort(-values, kind="stable")
    return points[order], values[order]


def _moved(region: Region, points: np.ndarray, ways: np.ndarray, length: np.ndarray) -> np.ndarray:
    """(c, n, K): points (c, K) moved along `ways` (c, n, K) by `length` (c, n), in shares, or to the boundary."""
    hull = region.polytope.hull
    flat = (ways @ hull @ hull.T).reshape(-1, points.shape[1])  # directions that keep what must be kept
    flat /= np.maximum(np.abs(flat).sum(axis=1, keepdims=True) / 2, 1e-12)
    origins = np.repeat(points, ways.shape[1], axis=0)
    forth = reach(region.polytope, origins, flat)[1]
    moved = origins + np.minimum(length.reshape(-1), forth)[:, None] * flat
    moved = np.clip(moved, region.polytope.lower / UNITS, region.polytope.upper / UNITS)
    if region.kl_limit is not None:
        moved = kl.draw_inside(np.array(region.prior), region.kl_limit, region.center, moved)
    return moved.reshape(ways.shape)
