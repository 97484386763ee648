"""Searches by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.base import Search, check_experts
from mergemix.search.blockwise import BlockwiseSearch
from mergemix.search.bo_search import BoSearch
from mergemix.search.cma_search import CmaSearch
from mergemix.search.grid_search import GridSearch
from mergemix.search.hierarchy import HierarchicalSearch
from mergemix.search.layers import Patterns
from mergemix.search.modelled import ModelledSearch
from mergemix.search.random_search import RandomSearch
from mergemix.search.region import Region
from mergemix.search.surrogate_search import SurrogateSearch
from mergemix.search.tree import Tree

_KINDS: tuple[type[Search], ...] = (CmaSearch, BoSearch, SurrogateSearch, RandomSearch, GridSearch)
SEARCHES = {search.kind: search for search in _KINDS}


def open_search(
    kind: str,
    names: Sequence[str],
    *,
    budget: int,
    seed: int = 0,
    prior: Mixture | None = None,
    region: Region | None = None,
    batch: int = 1,
    groups: Sequence[Patterns] = (),
    tree: Tree | None = None,
    interval: float | None = None,
    surrogate: str | None = None,
    layout: str = "maximin",
) -> Search:
    """A fresh search over mixtures of `names`; resume it by telling it the stored scores.

    budget: distinct candidates, start points included. seed: an integer >= 0. region: the allowed mixtures, all by
    default. batch: how many candidates the evaluator answers at once. groups: layer groups to search after the whole
    model, with half of the budget. tree: of domains, searched cluster by cluster. interval: where a search with a
    model of the utility stops, see ModelledSearch; others ignore it. surrogate, layout: model and design of the
    surrogate search.
    Raises ConfigError on an unknown kind, fewer than two experts, a budget that does not cover the start
    points, a negative seed, or a prior that is not a mixture of `names`.
    """
    if kind not in SEARCHES:
        raise ConfigError(f"--search must be one of {', '.join(SEARCHES)}, but is {kind!r}")
    if seed < 0:
        raise ConfigError(f"--seed must be an integer >= 0, but is {seed}")
    check_experts(names)
    region = region or Region.simplex(names)
    search = SEARCHES[kind]
    options: dict[str, Any] = {"batch": batch}
    if issubclass(search, ModelledSearch):
        options["interval"] = interval
    if issubclass(search, SurrogateSearch):
        options |= {"layout": layout, **({} if surrogate is None else {"surrogate": surrogate})}
    if tree is not None:

        def open_inner(children: Sequence[str], budget: int, seed: int) -> Search:
            return search(children, budget=budget, seed=seed, prior=None, **options)

        return HierarchicalSearch(
            tree, open_inner, names, budget=budget, seed=seed, prior=prior, region=region
        )
    if not groups:
        return search(names, budget=budget, seed=seed, prior=prior, region=region, **options)
    half = max(budget // 2, min(budget, len(region.start_points(prior))))
    inner = search(names, budget=half, seed=seed, prior=prior, region=region, **options)
    return BlockwiseSearch(inner, groups, budget=budget, seed=seed)
