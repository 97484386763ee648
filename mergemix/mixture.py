"""A mixture: one weight per expert, named by domain."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from mergemix.errors import ConfigError

# A sum this close to one is one: the base then cancels and is not read (design: arithmetic).
SUM_TOLERANCE = 1e-9
NO_GROUP = -1  # a tensor that has the mixture's own weights


@dataclass(frozen=True)
class LayerGroup:
    """Tensors that have weights of their own.

    tensors: patterns of checkpoint tensor names, in which * and ? stand for any characters. weights: as of a Mixture.
    """

    tensors: tuple[str, ...]
    weights: tuple[float, ...]

    def holds(self, tensor: str) -> bool:
        return any(fnmatchcase(tensor, pattern) for pattern in self.tensors)


@dataclass(frozen=True)
class Mixture:
    """Weights a_k of K experts, in the experts' order.

    merged = base + sum_k a_k (expert_k - base); with sum a_k = 1 the base cancels. Frozen and
    hashable; two mixtures are equal when names, weights and groups are.

    names: K distinct expert names. weights: K finite numbers, not necessarily normalised. groups: tensors with other
    weights than these; of several groups that hold a tensor the first counts.
    Raises ConfigError when lengths differ, a name repeats, a weight is not finite, or a group holds nothing.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    groups: tuple[LayerGroup, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"expert names must differ: {self.names}")
        for weights in (self.weights, *(group.weights for group in self.groups)):
            if len(self.names) != len(weights):
                raise ConfigError(
                    f"a mixture needs one weight per expert: {len(self.names)} experts {self.names}, "
                    f"{len(weights)} weights"
                )
            for name, weight in zip(self.names, weights, strict=True):
                if not math.isfinite(weight):
                    raise ConfigError(f"the weight of {name!r} must be a finite number, but is {weight}")
        if any(not group.tensors for group in self.groups):
            raise ConfigError("a layer group must name at least one pattern of tensors")

    @property
    def patterns(self) -> tuple[tuple[str, ...], ...]:
        """Of each group: what decides which tensor has which weights. Mixtures of one search share it."""
        return tuple(group.tensors for group in self.groups)

    def at(self, tensor: str) -> Mixture:
        """The weights of one checkpoint tensor, as a mixture without groups."""
        if not self.groups:
            return self
        weights = next((group.weights for group in self.groups if group.holds(tensor)), self.weights)
        return Mixture(self.names, weights)

    def without_groups(self) -> Mixture:
        """The weights of the tensors that are in no group."""
        return replace(self, groups=()) if self.groups else self

    @classmethod
    def of(cls, names: Sequence[str], given: Mapping[str, float], *, normalize: bool = True) -> Mixture:
        """A mixture over all of `names` from the weights a user named; unnamed experts get 0.

        With `normalize` the weights must be >= 0 with a positive sum, and are divided by it.
        Raises ConfigError on an unknown name or weights that cannot be normalised.
        """
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(
                f"no expert is called {', '.join(map(repr, unknown))}; the experts are {', '.join(names)}"
            )
        weights = [float(given.get(name, 0.0)) for name in names]
        if normalize:
            for name, weight in zip(names, weights, strict=True):
                if not weight >= 0 or math.isinf(weight):
                    raise ConfigError(
                        f"weights to be normalised must be finite and >= 0, but {name}={weight}"
                    )
            total = math.fsum(weights)
            if not 0 < total < math.inf:
                raise ConfigError(
                    f"weights must have a positive, finite sum, but {dict(given)} sums to {total}"
                )
            if total != 1.0:
                weights = [weight / total for weight in weights]
        return cls(tuple(names), tuple(weights))

    @classmethod
    def uniform(cls, names: Sequence[str]) -> Mixture:
        return cls(tuple(names), tuple(1.0 / len(names) for _ in names))

    @classmethod
    def one_hot(cls, names: Sequence[str], name: str) -> Mixture:
        return cls.of(names, {name: 1.0})

    @classmethod
    def base_only(cls, names: Sequence[str]) -> Mixture:
        """All weights zero: the base itself."""
        return cls(tuple(names), tuple(0.0 for _ in names))

    @property
    def base_weight(self) -> float:
        """1 - sum_k a_k: the coefficient of the base; exactly 0.0 when the weights sum to one."""
        rest = 1.0 - math.fsum(self.weights)
        return 0.0 if abs(rest) <= SUM_TOLERANCE else rest

    def coefficients(self) -> list[tuple[str | None, float]]:
        """(operand, coefficient) for every operand that is read: the base (None) first, then experts in order.

        Operands whose coefficient is zero are left out, so a one-hot mixture has a single operand.
        """
        base = [(None, self.base_weight)] if self.base_weight != 0.0 else []
        return [*base, *((n, w) for n, w in zip(self.names, self.weights, strict=True) if w != 0.0)]

    def as_dict(self) -> dict[str, float]:
        """The weights of the tensors that are in no group, by expert."""
        return dict(zip(self.names, self.weights, strict=True))

    def describe(self) -> dict[str, Any]:
        """For programs and records: {"mixture": weights by expert}, and "groups" where there are any."""
        groups = [
            {"tensors": list(g.tensors), "weights": dict(zip(self.names, g.weights, strict=True))}
            for g in self.groups
        ]
        return {"mixture": self.as_dict(), **({"groups": groups} if groups else {})}

    def key(self) -> str:
        """Canonical text, equal exactly when the mixtures are equal; floats round-trip.

        A list of [name, weight]; with groups an object of "weights", that list, and "groups", [patterns, weights] each.
        """
        pairs = [[name, weight + 0.0] for name, weight in zip(self.names, self.weights, strict=True)]
        if not self.groups:
            return json.dumps(pairs)
        groups = [[group.tensors, [weight + 0.0 for weight in group.weights]] for group in self.groups]
        return json.dumps({"weights": pairs, "groups": groups})

    @classmethod
    def from_key(cls, key: str) -> Mixture:
        content: Any = json.loads(key)
        pairs, groups = (
            (content["weights"], content["groups"]) if isinstance(content, dict) else (content, [])
        )
        return cls(
            tuple(name for name, _ in pairs),
            tuple(float(weight) for _, weight in pairs),
            tuple(LayerGroup(tuple(tensors), tuple(map(float, weights))) for tensors, weights in groups),
        )

    def __str__(self) -> str:
        overall = _shown(self.names, self.weights)
        if not self.groups:
            return overall
        own = sum(group.weights != self.weights for group in self.groups)
        return f"{overall} ({own} of {len(self.groups)} layer groups differ)"


@lru_cache(maxsize=16)
def tensor_groups(patterns: tuple[tuple[str, ...], ...], tensors: tuple[str, ...]) -> tuple[int, ...]:
    """For each tensor the number of the first group with a matching pattern, or NO_GROUP.

    Remembered: a search asks for the same at every candidate. Raises ConfigError for a pattern that no tensor matches.
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
    return tuple(found)


def _shown(names: Sequence[str], weights: Sequence[float]) -> str:
    if not any(weights):
        return "base"
    return " ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True) if weight)
