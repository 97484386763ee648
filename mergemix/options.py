"""Types of command-line values: NAME=VALUE lists and byte sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

Value = TypeVar("Value")
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


class Size(click.ParamType):
    """Bytes: 268435456, 256MiB, 1GB (a decimal unit), 512M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(value), re.IGNORECASE)
        if match is None or match[2].lower() not in _UNITS:
            self.fail(
                f"{value!r} is no size; write bytes, or a number with a unit such as 256MiB or 1GB",
                param,
                ctx,
            )
        return int(float(match[1]) * _UNITS[match[2].lower()])


class NamedValues(click.ParamType):
    """NAME=VALUE, or several with commas between them; a comma in a path is kept unless NAME= follows it."""

    name = "name=value"

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[tuple[str, Any]]:
        if isinstance(value, list):
            return value
        pairs = []
        for part in re.split(r",(?=[^,=]+=)", str(value)):
            name, equals, text = part.partition("=")
            name, text = name.strip(), text.strip()
            if not (name and equals and text):
                self.fail(f"{part!r} must be NAME=VALUE", param, ctx)
            try:
                pairs.append((name, self.kind(text)))
            except ValueError:
                self.fail(f"the value of {name!r} must be a number, but is {text!r}", param, ctx)
        return pairs


def collect(option: str, given: Iterable[Iterable[tuple[str, Value]]]) -> dict[str, Value]:
    """One mapping from a repeated NAME=VALUE option; a name given twice is a usage error."""
    values: dict[str, Value] = {}
    for name, value in (pair for pairs in given for pair in pairs):
        if name in values:
            raise click.UsageError(f"{option} names {name!r} twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values
