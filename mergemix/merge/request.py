"""One merge, as the command line asks for it: the same for doing it and for foretelling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError
from mergemix.merge.average import Selection
from mergemix.merge.directory import merge_many, merge_to_directory
from mergemix.merge.mixtures_file import Recipe, read_mixtures
from mergemix.merge.plan import MergePlan, plan_merge
from mergemix.merge.stream import MergeStats
from mergemix.mixture import Mixture


@dataclass(frozen=True)
class MergeRequest:
    """recipes: what is made. many: each in `out`/<its name>, else the only one in `out` itself."""

    family: Family
    recipes: tuple[Recipe, ...]
    out: Path
    memory_bytes: int
    many: bool = False

    @cached_property
    def plan(self) -> MergePlan:
        return plan_merge(self.family, [recipe.mixture for recipe in self.recipes])

    def run(self, progress: Callable[[int], None] | None = None) -> MergeStats:
        """Do it. Raises what merge_to_directory and merge_many raise."""
        if not self.many:
            (recipe,) = self.recipes
            return merge_to_directory(
                self.family, recipe.mixture, self.out, memory_bytes=self.memory_bytes, progress=progress
            )
        mixtures = {recipe.name: recipe.mixture for recipe in self.recipes}
        return merge_many(self.family, mixtures, self.out, memory_bytes=self.memory_bytes, progress=progress)

    def as_dict(self) -> dict[str, Any]:
        """Where the result goes and what it is made of, for programs."""
        if not self.many:
            (recipe,) = self.recipes
            return {"out": str(self.out), **_weights(recipe)}
        outputs = [
            {"name": recipe.name, "out": str(self.out / recipe.name), **_weights(recipe)}
            for recipe in self.recipes
        ]
        return {"out": str(self.out), "outputs": outputs}


def open_request(
    base: str | None,
    experts: Mapping[str, str],
    *,
    weights: Mapping[str, float] | None,
    mixtures: Path | None,
    out: Path,
    memory_bytes: int,
    normalize: bool,
    download: bool,
) -> MergeRequest:
    """Understand the options, then open the checkpoints. One of weights (of one merge) and mixtures (a file) is None.

    Raises ConfigError for options that make no sense, and what open_family raises.
    """
    if not experts or (len(experts) == 1 and base is None):
        raise ConfigError(
            f"a merge needs two checkpoints or more, but got {len(experts)} expert{'' if experts else 's'} "
            "and no base; give --experts NAME=PATH once per expert"
        )
    recipes = _recipes(list(experts), weights, mixtures, normalize=normalize)
    family = open_family(base, experts, download=download)
    return MergeRequest(family, recipes, out, memory_bytes, many=mixtures is not None)


def average_request(chosen: Selection, *, out: Path, memory_bytes: int, download: bool) -> MergeRequest:
    """Open what was chosen. Raises ConfigError for weights that cannot be normalised, and what open_family raises."""
    recipe = Recipe("", chosen.given, chosen.mixture)
    family = open_family(None, {each.name: each.source for each in chosen.taken}, download=download)
    return MergeRequest(family, (recipe,), out, memory_bytes)


def _recipes(
    names: Sequence[str], weights: Mapping[str, float] | None, mixtures: Path | None, *, normalize: bool
) -> tuple[Recipe, ...]:
    if mixtures is not None:
        return tuple(read_mixtures(mixtures, names, normalize=normalize))
    given = dict(weights or {})
    return (Recipe("", given, Mixture.of(names, given, normalize=normalize)),)


def _weights(recipe: Recipe) -> dict[str, Any]:
    return {"given": dict(recipe.given), **recipe.mixture.describe()}
