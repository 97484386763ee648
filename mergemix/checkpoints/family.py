"""Checkpoints that can be averaged: one optional base and K experts that agree tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mergemix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import ConfigError, FamilyError

CONFIG_KEYS = ("model_type", "architectures")


@dataclass(frozen=True)
class Family:
    """base: None when no mixture needs it. experts: K >= 1, in the user's order."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @property
    def template(self) -> Checkpoint:
        """Whose config.json, tokenizer and shard layout are used: the base's, else the first expert's."""
        return self.base or self.experts[0]


def open_family(base: str | None, experts: Mapping[str, str]) -> Family:
    """Open the base (None: no base) and the experts, and check that they can be averaged.

    base, experts' values: a directory or a Hub id `org/name[@revision]`. experts: by domain, in order.
    Raises ConfigError without experts, CheckpointError on one that cannot be used, FamilyError where they
    disagree.
    """
    if not experts:
        raise ConfigError("no expert was given; give at least one as NAME=PATH")
    unnamed = [source for name, source in experts.items() if not name.strip()]
    if unnamed:
        raise ConfigError(f"the expert {unnamed[0]!r} has no name; give it as NAME=PATH")
    family = Family(
        base=None if base is None else open_checkpoint("base", base),
        experts=tuple(open_checkpoint(name, source) for name, source in experts.items()),
    )
    check_family(family)
    return family


def check_family(family: Family) -> None:
    """Raise FamilyError unless all members have the same architecture, tensor names, dtypes and shapes.

    The message names the first tensor that differs, both values and both checkpoints.
    """
    first, *others = family.experts if family.base is None else (family.base, *family.experts)
    for other in others:
        _check_configs(first, other)
        _check_tensors(first, other)


def _check_configs(one: Checkpoint, other: Checkpoint) -> None:
    for key in CONFIG_KEYS:
        if one.config.get(key) != other.config.get(key):
            raise FamilyError(
                f"config.json differs in {key}: {_named(one)} has {shown(one.config.get(key))}, "
                f"{_named(other)} has {shown(other.config.get(key))}; experts must come from one base model"
            )


def _check_tensors(one: Checkpoint, other: Checkpoint) -> None:
    for holder, lacking in ((one, other), (other, one)):
        missing = [name for name in holder.tensors if name not in lacking.tensors]
        if missing:
            rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise FamilyError(
                f"tensor {shown(missing[0])}{rest} is in {_named(holder)}, but not in {_named(lacking)}; "
                "experts must have the same tensors"
            )
    for name, tensor in one.tensors.items():
        match = other.tensors[name]
        for what, a, b in (
            ("shape", list(tensor.shape), list(match.shape)),
            ("dtype", tensor.dtype, match.dtype),
        ):
            if a != b:
                raise FamilyError(
                    f"tensor {shown(name)} differs in {what}: {a} in {_named(one)}, {b} in {_named(other)}"
                )


def _named(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name} ({checkpoint.source})"
