"""Which tensors of a family get which weights of a mixture. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture

NO_GROUP = -1  # a tensor that has the mixture's own weights


def group_patterns(mixture: Mixture) -> tuple[tuple[str, ...], ...]:
    """What decides which tensor has which weights; mixtures of one search share it."""
    return tuple(group.tensors for group in mixture.groups)


def tensor_groups(patterns: Sequence[Sequence[str]], tensors: Sequence[str]) -> list[int]:
    """For each tensor the first group with a matching pattern, or NO_GROUP.

    Raises ConfigError for a pattern that no tensor matches.
    """
    found = [NO_GROUP] * len(tensors)
    for number, group in enumerate(patterns):
        for pattern in group:
            matching = [i for i, name in enumerate(tensors) if fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(
                    f"a layer group's pattern must match tensors of the checkpoints, but {pattern!r} matches none of "
                    f"{len(tensors)} such as {tensors[len(tensors) // 2]!r}: correct it, or leave it out"
                )
            for i in matching:
                if found[i] == NO_GROUP:
                    found[i] = number
    return found


def group_mixtures(family: Family, mixture: Mixture, groups: Sequence[int]) -> dict[int, Mixture]:
    """The weights of each group that is in `groups`, as a mixture without groups.

    Raises ConfigError when the mixture is not over the family's experts.
    """
    family.check_names(mixture)
    weights = {number: group.weights for number, group in enumerate(mixture.groups)}
    weights[NO_GROUP] = mixture.weights
    return {number: Mixture(mixture.names, weights[number]) for number in set(groups)}


def check_mixture(family: Family, mixture: Mixture) -> None:
    """Raise ConfigError for a mixture that the family cannot give."""
    groups = tensor_groups(group_patterns(mixture), list(family.template.tensors))
    check_weights(family, group_mixtures(family, mixture, groups), groups)


def check_weights(family: Family, mixtures: Mapping[int, Mixture], groups: Sequence[int]) -> None:
    """Raise ConfigError for weights that the family cannot give. mixtures: by group. groups: of each tensor."""
    if all(isinstance(expert, Checkpoint) for expert in family.experts):
        for each in mixtures.values():
            family.coefficients(each)
        return
    tensors = list(zip(family.template.tensors, groups, strict=True))
    for group, holders in {(group, family.holders(name)) for name, group in tensors}:
        family.coefficients(mixtures[group], holders)
    scales = {
        (group, position, delta.scale) for name, group in tensors for position, delta in family.deltas(name)
    }
    for group, position, scale in scales:
        family.low_rank_scale(position, scale, mixtures[group])
