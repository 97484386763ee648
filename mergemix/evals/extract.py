"""The answer inside what a model wrote: what is graded of a long text.

An extractor is a small frozen dataclass: its fields are the options a benchmark file may set, calling it with the text
gives the answer, or None where the text holds none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergemix.evals.files import make_named

WHICH = ("first", "last")
_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def check_pattern(pattern: str, group: int | str | None) -> None:
    """Raises ValueError unless `pattern` is a regular expression that has this group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern must be a regular expression, but {pattern!r} is not: {error}") from None
    known = [*range(compiled.groups + 1), *compiled.groupindex]
    if group is not None and group not in known:
        raise ValueError(f"group must be one of {known} in {pattern!r}, but is {group!r}")


def captured(match: re.Match[str], group: int | str | None) -> str | None:
    """What a group captured: by default the first group, or the whole match of a pattern without groups."""
    text: str | None = match[group if group is not None else min(1, match.re.groups)]
    return text


def _check_which(which: str) -> None:
    if which not in WHICH:
        raise ValueError(f"which must be {' or '.join(WHICH)}, but is {which!r}")


def _pick(found: Sequence[str], which: str) -> str | None:
    if not found:
        return None
    return found[0 if which == "first" else -1]


@dataclass(frozen=True)
class Regex:
    """What a match of `pattern` captured; matches in which the group takes no part do not count."""

    pattern: str
    group: int | str | None = None
    which: str = "last"

    def __post_init__(self) -> None:
        check_pattern(self.pattern, self.group)
        _check_which(self.which)

    def __call__(self, text: str) -> str | None:
        matches = (captured(match, self.group) for match in re.finditer(self.pattern, text))
        return _pick([match for match in matches if match is not None], self.which)


@dataclass(frozen=True)
class LastLine:
    """The last line that is not blank, without white space around it."""

    def __call__(self, text: str) -> str | None:
        stripped = text.strip()
        return stripped.splitlines()[-1].strip() if stripped else None


@dataclass(frozen=True)
class Boxed:
    r"""What stands in LaTeX's \boxed{...} (or \fbox{...}); braces nest, a box that is not closed does not count."""

    which: str = "last"

    def __post_init__(self) -> None:
        _check_which(self.which)

    def __call__(self, text: str) -> str | None:
        boxes = (_braced(text, match.end()) for match in _BOXED.finditer(text))
        return _pick([box for box in boxes if box is not None], self.which)


def _braced(text: str, start: int) -> str | None:
    """Text from `start`, just after an opening brace, to the brace that closes it; an escaped brace is text."""
    depth, place = 1, start
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1  # what follows is escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[start:place]
        place += 1
    return None


@dataclass(frozen=True)
class CodeBlock:
    """The inside of a Markdown code block between fences; the text may end before the block's fence does."""

    which: str = "last"

    def __post_init__(self) -> None:
        _check_which(self.which)

    def __call__(self, text: str) -> str | None:
        return _pick(_code_blocks(text), self.which)


def _code_blocks(text: str) -> list[str]:
    """As CommonMark reads fences: the closing one is as long as the opening one, whose indentation is taken off."""
    blocks: list[str] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    # Split at \n only: code may hold the other characters that str.splitlines splits at.
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.rstrip("\r"))
        if opening is None:
            opening, lines = match, []
        elif match and match["fence"].startswith(opening["fence"]) and not match["info"].strip():
            blocks.append("".join(lines))
            opening = None
        else:
            indent = len(opening["indent"])
            lines.append((line[indent:] if not line[:indent].strip() else line.lstrip(" ")) + "\n")
    if opening is not None and any(line.strip() for line in lines):
        blocks.append("".join(lines))
    return blocks


Extractor = Regex | LastLine | Boxed | CodeBlock
EXTRACTORS: dict[str, type[Extractor]] = {
    "regex": Regex,
    "last_line": LastLine,
    "boxed": Boxed,
    "code_block": CodeBlock,
}


def make_extractor(spec: Any, where: str) -> Extractor:
    """An extractor from `extract: NAME` or `extract: {name: NAME, OPTION: VALUE, ...}`; errors as `make_named`."""
    return make_named(spec, EXTRACTORS, "extract", where)
