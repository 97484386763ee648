"""What the searches share that propose what a model of the utility holds for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Search
from mergemix.search.posterior import Model, Posterior, fit_posterior, measured
from mergemix.search.region import Region

SAMPLES = 500
STARTS = 8  # of the evaluated mixtures, where the search for proposals begins besides
CLIMBERS = 4
MOVES = 60  # tried per climber and round
STEPS = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015, 0.008, 0.004)  # shares, at most, that a move exchanges


class ModelledSearch(Search):
    """A search with a model of the utility, which is fitted anew whenever something is to be proposed.

    The model is a function of what has been told, in the order of proposal, and so are the proposals.
    """

    surrogate = "gp"

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, **options: Any) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self._seed = seed
        self._trends: dict[str, Model] | None = None

    def _posterior(self, surrogate: str | None = None) -> Posterior | None:
        """The model of everything that is known; None as long as nothing is."""
        return fit_posterior(
            self._evidence(),
            self.objective,
            self.region.penalty,
            surrogate=surrogate or self.surrogate,
            seed=self._seed,
            trends=self._fitted_trends(),
        )

    def _fitted_trends(self) -> dict[str, Model]:
        """Surfaces that may be like this one, by name of the score; fitted once."""
        if self._trends is None:
            hinted = fit_posterior(self._hints, self.objective, self.region.penalty, seed=self._seed)
            self._trends = {} if hinted is None else dict(hinted.models)
        return self._trends

    def _generator(self) -> np.random.Generator:
        """Random numbers for the next proposal: the same whatever was drawn before, so that a search can be resumed."""
        return np.random.default_rng([self._seed, len(self._order)])

    def _is_new(self, mixture: Mixture) -> bool:
        return mixture not in self._order and mixture not in self._learned


def ascend(
    objective: Callable[[np.ndarray], np.ndarray],
    region: Region,
    rng: np.random.Generator,
    starts: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, K) of the region and their objective (n,), best first: a coarse and cheap maximisation.

    Samples and `starts` (s, K), then the best of them move uphill in shrinking steps, among random directions and
    exchanges of two domains. A proposal need not be exact: acquisition functions are flat where they are high.
    """
    points = np.concatenate([region.sample(SAMPLES, rng), starts])
    values = objective(points)
    order = np.argsort(-values, kind="stable")
    climbers, reached = points[order[:CLIMBERS]].copy(), values[order[:CLIMBERS]].copy()
    k = len(region.names)
    for step in STEPS:
        count = len(climbers)
        pairs = rng.integers(k, size=(2, count, MOVES // 2))
        ways = np.concatenate(
            [np.eye(k)[pairs[0]] - np.eye(k)[pairs[1]], rng.standard_normal((count, MOVES // 2, k))], axis=1
        )
        ways = region.directions(ways)
        ways /= np.maximum(np.abs(ways).sum(axis=2, keepdims=True) / 2, 1e-12)
        length = step * rng.random(ways.shape[:2]) ** 0.5
        length[:, ::4] = step * 4  # as far as to the boundary
        tried = region.move(climbers, ways, length)
        found = objective(tried.reshape(-1, k)).reshape(tried.shape[:2])
        best = found.argmax(axis=1)
        rows = np.arange(count)
        better = found[rows, best] > reached
        climbers[better], reached[better] = tried[rows, best][better], found[rows, best][better]
    points, values = np.concatenate([climbers, points]), np.concatenate([reached, values])
    order = np.argsort(-values, kind="stable")
    return points[order], values[order]
