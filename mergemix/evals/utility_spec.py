"""What `--utility` says: a goal over capability scores, and floors that a mixture must not fall below.

    GOAL[; CAPABILITY >= LIMIT]...

    GOAL    macro             the mean over all capabilities
            worst             the lowest of all capabilities
            NAME              one capability
            NAME=W,NAME=W     a weighted mean, W >= 0
            FILE.yaml, .json  the same, from a file that maps capabilities to weights
            an expression     numbers, capabilities, + - * / **, parentheses, min() max() mean() sqrt()
    LIMIT   a number, or a reference: base, uniform or an expert's name, which is what that one scores there
    `all >= LIMIT` is a floor under every capability.

In an expression a name that Python does not take stands in quotes, "long-context"; quotes also tell a capability from
the words macro and worst. All scores are normalised ones (`--normalize`), and so are the numbers among the limits.

What a floor does. For each unit that a capability is below its floor, FLOOR_FACTOR units are taken off the utility.
That leads a search back from wherever it is, but is no prohibition: what falls short by little may have the higher
number. Where a winner is named, mixtures that meet all floors come first, and the number decides among these
(`utility.preference`). Measured scores have noise: a mixture on the floor itself falls short half of the time.

What is affine without floors, as 0.7*math + 0.3*code is, is known as such (`UtilitySpec.affine`): it can be raced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.expression import Affine, Expression, check_capability
from mergemix.evals.files import nearest, read_yaml

FLOOR_FACTOR = 10.0
FILE_SUFFIXES = (".yaml", ".yml", ".json")
_QUOTED_OR_SEMICOLON = re.compile(r""""[^"]*"|'[^']*'|(;)""")

CapabilityScores = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Floor:
    """capability: its name. limit: a normalised score, or the name of the reference whose score it is."""

    capability: str
    limit: float | str

    def __str__(self) -> str:
        return f"{self.capability} >= {self.limit}"


@dataclass(frozen=True)
class UtilitySpec:
    """A utility that has been read and checked.

    text: a spec that means the same and reads no file: part of a study's identity. capabilities: all there are.
    goal: of the capability scores. floors: one per capability and limit.
    """

    text: str
    capabilities: tuple[str, ...]
    goal: Expression
    floors: tuple[Floor, ...] = ()

    @property
    def affine(self) -> Affine | None:
        """(offset, weights by capability, none 0) where the utility is that; None where it is not linear."""
        return None if self.floors else self.goal.affine

    @property
    def counted(self) -> tuple[str, ...]:
        """The capabilities that it depends on, in their order."""
        used = self.goal.names | {floor.capability for floor in self.floors}
        return tuple(name for name in self.capabilities if name in used)

    @property
    def references(self) -> frozenset[str]:
        """Names of the references whose scores its floors need."""
        return frozenset(floor.limit for floor in self.floors if isinstance(floor.limit, str))


@dataclass(frozen=True)
class Objective:
    """A utility of normalised capability scores, for many mixtures at once. limits: of the floors, as numbers."""

    spec: UtilitySpec
    limits: tuple[float, ...]

    def __call__(self, scores: CapabilityScores) -> np.ndarray:
        """The utility, shape (n,), from scores of shape (n,) of every capability that counts.

        -inf where the goal has no finite value, as the square root of a negative score: nobody wants to go there.
        """
        value = self.spec.goal(scores) - FLOOR_FACTOR * self.shortfall(scores)
        return np.where(np.isfinite(value), value, -np.inf)

    def shortfall(self, scores: CapabilityScores) -> np.ndarray:
        """By how much all floors together are missed, shape (n,); 0 where all are met."""
        missed = [np.zeros(np.shape(next(iter(scores.values()))))]
        missed += [np.maximum(limit - scores[floor.capability], 0.0) for floor, limit in self._floors()]
        return np.sum(missed, axis=0)

    def shortfalls(self, scores: Mapping[str, float]) -> dict[str, float]:
        """By how much one mixture misses each floor that it does not meet."""
        missed = {str(floor): limit - float(scores[floor.capability]) for floor, limit in self._floors()}
        return {text: amount for text, amount in missed.items() if amount > 0}

    def _floors(self) -> list[tuple[Floor, float]]:
        return list(zip(self.spec.floors, self.limits, strict=True))


def parse_utility(
    spec: str, capabilities: Sequence[str], references: Sequence[str] | None = None
) -> UtilitySpec:
    """Read and check a spec, before anything costs.

    references: names that floors may take as limits; not checked without. A weights file is read here.
    Raises ConfigError on unknown names (with the nearest), a name given twice, weights without a positive sum, a file
    that cannot be used, or anything in an expression that is not arithmetic.
    """
    goal_text, *floor_texts = (part.strip() for part in _parts(spec))
    text, goal = _goal(goal_text, capabilities)
    floors = tuple(
        dict.fromkeys(floor for each in floor_texts for floor in _floor(each, capabilities, references))
    )
    text = "; ".join((text, *floor_texts))
    return UtilitySpec(text, tuple(capabilities), goal, floors)


