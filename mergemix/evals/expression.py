"""Small arithmetic over names: parsed with `ast`, nothing but what is listed here, never evaluated as Python."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergemix.errors import ConfigError
from mergemix.evals.files import nearest

# (offset, weight by name): offset + sum of weight * value.
Affine = tuple[float, dict[str, float]]

MAX_CHARACTERS = 2000
MAX_DEPTH = 50
ALLOWED = (
    "an expression may hold numbers, capabilities (those with other characters than letters, digits and _ in quotes), "
    "macro, worst, + - * / **, parentheses, and min(), max(), mean(), sqrt()"
)
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
}
# By kind of node: what it makes of the values of its children, shape (children, n).
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "min": lambda values: values.min(axis=0),
    "max": lambda values: values.max(axis=0),
    "mean": lambda values: values.mean(axis=0),
    "sqrt": lambda values: np.sqrt(values[0]),
}
_KINDS = {
    **_FUNCTIONS,
    "+": lambda values: values.sum(axis=0),
    "-": lambda values: values[0] - values[1],
    "*": lambda values: values[0] * values[1],
    "/": lambda values: values[0] / values[1],
    "**": lambda values: values[0] ** values[1],
}


@dataclass(frozen=True)
class Node:
    """One step of a computation: a number, the value of a name, or a kind of _KINDS over children."""

    kind: str = "number"
    children: tuple[Node, ...] = ()
    number: float = 0.0
    name: str = ""

    def value(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        if self.kind == "number":
            return np.array(self.number)
        if self.kind == "name":
            return np.asarray(scores[self.name], dtype=np.float64)
        values = np.broadcast_arrays(*(child.value(scores) for child in self.children))
        return np.asarray(_KINDS[self.kind](np.stack(values)))

    def names(self) -> frozenset[str]:
        own = {self.name} if self.kind == "name" else set()
        return frozenset(own.union(*(child.names() for child in self.children)))

    def affine(self) -> Affine | None:
        """(offset, weights), weights of 0 included; None where this is not known to be affine."""
        if self.kind == "number":
            return self.number, {}
        if self.kind == "name":
            return 0.0, {self.name: 1.0}
        parts = [child.affine() for child in self.children]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        if not any(weights for _, weights in known):  # of numbers alone
            with np.errstate(all="ignore"):
                return float(self.value({})), {}
        if self.kind in ("+", "-", "mean"):
            factors = [1.0, -1.0] if self.kind == "-" else [1.0] * len(known)
            if self.kind == "mean":
                factors = [1 / len(known)] * len(known)
            return _combined(factors, known)
        if self.kind == "*":
            first, second = known if not known[0][1] else known[::-1]
            return None if first[1] else _combined([first[0]], [second])
        if self.kind == "/" and not known[1][1] and known[1][0]:
            return _combined([1 / known[1][0]], known[:1])
        return known[0] if len(known) == 1 and self.kind in ("min", "max") else None


def _combined(factors: Sequence[float], parts: Sequence[Affine]) -> Affine:
    """The sum of factor * part."""
    weights: dict[str, float] = {}
    for factor, (_, own) in zip(factors, parts, strict=True):
        for name, weight in own.items():
            weights[name] = weights.get(name, 0.0) + factor * weight
    return math.fsum(f * offset for f, (offset, _) in zip(factors, parts, strict=True)), weights


@dataclass(frozen=True)
class Expression:
    """A formula over capability scores; see ALLOWED for what it may hold."""

    root: Node

    def __call__(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Its values, shape (n,), NaN or infinite where there is none; scores: shape (n,) by capability."""
        with np.errstate(all="ignore"):
            value = self.root.value(scores)
        return np.broadcast_to(value, np.shape(next(iter(scores.values()))))

    @property
    def names(self) -> frozenset[str]:
        """The capabilities that it holds."""
        return self.root.names()

    @property
    def affine(self) -> Affine | None:
        """(offset, weights by capability, none 0), where it is offset + sum of weight * score."""
        found = self.root.affine()
        if found is None or not all(math.isfinite(value) for value in (found[0], *found[1].values())):
            return None
        return found[0], {name: weight for name, weight in found[1].items() if weight}

    @classmethod
    def weighted(cls, weights: Mapping[str, float]) -> Expression:
        terms = (
            Node("*", (Node(number=weight), Node("name", name=name))) for name, weight in weights.items()
        )
        return cls(Node("+", tuple(terms)))

    @classmethod
    def parse(cls, text: str, capabilities: Sequence[str]) -> Expression:
        """Raises ConfigError for anything but ALLOWED, an unknown capability, or an expression without any."""
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(
                f"a utility must have at most {MAX_CHARACTERS} characters, but has {len(text)}: use a weights file"
            )
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _refused(text, "is not a formula", capabilities) from None
        expression = cls(_Reader(text, capabilities).read(tree.body))
        if not expression.names:
            raise ConfigError(f"a utility must depend on a capability, but {text!r} names none")
        return expression


@dataclass(frozen=True)
class _Reader:
    """From Python's syntax tree to ours, refusing what is not allowed."""

    text: str
    capabilities: Sequence[str]

    def read(self, tree: ast.expr, depth: int = 0) -> Node:
        if depth > MAX_DEPTH:
            raise self._refused(f"is nested more than {MAX_DEPTH} deep")
        match tree:
            case ast.Constant(value=str() as name):
                return self._capability(name)
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return self._number(value)
            case ast.Name(id="macro" | "worst" as word):
                names = tuple(Node("name", name=name) for name in self.capabilities)
                return Node("mean" if word == "macro" else "min", names)
            case ast.Name(id=name):
                return self._capability(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Node("*", (Node(number=-1.0), self.read(operand, depth + 1)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return Node(_OPERATORS[type(op)], (self.read(left, depth + 1), self.read(right, depth + 1)))
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _FUNCTIONS:
                if name == "sqrt" and len(args) != 1:
                    raise self._refused("gives sqrt() more than one argument")
                return Node(name, tuple(self.read(arg, depth + 1) for arg in args))
        part = ast.get_source_segment(self.text, tree) or self.text
        raise self._refused(f"holds {part!r}")

    def _number(self, value: float) -> Node:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._refused("holds a number that is too large")
        return Node(number=number)

    def _capability(self, name: str) -> Node:
        check_capability(name, self.capabilities, self.text)
        return Node("name", name=name)

    def _refused(self, why: str) -> ConfigError:
        return _refused(self.text, why, self.capabilities)


def _refused(text: str, why: str, capabilities: Sequence[str]) -> ConfigError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return ConfigError(
        f"the utility {shown!r} {why}; {ALLOWED} (capabilities: {', '.join(sorted(capabilities))})"
    )


def check_capability(name: str, capabilities: Sequence[str], where: str) -> None:
    """Raises ConfigError for a name that is none; where: the text that it stands in."""
    if name in capabilities:
        return
    hidden = [each for each in capabilities if each != where and not each.isidentifier() and each in where]
    hint = f"write {hidden[0]!r} with its quotes" if hidden else nearest(name, capabilities)
    known = ", ".join(sorted(capabilities))
    raise ConfigError(f"utility names the unknown capability {name!r}; {hint} (capabilities: {known})")
