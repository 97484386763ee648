"""From a mixture to one fp32 coefficient per operand and tensor. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture

NO_GROUP = -1  # a tensor that has the mixture's own weights


def operands(family: Family) -> tuple[Checkpoint, ...]:
    """Who is summed, in the order of summation: the base where there is one, then the experts.

    Raises ConfigError for an expert that is a LoRA adapter.
    """
    whole = tuple(member for member in family.members if isinstance(member, Checkpoint))
    if len(whole) < len(family.members):
        adapter = next(each for each in family.experts if not isinstance(each, Checkpoint))
        base = "BASE" if family.base is None else family.base.source
        raise ConfigError(
            f"LoRA adapters cannot be served live yet, and {adapter.name} ({adapter.source}) is one: write each such "
            f"expert with `mergemix merge --base {base} --experts {adapter.name}={adapter.source} "
            f"--weights {adapter.name}=1 --out DIR` and give DIR"
        )
    return whole


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


def group_coefficients(
    family: Family, mixture: Mixture, groups: Sequence[int]
) -> dict[int, tuple[float, ...]]:
    """The fp32 coefficients of `operands(family)` by group, of each that is in `groups`; 0.0: it is not read.

    Raises ConfigError when the mixture is not over the family's experts, or needs a base that is not there.
    """
    weights = {number: group.weights for number, group in enumerate(mixture.groups)}
    weights[NO_GROUP] = mixture.weights
    return {
        number: tuple(family.coefficients(Mixture(mixture.names, weights[number]))) for number in set(groups)
    }


def check_mixture(family: Family, mixture: Mixture) -> None:
    """Raise ConfigError for a mixture that the family cannot give."""
    names = list(family.template.tensors)
    group_coefficients(family, mixture, tensor_groups(group_patterns(mixture), names))
