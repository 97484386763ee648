"""The baseline that every search must beat: mixtures drawn uniformly from the simplex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Search
from mergemix.search.simplex import uniform_sample

# Repeats in a row before the simplex counts as exhausted: two experts have only 10001 mixtures.
MAX_REPEATS = 1000


class RandomSearch(Search):
    """The start points, then uniform (Dirichlet) samples, all in one batch: nothing is learned on the way."""

    kind = "random"

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, **options: Any) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self._rng = np.random.default_rng(seed)

    def _propose(self, count: int | None) -> list[Mixture]:
        known = set(self._order)
        new: list[Mixture] = []
        repeats = 0
        while len(known) < self.budget and repeats < MAX_REPEATS:
            mixture = uniform_sample(self.names, self._rng)
            if mixture in known:
                repeats += 1
                continue
            repeats = 0
            known.add(mixture)
            new.append(mixture)
        if not new:
            self._reasons = {"exhausted": f"{MAX_REPEATS} samples in a row were known mixtures"}
        return new