def capability_objective(
    spec: str | UtilitySpec,
    capabilities: Sequence[str],
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> Objective:
    """The utility as a function of normalised capability scores.

    references: normalised score by capability of each reference (base, uniform, experts).
    Raises ConfigError as `parse_utility`, or when a floor's reference has no scores.
    """
    parsed = parse_utility(spec, capabilities) if isinstance(spec, str) else spec
    limits = []
    for floor in parsed.floors:
        if isinstance(floor.limit, str):
            _check_reference(floor.limit, list(references or {}), str(floor))
            limits.append(float((references or {})[floor.limit][floor.capability]))
        else:
            limits.append(floor.limit)
    return Objective(parsed, tuple(limits))


def _parts(spec: str) -> list[str]:
    """Split at semicolons that are not in quotes."""
    cuts = [match.start() for match in _QUOTED_OR_SEMICOLON.finditer(spec) if match.group(1)]
    return [spec[begin + 1 : end] for begin, end in zip([-1, *cuts], [*cuts, len(spec)], strict=True)]


def _goal(text: str, capabilities: Sequence[str]) -> tuple[str, Expression]:
    """(spec that reads no file, goal)."""
    if not text:
        raise ConfigError(
            "a utility must begin with its goal, but it is empty; write macro, worst, a capability, "
            f"weights or an expression (capabilities: {', '.join(sorted(capabilities))})"
        )
    if text in capabilities and text not in ("macro", "worst"):
        return text, Expression.weighted({text: 1.0})
    if text == "macro":
        return text, Expression.weighted({name: 1 / len(capabilities) for name in capabilities})
    if text.endswith(FILE_SUFFIXES):
        weights = _read_weights(Path(text), capabilities)
        return ",".join(f"{_quoted(name)}={weight!r}" for name, weight in weights.items()), _mean(weights)
    if "=" in text and ("(" not in text or any("(" in name for name in capabilities)):
        return text, _mean(_listed(text, capabilities))
    return text, Expression.parse(text, capabilities)


def _mean(weights: Mapping[str, float]) -> Expression:
    total = math.fsum(weights.values())
    return Expression.weighted({name: weight / total for name, weight in weights.items() if weight})


def _listed(text: str, capabilities: Sequence[str]) -> dict[str, float]:
    """The weights in NAME=W,NAME=W."""
    if re.search("[<>!]", text) or "==" in text:
        raise ConfigError(
            f"a utility begins with its goal, and floors follow after a semicolon, but its goal is {text!r}: "
            "write for example 'macro; math >= 0.4'"
        )
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        name = _unquoted(name)
        check_capability(name, capabilities, text)
        if name in weights:
            raise ConfigError(f"utility {text!r} names {name!r} twice")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        _check_weight(name, weights[name], value)
    _check_sum(weights, repr(text))
    return weights


def _read_weights(path: Path, capabilities: Sequence[str]) -> dict[str, float]:
    """The weights in a YAML or JSON file (JSON is YAML)."""
    try:
        content = read_yaml(path)
    except BenchmarkError as error:
        raise ConfigError(f"the weights of a utility: {error}") from None
    weights: dict[str, float] = {}
    for name, value in content.items():
        try:
            check_capability(str(name), capabilities, str(name))
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _check_weight(str(name), float(value) if number else math.nan, value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        weights[str(name)] = float(value)
    _check_sum(weights, str(path))
    return weights


def _check_weight(name: str, weight: float, given: object) -> None:
    if not 0 <= weight < math.inf:
        raise ConfigError(f"the weight of capability {name!r} must be a finite number >= 0, but is {given!r}")


def _check_sum(weights: Mapping[str, float], where: str) -> None:
    total = math.fsum(weights.values())
    if not 0 < total < math.inf:
        raise ConfigError(f"the weights of a utility must have a positive sum, but {where} sums to {total}")


def _floor(text: str, capabilities: Sequence[str], references: Sequence[str] | None) -> list[Floor]:
    """The floors in NAME >= LIMIT: one, or of all capabilities."""
    name, sign, limit = (piece.strip() for piece in text.partition(">="))
    if not sign or not name or not limit or re.search("[<>=]", limit):
        raise ConfigError(
            f"a floor of a utility must be CAPABILITY >= LIMIT, with a number, base, uniform or an expert as the "
            f"limit, but is {text!r}: write for example 'macro; math >= 0.4; all >= base'"
        )
    quoted, name = name != _unquoted(name), _unquoted(name)
    if name != "all" or quoted:
        check_capability(name, capabilities, text)
    try:
        value: float | str = float(limit)
    except ValueError:
        value = _unquoted(limit)
    if isinstance(value, str):
        if references is not None:
            _check_reference(value, references, text)
    elif not math.isfinite(value):
        raise ConfigError(f"the limit of a floor must be a finite number or a reference, but {text!r}")
    names = capabilities if name == "all" and not quoted else [name]
    return [Floor(each, value) for each in names]


def _check_reference(name: str, known: Sequence[str], floor: str) -> None:
    if name in known:
        return
    if name == "base":
        raise ConfigError(f"the floor {floor!r} needs the scores of the base; give --base, or a number")
    raise ConfigError(
        f"the limit of a floor must be a number or a mixture that is scored in any case, but {floor!r} names "
        f"{name!r}; {nearest(name, known)}"
    )


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[\w .-]+", name) else f'"{name}"'


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
