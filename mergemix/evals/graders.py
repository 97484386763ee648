"""Graders: is this generated text the reference answer?

A grader is a small frozen dataclass: its fields are the options a benchmark file may set, calling it
with (text, reference) gives the verdict. `choice` is the exception: it grades no text but the
log-likelihoods of an item's choices, see `most_likely`.
"""

from __future__ import annotations

import dataclasses
import decimal
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mergemix.errors import BenchmarkError
from mergemix.evals.files import Section, nearest

# A sign counts only where it cannot be a minus between two numbers or a hyphen in a word ("3-5" ends in 5).
# Exponents of more than four digits are no numbers that a benchmark asks for.
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)])[-+\u2212])?\$?"
    rf"(?:(?P<top>{_INTEGER})\s?/\s?(?P<bottom>0*[1-9]\d*)(?!\d|\.\d)"
    rf"|(?P<number>(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,4}}(?!\d))?))"
)
_DECIMAL = decimal.Context(prec=60, Emin=-99999, Emax=99999, traps=[])


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None.

    Read are signs, thousands separated by commas, decimals, scientific notation and fractions of
    whole numbers ("3/4"); a currency or percent sign is passed over.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    if match["number"]:
        value = Decimal(match["number"].replace(",", ""))
    else:
        value = _DECIMAL.divide(Decimal(match["top"].replace(",", "")), Decimal(match["bottom"]))
    return value.copy_negate() if match["sign"] in ("-", "\u2212") else value


def _same(text: str, reference: str, ignore_case: bool) -> bool:
    text, reference = text.strip(), reference.strip()
    return text.casefold() == reference.casefold() if ignore_case else text == reference


@dataclass(frozen=True)
class Exact:
    """The text is the reference, apart from white space around either."""

    ignore_case: bool = False

    def __call__(self, text: str, reference: str) -> bool:
        return _same(text, reference, self.ignore_case)


@dataclass(frozen=True)
class Numeric:
    """The last number in the text is that of the reference, within the absolute `tolerance`."""

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a finite number >= 0, but is {self.tolerance}")

    def __call__(self, text: str, reference: str) -> bool:
        given, wanted = last_number(text), last_number(reference)
        if given is None or wanted is None:
            return False
        # repr: a tolerance of 0.1 means one tenth, not the double nearest to it.
        return given == wanted or abs(_DECIMAL.subtract(given, wanted)) <= Decimal(repr(self.tolerance))


@dataclass(frozen=True)
class Regex:
    """What the first match of `pattern` captured is the reference.

    group: number or name of the group that holds the answer; by default the first group, or the
    whole match of a pattern without groups.
    """

    pattern: str
    group: int | str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern must be a regular expression, but {self.pattern!r} is not: {error}"
            ) from None
        known = [*range(compiled.groups + 1), *compiled.groupindex]
        if self.group is not None and self.group not in known:
            raise ValueError(f"group must be one of {known} in {self.pattern!r}, but is {self.group!r}")

    def __call__(self, text: str, reference: str) -> bool:
        match = re.search(self.pattern, text, re.IGNORECASE if self.ignore_case else 0)
        if match is None:
            return False
        captured = match[self.group if self.group is not None else min(1, match.re.groups)]
        return captured is not None and _same(captured, reference, self.ignore_case)


@dataclass(frozen=True)
class Contains:
    """The reference occurs in the text."""

    ignore_case: bool = False

    def __call__(self, text: str, reference: str) -> bool:
        if self.ignore_case:
            text, reference = text.casefold(), reference.casefold()
        return reference.strip() in text


@dataclass(frozen=True)
class Choice:
    """The likeliest of the item's choices is the reference; nothing is generated."""


Grader = Exact | Numeric | Regex | Contains | Choice
GRADERS: dict[str, type[Grader]] = {
    "exact": Exact,
    "numeric": Numeric,
    "regex": Regex,
    "contains": Contains,
    "choice": Choice,
}


def make_grader(spec: Any, where: str) -> Grader:
    """A grader from `grader: NAME` or `grader: {name: NAME, OPTION: VALUE, ...}` in a benchmark file.

    Raises BenchmarkError on an unknown name or option, or a value of the wrong type or range.
    """
    given: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else {"name": spec}
    name = given.get("name")
    if not isinstance(name, str) or name not in GRADERS:
        raise BenchmarkError(f"{where}: unknown grader {name!r}; {nearest(name, GRADERS)}")
    kind = GRADERS[name]
    where = f"{where}: grader {name}"
    section = Section(given, where, ["name", *(option.name for option in dataclasses.fields(kind))])
    options = {key: value for key, value in given.items() if key != "name"}
    hints = typing.get_type_hints(kind)
    for option in dataclasses.fields(kind):
        if option.name in options:
            _check_type(section, option.name, hints[option.name])
        elif option.default is dataclasses.MISSING:
            raise BenchmarkError(f"{where}: needs the option {option.name!r}")
    try:
        return kind(**options)
    except ValueError as error:
        raise BenchmarkError(f"{where}: {error}") from None


def _check_type(section: Section, key: str, hint: Any) -> None:
    value = section.values[key]
    accepted = float | int if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        rule = {bool: "true or false", str: "text", float: "a number (YAML needs a dot: 1.0e-6)"}
        raise section.error(key, rule.get(hint, "a number or a name"))


def grade(grader: Grader, text: str, references: Sequence[str]) -> float:
    """1.0 if the text is any of the accepted references, else 0.0."""
    assert not isinstance(grader, Choice), "choice grades log-likelihoods, not text"
    return float(any(grader(text, reference) for reference in references))


def most_likely(logprobs: Sequence[float]) -> int:
    """Index of the highest log-likelihood; the first one on a tie."""
    return max(range(len(logprobs)), key=lambda index: logprobs[index])
