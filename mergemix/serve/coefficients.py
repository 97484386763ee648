"""Which tensors of a family get which weights of a mixture. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.mixture import NO_GROUP, Mixture, tensor_groups


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
    groups = tensor_groups(mixture.patterns, tuple(family.template.tensors))
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
