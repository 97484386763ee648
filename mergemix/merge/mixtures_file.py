"""The file of `mergemix merge --mixtures`: one mixture a line, as JSON; each becomes a checkpoint of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.strict_json import parse_object, read_bounded, shown
from mergemix.errors import CheckpointError, ConfigError
from mergemix.mixture import LayerGroup, Mixture

MAX_NAME_LENGTH = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")  # a directory's name on every file system
KEYS = ("name", "weights", "groups")
GROUP_KEYS = ("tensors", "weights")


@dataclass(frozen=True)
class Recipe:
    """One output of a merge. name: of its directory. given: the weights as the user wrote them."""

    name: str
    given: Mapping[str, float]
    mixture: Mixture


def read_mixtures(path: Path, experts: Sequence[str], *, normalize: bool = True) -> list[Recipe]:
    """The mixtures of a JSON Lines file, in its order.

    A line is {"name": "m1", "weights": {"math": 0.5, ...}}, or the weights alone; a mixture without a name is
    called mixture-0001 and so on, after its place among the mixtures. "groups" may give tensors weights of their own,
    see `parse_mixture`. Empty lines, CRLF and a byte order mark are accepted. normalize: as for Mixture.of.
    Raises ConfigError, which names the line, on anything else, and on names that repeat.
    """
    recipes: list[Recipe] = []
    lines: dict[str, int] = {}
    for number, raw in enumerate(_read(path).split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        name, content = _parse(raw.strip(), where)
        name = f"mixture-{len(recipes) + 1:04}" if name is None else name
        folded = name.casefold()  # file systems that ignore case would mix the two
        if folded in lines:
            raise ConfigError(
                f"{where}: the name {name!r} is taken by the mixture of line {lines[folded]}; each gets a "
                "directory of its own, so names must differ in more than case"
            )
        lines[folded] = number
        mixture = parse_mixture(content, experts, where, normalize=normalize)
        recipes.append(Recipe(name, content["weights"], mixture))
    if not recipes:
        raise ConfigError(f"{path} holds no mixtures; write one a line, such as {_example(experts)}")
    return recipes


def _read(path: Path) -> bytes:
    """The file's bytes without a byte order mark."""
    try:
        raw = read_bounded(path, "the mixtures ")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    return raw.removeprefix(b"\xef\xbb\xbf")


def parse_mixture(
    content: Mapping[str, Any], experts: Sequence[str], where: str, *, normalize: bool = True
) -> Mixture:
    """The mixture {"weights": {"math": 0.5, ...}, "groups": [{"tensors": ["*.mlp.*"], "weights": {...}}, ...]}.

    "groups" may be absent. Tensors whose name matches a pattern of a group take its weights, of the first that does;
    all others take the overall ones. where: for messages.
    Raises ConfigError on anything else, and as Mixture.of.
    """
    weights, groups = content.get("weights"), content.get("groups", [])
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}: 'weights' must map experts to numbers, but is {shown(weights)}")
    if not isinstance(groups, list):
        raise ConfigError(f"{where}: 'groups' must be a list, but is {shown(groups)}")
    try:
        overall = Mixture.of(experts, _weights(weights, where), normalize=normalize)
        parsed = [_group(group, experts, where, normalize) for group in groups]
        return Mixture(overall.names, overall.weights, tuple(parsed))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(where) else f"{where}: {message}") from None


def _group(group: Any, experts: Sequence[str], where: str, normalize: bool) -> LayerGroup:
    if not isinstance(group, dict) or set(group) != set(GROUP_KEYS):
        raise ConfigError(
            f"{where}: a group must hold {' and '.join(map(repr, GROUP_KEYS))}, but is {shown(group)}"
        )
    tensors = [group["tensors"]] if isinstance(group["tensors"], str) else group["tensors"]
    if not isinstance(tensors, list) or not tensors or not all(isinstance(t, str) and t for t in tensors):
        raise ConfigError(
            f"{where}: 'tensors' of a group must be patterns of tensor names such as \"*.mlp.*\", "
            f"but is {shown(tensors)}"
        )
    if not isinstance(group["weights"], dict):
        raise ConfigError(f"{where}: 'weights' must map experts to numbers, but is {shown(group['weights'])}")
    mixture = Mixture.of(experts, _weights(group["weights"], where), normalize=normalize)
    return LayerGroup(tuple(tensors), mixture.weights)


def _parse(raw: bytes, where: str) -> tuple[str | None, dict[str, Any]]:
    """Name (None: none was given), and weights and groups of one line."""
    try:
        content = parse_object(raw, where)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    # An expert may be called "weights" or "name" too, but its value is a number then.
    if not isinstance(content.get("weights"), dict) and not isinstance(content.get("name"), str):
        return None, {"weights": _weights(content, where)}
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {shown(unknown[0])}; a line holds {' and '.join(map(repr, KEYS))}, or the "
            "weights alone"
        )
    weights = content.get("weights")
    if not isinstance(weights, dict):
        raise ConfigError(f"{where}: 'weights' must map experts to numbers, but is {shown(weights)}")
    name = content.get("name")
    if "name" in content:
        _check_name(name, where)
    return name, {**content, "weights": _weights(weights, where)}


def _weights(weights: Mapping[str, Any], where: str) -> dict[str, float]:
    checked = {}
    for expert, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(
                f"{where}: the weight of {shown(expert)} must be a number, but is {shown(weight)}"
            )
        try:
            checked[expert] = float(weight)
        except OverflowError:
            raise ConfigError(f"{where}: the weight of {shown(expert)} is too large") from None
    return checked


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"{where}: a mixture's name becomes a directory: it must be 1 to {MAX_NAME_LENGTH} letters, digits "
            f"or any of . _ + = -, and begin with a letter or digit, but is {shown(name)}"
        )


def _example(experts: Sequence[str]) -> str:
    weights = ", ".join(f'"{expert}": {1 / len(experts):.3g}' for expert in experts)
    return f'{{"name": "m1", "weights": {{{weights}}}}}'
