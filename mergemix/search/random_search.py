"""The baseline that every search must beat: mixtures drawn uniformly from the region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Search

# Repeats in a row before the simplex counts as exhausted: two experts have only 10001 mixtures.
MAX_REPEATS = 1000
DRAWN = 100


class RandomSearch(Search):
    """The start points, then uniform samples of the region (Dirichlet on the simplex), all in one batch.

    Nothing is learned on the way.
    """

    kind = "random"

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, **options: Any) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self._rng = np.random.default_rng(seed)

    def _propose(self, count: int | None) -> list[Mixture]:
        known = {*self._order, *self._learned}
        room = self.budget - len(self._order)
        new: list[Mixture] = []
        repeats = 0
        while len(new) < room and repeats < MAX_REPEATS:
            # A walk through a thin region is cheaper for many points at once; what is drawn must not depend on the
            # budget. On the simplex points are drawn one by one, which gives the same ones.
            for shares in self.region.sample(1 if self.region.is_simplex else DRAWN, self._rng):
                mixture = self.region.snap(shares)
                if mixture in known:
                    repeats += 1
                elif len(new) < room:
                    repeats = 0
                    known.add(mixture)
                    new.append(mixture)
        if not new:
            self._reasons = {"exhausted": f"{MAX_REPEATS} samples in a row were known mixtures"}
        return new
