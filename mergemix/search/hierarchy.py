"""Search down or up a tree of domains: one small search per cluster instead of one over all experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.base import Outcome, Search
from mergemix.search.tree import Node, Tree

# A search over the children of a cluster: their names, its budget and its seed.
OpenInner = Callable[[Sequence[str], int, int], Search]
# After so many batches in a row that ask for nothing new, a cluster is decided. Of one without a share, every inner
# mixture is the same candidate.
MAX_STALE = 10


class HierarchicalSearch(Search):
    """The start points, then the shares inside one cluster after the other (the paper's hierarchy).

    Top-down: first the shares of the root's clusters, inside which experts keep the prior's proportions, or equal
    ones; then those inside each cluster, with all others as decided. Bottom-up: first the shares inside each
    cluster, which is scored alone: its best mixture is its consolidated expert; then across. Averages of averages are
    averages, so every candidate is one flat mixture of the experts, and no consolidated expert is written.

    The budget is shared out by the number of shares to decide. What a cluster's search asks for and is known
    already (a single expert, say) costs nothing; what is left over goes to the clusters that follow. Under
    constraints, a candidate is the nearest allowed mixture to what the cluster's search proposed.

    open_inner: a search among the children of a cluster. Raises ConfigError when the budget is too small.
    """

    kind = "hierarchy"

    def __init__(
        self,
        tree: Tree,
        open_inner: OpenInner,
        names: Sequence[str],
        *,
        budget: int,
        seed: int,
        **options: object,
    ) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)  # type: ignore[arg-type]
        prior = options.get("prior")
        shares = prior.as_dict() if isinstance(prior, Mixture) else _equal_in_clusters(tree.root)
        self._tree = tree
        self._open_inner = open_inner
        self._seed = seed
        self._stages = tree.stages()
        self._shares = tree.conditional(shares)  # by cluster: as decided so far
        self._inner: Search | None = None
        self._flat: dict[
            Mixture, Mixture
        ] = {}  # of this stage: the candidate for what the inner search proposed
        needed = len(self._starts) + sum(len(stage.children) + 1 for stage in self._stages)
        if budget < needed:
            raise ConfigError(
                f"the budget must cover the {needed} start points of the experts and of all clusters of the tree, but "
                f"is {budget}: give --budget {needed} or more"
            )
        kind = self._open(self._stages[0], budget).identity["search"]
        self.identity |= {
            "search": f"{tree.order} {kind}", "tree": tree.root.describe(), "budget": budget
        }  # fmt: skip

    def _propose(self, count: int | None) -> list[Mixture]:
        stale = 0
        while self._stages:
            stage = self._stages[0]
            if self._inner is None:
                self._inner, self._flat, stale = self._open(stage, self._budget_of(stage)), {}, 0
            proposed = self._inner.ask() if stale <= MAX_STALE else []
            if not proposed:
                self._decide(stage, self._inner)
                self._inner = None
                del self._stages[0]
                continue
            for mixture in proposed:
                if mixture not in self._flat:
                    self._flat[mixture] = flat = self._candidate(stage, mixture)
                    self._inner.budget += flat in self._order  # what is known costs nothing
            known = [(m, self._net(self._flat[m])) for m in proposed if self._flat[m] in self._outcomes]
            self._inner.tell(known)
            stale += 1
            if not known:  # all are new, or under way
                return list(
                    dict.fromkeys(flat for m in proposed if (flat := self._flat[m]) not in self._order)
                )
        self._reasons = {"hierarchy": "the shares inside every cluster of the tree have been searched"}
        return []

    def _open(self, stage: Node, budget: int) -> Search:
        number = [cluster.name for cluster in self._tree.root.clusters()].index(stage.name)
        inner = self._open_inner(stage.child_names, budget, self._seed + number)
        inner.objective = self.objective
        return inner

    def _budget_of(self, stage: Node) -> int:
        """A share of what is left, by the number of shares to decide; enough for the start points of later ones."""
        left = self.budget - len(self._order)
        later = sum(len(other.children) + 1 for other in self._stages[1:])
        decide = [len(other.children) - 1 for other in self._stages]
        return max(len(stage.children) + 1, min(left * decide[0] // sum(decide), left - later))

    def _candidate(self, stage: Node, proposed: Mixture) -> Mixture:
        shares = {**self._shares, stage.name: np.array(proposed.weights)}
        alone = stage if self._tree.order == "bottom-up" else None
        flat = self._tree.flat(self.names, shares, alone)
        if not self.region.is_simplex:
            flat = self.region.project(flat)
        return self.region.snap(flat)

    def _net(self, flat: Mixture) -> Outcome:
        """What was told of a candidate, less what straying from the prior costs: inner searches do not know it."""
        outcome = self._outcomes[flat]
        if not self.region.kl_penalty or outcome.utility is None:
            return outcome
        return Outcome(self._worth(flat, outcome.utility), outcome.stderr, partial=outcome.partial)

    def _decide(self, stage: Node, inner: Search) -> None:
        scored = [(o.utility, mixture) for mixture, o in inner.told() if o.utility is not None]
        if scored:
            self._shares[stage.name] = np.array(max(scored, key=lambda pair: pair[0])[1].weights)


def _equal_in_clusters(root: Node) -> dict[str, float]:
    """Shares of experts such that all children of every cluster have the same share."""
    shares: dict[str, float] = {}

    def spread(node: Node, whole: float) -> None:
        for child in node.children:
            if isinstance(child, str):
                shares[child] = whole / len(node.children)
            else:
                spread(child, whole / len(node.children))

    spread(root, 1.0)
    return shares
