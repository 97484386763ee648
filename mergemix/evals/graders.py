"""Graders: is this generated text the reference answer?

A grader is a small frozen dataclass: its fields are the options a benchmark file may set. Calling a text grader with
(text, reference) gives the verdict. `Choice` and `Code` compare with no reference: the one looks at an item's choices,
the other runs its unit tests.
"""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mergemix.evals.choices import NORMALIZED_BY
from mergemix.evals.extract import captured, check_pattern
from mergemix.evals.files import make_named, nearest

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
        check_pattern(self.pattern, self.group)

    def __call__(self, text: str, reference: str) -> bool:
        match = re.search(self.pattern, text, re.IGNORECASE if self.ignore_case else 0)
        found = None if match is None else captured(match, self.group)
        return found is not None and _same(found, reference, self.ignore_case)


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
    """One of the item's choices is right.

    by: "likelihood" generates nothing, the likeliest choice is the answer; "generation" shows the choices by letter and
    reads what the model writes (`choices.chosen`). normalize: what log-likelihoods are divided by (NORMALIZED_BY).
    """

    by: str = "likelihood"
    normalize: str = "none"

    def __post_init__(self) -> None:
        for key, known in (("by", ("likelihood", "generation")), ("normalize", NORMALIZED_BY)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"unknown {key} {getattr(self, key)!r}; {nearest(getattr(self, key), known)}"
                )
        if self.by == "generation" and self.normalize != "none":
            raise ValueError("normalize is for log-likelihoods, and there are none by: generation; remove it")


@dataclass(frozen=True)
class Code:
    """The program prefix + answer + suffix passes the item's unit tests, in a sandbox.

    tests, prefix, suffix: templates over the item's fields. timeout_s: the most wall time, and CPU time, that one run
    takes; None is the sandbox's default.
    """

    tests: str
    prefix: str = ""
    suffix: str = ""
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a number of seconds > 0, but is {self.timeout_s}")


TextGrader = Exact | Numeric | Regex | Contains
Grader = TextGrader | Choice | Code
GRADERS: dict[str, type[Grader]] = {
    "exact": Exact,
    "numeric": Numeric,
    "regex": Regex,
    "contains": Contains,
    "choice": Choice,
    "code": Code,
}


def make_grader(spec: Any, where: str) -> Grader:
    """A grader from `grader: NAME` or `grader: {name: NAME, OPTION: VALUE, ...}`; errors as `make_named`."""
    return make_named(spec, GRADERS, "grader", where)


def grade(grader: TextGrader, text: str, references: Sequence[str]) -> float:
    """1.0 if the text is any of the accepted references, else 0.0."""
    return float(any(grader(text, reference) for reference in references))
