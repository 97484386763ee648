"""Layer-wise search: first one mixture for the whole model, then the weights of one layer group after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergemix.mixture import LayerGroup, Mixture
from mergemix.search.base import Outcome, Search
from mergemix.search.layers import Patterns
from mergemix.search.simplex import basis

# Proposals for a group before the next one has its turn.
BATCH = 4
# Steps in the simplex around the best weights so far; vertices are about 1 from the centroid. A round over all groups
# that found nothing better halves them.
FIRST_STEP = 0.25
SMALLEST_STEP = 0.01
MAX_REPEATS = 1000


class BlockwiseSearch(Search):
    """A search of whole-model mixtures with half of the budget, then block coordinate search over layer groups.

    In the second half every candidate differs from the best one so far in one group only, so that a swap to it
    moves little more than that group.

    inner: the search of the first half; its budget is at least its start points. groups: patterns of each group.
    """

    kind = "blockwise"

    def __init__(self, inner: Search, groups: Sequence[Patterns], *, budget: int, seed: int) -> None:
        super().__init__(inner.names, budget=budget, seed=seed, prior=None, region=inner.region)
        self._inner = inner
        self._groups = tuple(groups)
        self._rng = np.random.default_rng([seed, len(groups)])
        self._basis = basis(len(self.names))
        self._turn = 0
        self._step = FIRST_STEP
        self._best_of_round: float | None = None
        # Where the halves meet depends on the budget, and so does all that follows.
        self.identity = {
            **inner.identity,
            "layer_groups": [list(group) for group in groups],
            "budget": budget,
        }

    def learn(self, evidence: Sequence[tuple[Mixture, Outcome]], *, same: bool) -> None:
        super().learn(evidence, same=same)
        self._inner.learn(evidence, same=same)

    def ask(self, count: int | None = None) -> list[Mixture]:
        self._inner.objective = self.objective
        if first := self._inner.ask(count):
            self.predictions |= self._inner.predictions
            new = dict.fromkeys(mixture for mixture in first if mixture not in self._order)
            self._order.update(new)
            self._waiting.update(new)
            if count is None or len(first) >= count:
                return first
        return super().ask(count)

    def tell(self, results: Sequence[tuple[Mixture, Outcome | float | None]]) -> None:
        super().tell(results)
        self._inner.tell([(mixture, result) for mixture, result in results if not mixture.groups])

    def _propose(self, count: int | None) -> list[Mixture]:
        while self._step >= SMALLEST_STEP:
            best = self._best()
            group = self._turn % len(self._groups)
            if group == 0:
                self._end_round(best)
            self._turn += 1
            if new := self._around(best, group):
                return new
        self._reasons = {"converged": f"steps of less than {SMALLEST_STEP} in every layer group"}
        return []

    def _best(self) -> Mixture:
        """The best candidate so far, the first of equals, with a group for each of ours."""
        scored = self._net()
        mixture = max(scored, key=lambda pair: pair[0])[1] if scored else self._starts[0]
        groups = mixture.groups or tuple(LayerGroup(patterns, mixture.weights) for patterns in self._groups)
        return Mixture(mixture.names, mixture.weights, groups)

    def _net(self) -> list[tuple[float, Mixture]]:
        """(what it is worth, mixture) of the candidates that did not fail, in the order of proposal."""
        return [(self._worth(m, utility), m) for m, utility in self._scores().items() if utility is not None]

    def _end_round(self, best: Mixture) -> None:
        score = max((score for score, _ in self._net()), default=None)
        if self._turn and score == self._best_of_round:
            self._step /= 2
        self._best_of_round = score

    def _around(self, best: Mixture, group: int) -> list[Mixture]:
        """New mixtures that differ from `best` in one group."""
        center = np.array(best.groups[group].weights)
        new: dict[Mixture, None] = {}
        for _ in range(MAX_REPEATS):
            if len(new) == BATCH:
                break
            moved = center + self._step * (self._basis @ self._rng.standard_normal(len(center) - 1))
            weights = self.region.snap(self.region.project(moved)).weights
            changed = LayerGroup(best.groups[group].tensors, weights)
            mixture = Mixture(
                best.names, best.weights, (*best.groups[:group], changed, *best.groups[group + 1 :])
            )
            if mixture not in self._order and weights != best.groups[group].weights:
                new[mixture] = None
        return list(new)
