"""The paper's pipeline: a design, one surrogate per capability, and verification of the optimum that they predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.designs import design
from mergemix.search.modelled import STARTS, ModelledSearch, ascend
from mergemix.search.posterior import Posterior

# Of what the start points leave of the budget: how much goes to the design, and in how many rounds the rest is
# proposed, with surrogates refitted after each.
DESIGN_SHARE = 0.5
ROUNDS = 4
# How far proposals of a round are apart at least, and from what is known: half the sum of differences of shares.
APART, AWAY = 0.05, 0.01


class SurrogateSearch(ModelledSearch):
    """A design over the region, then rounds of the best mixtures that surrogates predict, each verified and learned.

    The start points and a design with half of the rest of the budget are evaluated; one surrogate per capability is
    fitted to them; a fine search maximises the utility of the predictions; its best mixtures are the next proposals:
    what was predicted of them stands in `predictions`, beside what they will be measured to be. Source: the paper,
    section 2 of the method, where N = 40, and one such round ends the search.

    surrogate: a name that open_surrogate takes. layout: of the design, one of designs.DESIGNS.
    """

    kind = "surrogate"

    def __init__(
        self,
        names: Sequence[str],
        *,
        budget: int,
        seed: int,
        surrogate: str = "auto",
        layout: str = "maximin",
        **options: Any,
    ) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self.surrogate = surrogate
        self._layout = layout
        self._prior: Mixture | None = options.get("prior")
        rest = budget - len(self._starts)
        self._design_size = math.ceil(DESIGN_SHARE * rest)
        self._round_size = max(self.batch, math.ceil((rest - self._design_size) / ROUNDS))
        # What is design and what is verification follows from the budget.
        self.identity |= {"budget": budget, "surrogate": surrogate, "design": layout}

    def _propose(self, count: int | None) -> list[Mixture]:
        if early := self._early():
            return early
        designed = len(self._order) - len(self._starts)
        rng = self._generator()
        if designed < self._design_size and (new := self._design(self._design_size - designed, rng)):
            return new
        posterior = self._posterior()
        if posterior is None:
            return self._random(count or self._round_size, rng)
        inside = [m for m, o in self.evidence() if o.utility is not None and self.region.contains(m)]
        known = np.array([mixture.weights for mixture in inside or self._starts])
        if self._narrow(posterior, known, rng):
            return []
        found: list[Mixture] = []
        for _ in range(count or self._round_size):
            mixture = self._next(posterior, known, found, rng)
            if mixture is None:
                break
            self._predict(posterior, mixture)
            found.append(mixture)
        return found

    def _design(self, size: int, rng: np.random.Generator) -> list[Mixture]:
        points = design(self._layout, self.region, size, rng, existing=list(self._order), prior=self._prior)
        new = [mixture for mixture in points if self._is_new(mixture)]
        return new or self._random(size, rng)

    def _next(
        self, posterior: Posterior, known: np.ndarray, found: list[Mixture], rng: np.random.Generator
    ) -> Mixture | None:
        """The best mixture that is predicted, some way from all that is known and that this round proposes."""
        others = np.array([mixture.weights for mixture in self._order])
        now = np.array([mixture.weights for mixture in (*self._waiting, *found)]).reshape(-1, len(self.names))

        def allowed(shares: np.ndarray) -> np.ndarray:
            near = np.abs(shares[:, None] - others).sum(axis=2).min(axis=1) / 2 < AWAY
            if len(now):
                near |= np.abs(shares[:, None] - now).sum(axis=2).min(axis=1) / 2 < APART
            return ~near

        def objective(shares: np.ndarray) -> np.ndarray:
            return np.where(allowed(shares), posterior.moments(shares)[0], -np.inf)

        means, _ = posterior.moments(known)
        starts = known[np.argsort(-means, kind="stable")[:STARTS]]
        points, values = ascend(objective, self.region, rng, starts)
        for point in points[np.isfinite(values)] if np.isfinite(values).any() else points:
            mixture = self.region.snap(point)
            if self._is_new(mixture) and mixture not in found:
                return mixture
        return None
