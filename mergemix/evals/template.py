"""Jinja2 templates over the fields of one item, sandboxed and strict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergemix.errors import BenchmarkError

_SINGLE_FIELD = re.compile(r"\s*\{\{-?\s*(\w+)\s*-?\}\}\s*")


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a field it prints is null")
    return value


# keep_trailing_newline: the prompt is what the file says, to the last character.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_refuse_null
)


class Template:
    """`source` compiled once; `key` (prompt, answer) and `where` (the YAML file) name it in errors.

    fields: names of the item's fields that it may use.
    Raises BenchmarkError when the template does not parse.
    """

    def __init__(self, source: str, key: str, where: str) -> None:
        self.key = key
        match = _SINGLE_FIELD.fullmatch(source)
        self._field = match.group(1) if match else None
        try:
            self.fields = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as error:
            raise BenchmarkError(f"{where}: the template {key} does not parse: {error}") from None

    def render(self, fields: Mapping[str, Any], where: str) -> str:
        """The text for one item. `where` is the item's file and line.

        Raises BenchmarkError when a field is missing or null, or an expression fails.
        """
        try:
            return self._template.render(fields)
        except jinja2.UndefinedError as error:
            raise BenchmarkError(
                f"{where}: the template {self.key} needs a field the item lacks: {error.message}; "
                f"its fields are {', '.join(fields) or 'none'}"
            ) from None
        except Exception as error:  # an expression in a user's template may raise anything
            raise BenchmarkError(f"{where}: the template {self.key} fails on this item: {error}") from None

    def field_value(self, fields: Mapping[str, Any]) -> Any:
        """The field itself, maybe a list, where the template is just "{{ field }}"; else None."""
        return fields.get(self._field) if self._field else None
