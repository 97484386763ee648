"""Searches by name."""

from __future__ import annotations

from collections.abc import Sequence

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.base import Search
from mergemix.search.blockwise import BlockwiseSearch
from mergemix.search.cma_search import CmaSearch
from mergemix.search.grid_search import GridSearch
from mergemix.search.layers import Patterns
from mergemix.search.random_search import RandomSearch
from mergemix.search.simplex import start_points

SEARCHES: dict[str, type[Search]] = {search.kind: search for search in (CmaSearch, RandomSearch, GridSearch)}


def open_search(
    kind: str,
    names: Sequence[str],
    *,
    budget: int,
    seed: int = 0,
    prior: Mixture | None = None,
    groups: Sequence[Patterns] = (),
) -> Search:
    """A fresh search over mixtures of `names`; resume it by telling it the stored scores.

    budget: distinct candidates, start points included. seed: an integer >= 0. groups: layer groups to search
    after the whole model, with half of the budget.
    Raises ConfigError on an unknown kind, fewer than two experts, a budget that does not cover the start
    points, a negative seed, or a prior that is not a mixture of `names`.
    """
    if kind not in SEARCHES:
        raise ConfigError(f"--search must be one of {', '.join(SEARCHES)}, but is {kind!r}")
    if seed < 0:
        raise ConfigError(f"--seed must be an integer >= 0, but is {seed}")
    if not groups:
        return SEARCHES[kind](names, budget=budget, seed=seed, prior=prior)
    half = max(budget // 2, min(budget, len(start_points(names, prior))))
    inner = SEARCHES[kind](names, budget=half, seed=seed, prior=prior)
    return BlockwiseSearch(inner, groups, budget=budget, seed=seed)
