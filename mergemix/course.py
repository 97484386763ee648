"""One candidate's way through a suite: its items in blocks, and after each block whether it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mergemix.evals.item_order import order_items
from mergemix.evals.suite import ItemResult, Suite
from mergemix.evals.utility import Utility
from mergemix.mixture import Mixture
from mergemix.search.racing import Race
from mergemix.study import Estimate

ItemScores = Mapping[str, np.ndarray]


class Course:
    """The blocks of items that one candidate is asked, and the race against those that have answered all.

    blocks: numbers of items of the suite. Which items come first differs from candidate to candidate, so that later
    ones are not compared on the items that flattered the best; it depends on the study's seed and the mixture alone.
    """

    def __init__(
        self,
        suite: Suite,
        utility: Utility,
        incumbents: Sequence[tuple[ItemScores, float]],
        mixture: Mixture,
        seed: int,
        *,
        cost: float = 0.0,
    ) -> None:
        """incumbents: item scores of candidates that answered all items, at least one, and what is taken off their
        utility; cost: off the mixture's."""
        scores, costs = [each for each, _ in incumbents], [each for _, each in incumbents]
        own = int.from_bytes(hashlib.sha256(mixture.key().encode()).digest()[:4], "little")
        order = order_items(utility.weights, suite.item_counts, scores, seed=[seed, own])
        self._suite = suite
        self._race = Race(utility, order, scores, costs=costs, cost=cost)
        self.blocks: Sequence[Sequence[int]] = [
            suite.numbers(order.block(block)) for block in range(order.num_blocks)
        ]

    def stop(self, block: int, results: Sequence[ItemResult]) -> tuple[str, Estimate] | None:
        """(why, estimate of the utility on all items) when the candidate is to be stopped after `block`.

        results: of all items asked so far.
        """
        look = self._race.look(block, self._suite.item_scores(results))
        if not look.stop:
            return None
        reason = (
            f"clearly worse than the best so far: after {len(results)} of {self._suite.num_items} items its utility is "
            f"at most {look.upper:.4g}, the best one's is {self._race.best:.4g}"
        )
        return reason, Estimate(look.estimate, look.standard_error, look.benchmarks)
