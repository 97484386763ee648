"""Searches by name."""

from __future__ import annotations

from collections.abc import Sequence

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.base import Search
from mergemix.search.cma_search import CmaSearch
from mergemix.search.grid_search import GridSearch
from mergemix.search.random_search import RandomSearch

SEARCHES: dict[str, type[Search]] = {search.kind: search for search in (CmaSearch, RandomSearch, GridSearch)}


def open_search(
    kind: str, names: Sequence[str], *, budget: int, seed: int = 0, prior: Mixture | None = None
) -> Search:
    """A fresh search over mixtures of `names`; resume it by telling it the stored scores.

    budget: distinct candidates, start points included. seed: an integer >= 0.
    Raises ConfigError on an unknown kind, fewer than two experts, a budget that does not cover the start
    points, a negative seed, or a prior that is not a mixture of `names`.
    """
    if kind not in SEARCHES:
        raise ConfigError(f"--search must be one of {', '.join(SEARCHES)}, but is {kind!r}")
    if seed < 0:
        raise ConfigError(f"--seed must be an integer >= 0, but is {seed}")
    return SEARCHES[kind](names, budget=budget, seed=seed, prior=prior)
