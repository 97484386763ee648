"""Layer groups: which tensors of a model get weights of their own, as patterns of their names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import tensor_groups

Patterns = tuple[str, ...]


def layer_groups(spec: str, tensors: Iterable[str]) -> tuple[Patterns, ...]:
    """The groups that a user asked for, of a model with these tensors.

    spec: "8" divides the numbered layers into 8 runs of neighbours, as equal as can be;
    "attn=*.self_attn.*,mlp=*.mlp.*" names them by patterns of tensor names, "|" between several of one group. What is
    in no group (embeddings, the last norm, the head) keeps the overall weights.
    Raises ConfigError for more groups than layers, a pattern that matches nothing or a group that earlier ones leave
    nothing, and for text that is neither.
    """
    spec, tensors = spec.strip(), list(tensors)
    if spec.isdecimal() and spec.isascii():
        return _runs(int(spec), tensors)
    groups: dict[str, Patterns] = {}
    for part in spec.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        patterns = tuple(pattern.strip() for pattern in text.split("|"))
        if not (name and equals and all(patterns)):
            raise ConfigError(
                "layer groups must be a number, or NAME=PATTERN with commas between groups, as in "
                f"attn=*.self_attn.*,mlp=*.mlp.*, but {part.strip()!r} is neither"
            )
        if name in groups:
            raise ConfigError(f"layer groups must have different names, but {name!r} is given twice")
        groups[name] = patterns
    held = tensor_groups(tuple(groups.values()), tuple(tensors))
    for number, name in enumerate(groups):
        if number not in held:
            raise ConfigError(
                f"layer groups must hold tensors of their own, but all of {name!r} are in groups before it: "
                "a tensor belongs to the first that matches"
            )
    return tuple(groups.values())


def _runs(count: int, tensors: Iterable[str]) -> tuple[Patterns, ...]:
    prefix, numbers = _layers(tensors)
    if not 1 <= count <= len(numbers):
        raise ConfigError(
            f"layer groups must be from 1 to the model's {len(numbers)} numbered layers, but are {count}"
        )
    return tuple(tuple(f"{prefix}{number}.*" for number in run) for run in np.array_split(numbers, count))


def _layers(tensors: Iterable[str]) -> tuple[str, list[int]]:
    """What stands before the number of a layer, and the numbers.

    A layer's number is the first one in a tensor's dotted name (later ones number experts). Of several stacks of
    layers the one with the most tensors counts.
    """
    stacks: dict[str, list[int]] = defaultdict(list)
    for name in tensors:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if place is not None:
            stacks["".join(f"{part}." for part in parts[:place])].append(int(parts[place]))
    if not stacks:
        return "", []
    prefix = max(stacks, key=lambda stack: len(stacks[stack]))
    return prefix, sorted(set(stacks[prefix]))
