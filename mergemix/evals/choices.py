"""Multiple choice: an item's choices, the likeliest of them, and which one a written answer means."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergemix.errors import BenchmarkError

LETTERS = string.ascii_uppercase
# By what a choice's log-likelihood is divided, from (choice, number of its tokens as the engine counts them).
NORMALIZED_BY: dict[str, Callable[[str, int], int]] = {
    "none": lambda choice, tokens: 1,
    "characters": lambda choice, tokens: len(choice),
    "bytes": lambda choice, tokens: len(choice.encode()),
    "tokens": lambda choice, tokens: tokens,
}
# "The answer is (B)", "Answer: **B**": a capital letter, since "the answer is a lie" names no choice.
_SAID = re.compile(
    r"(?i:\banswer\b)[\s*_:]*(?i:\bis\b|:|=)[\s*_:]*(?i:option|choice)?\s*[\"'\u201c($\[*]*([A-Z])(?![\w'])"
)
_LEADING = re.compile(r"[\s*_\"'$]*(?:[(\[]([A-Z])[)\]]|([A-Z])[*_]*(?:[.):](?!\w)|\s*\n|\s+-))")
_AROUND = " \t\r\n*_\"'`$()[]{}.,:;!?"


def most_likely(logprobs: Sequence[float]) -> int:
    """Index of the highest log-likelihood; the first one on a tie."""
    return max(range(len(logprobs)), key=lambda index: logprobs[index])


def lettered(choices: Sequence[str]) -> str:
    """The choices as a prompt shows them: "A. Rome", one a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a written answer means, None when it does not say. The first rule that fits decides:

    1. the whole answer is a letter or the text of a choice, apart from case and from punctuation around it;
    2. the last "answer is X" or "answer: X" names a letter;
    3. the answer begins with a letter as the choices are lettered: "B. Paris", "(B)", "B)";
    4. the text of exactly one choice occurs in it, as whole words; inside a longer choice's text it does not count.
    """
    bare = answer.strip(_AROUND).casefold()
    texts = [choice.strip(_AROUND).casefold() for choice in choices]
    if bare and texts.count(bare) == 1:
        return texts.index(bare)
    leading = _LEADING.match(answer)
    letters = (
        *([bare.upper()] if len(bare) == 1 else []),
        *reversed(_SAID.findall(answer)),
        *([leading[1] or leading[2]] if leading else []),
    )
    known = LETTERS[: len(choices)]
    for letter in letters:
        if letter in known:
            return known.index(letter)
    return _only_one_in(answer, choices)


def _only_one_in(answer: str, choices: Sequence[str]) -> int | None:
    text = answer.casefold()
    found = []
    # The longest first, and what was found is blanked out: "Paris" does not occur in "Paris, Texas".
    for index in sorted(range(len(choices)), key=lambda index: -len(choices[index])):
        pattern = rf"(?<!\w){re.escape(choices[index].strip().casefold())}(?!\w)"
        text, count = re.subn(pattern, "\0", text)
        if count:
            found.append(index)
    return found[0] if len(found) == 1 else None


def read_choices(fields: Mapping[str, Any], where: str, *, by_letter: bool) -> tuple[str, ...]:
    """The field `choices` of an item. by_letter: the choices will be lettered.

    Raises BenchmarkError for fewer than two, equal or empty ones, and for choices that letters could be confused with.
    """
    listed = fields.get("choices")
    if not isinstance(listed, list) or len(listed) < 2:
        raise BenchmarkError(
            f"{where}: grader choice needs the field 'choices', a list of at least 2, but it is {listed!r}"
        )
    choices = tuple(as_text(choice, "a choice", where) for choice in listed)
    if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
        raise BenchmarkError(f"{where}: choices must differ and not be empty, but are {listed!r}")
    if by_letter and len(choices) > len(LETTERS):
        raise BenchmarkError(
            f"{where}: choices by letter must be at most {len(LETTERS)}, but are {len(choices)}"
        )
    for index, choice in enumerate(choices):
        letter = choice.strip(_AROUND).upper()
        if by_letter and len(letter) == 1 and letter in LETTERS[: len(choices)] and letter != LETTERS[index]:
            raise BenchmarkError(
                f"{where}: the choice {choice!r} is the letter of another one ({listed!r}): reorder them, or "
                "score by: likelihood"
            )
    return choices


def right_choice(value: object, text: str, choices: tuple[str, ...], where: str) -> int:
    """Index of the right choice: one of the choices as text, or its position as a number, from 0.

    value: the answer's field where the template is just that; text: the answer as rendered. Raises BenchmarkError for
    an answer that is neither, or that could be both.
    """
    named = choices.index(text) if text in choices else None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    position = int(text) if (is_number or named is None) and text.isdecimal() else None
    if named is not None and position is not None and position < len(choices) and named != position:
        raise BenchmarkError(
            f"{where}: the answer {value!r} is a choice and the position of another; "
            "write it as text to mean the choice"
        )
    index = named if named is not None else position
    if index is None or index >= len(choices):
        raise BenchmarkError(
            f"{where}: the answer must be one of the choices or a position from 0 to {len(choices) - 1}, "
            f"but is {text!r}"
        )
    return index


def as_text(value: object, what: str, where: str) -> str:
    """Text or a number as text. Raises BenchmarkError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BenchmarkError(f"{where}: {what} must be text or a number, but is {value!r}")
    return str(value)
