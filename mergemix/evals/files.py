"""Reading what a user wrote, strictly: YAML with known keys and right types, JSONL one object a line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mergemix.errors import BenchmarkError

_REQUIRED: Any = object()
# '\n' in YAML single quotes is a backslash and an n; nobody means that as a whole stop string or separator.
_UNREAD_ESCAPES = re.compile(r"(\\[nrt])+")


@dataclass(frozen=True)
class Record:
    """One line of a JSONL file. line counts from 1; id is its `id` field, else the line number."""

    id: str
    line: int
    fields: dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice (PyYAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BenchmarkError naming file, line and problem."""
    text = _decode(path, _read(path))
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise BenchmarkError(
            f'{where}: not valid YAML: {error.problem} (templates need quotes: "{{{{ field }}}}")'
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise BenchmarkError(f"{path}: must be a mapping of keys to values, but is {_shown(content)}")
    return content


def read_records(path: Path) -> list[Record]:
    """All objects of a JSONL file, at least one, ids unique; blank lines are passed over.

    Raises BenchmarkError naming file and line.
    """
    records: list[Record] = []
    line_of: dict[str, int] = {}
    # Split at \n only: JSON text may hold U+2028 and other characters that str.splitlines splits at.
    for number, raw in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        record = _record(_decode(where, raw), where, number)
        if record.id in line_of:
            raise BenchmarkError(
                f"{where}: ids must be unique, but {record.id!r} is also on line {line_of[record.id]}"
            )
        line_of[record.id] = number
        records.append(record)
    if not records:
        raise BenchmarkError(f"{path}: has no items; write one JSON object per line")
    return records


def _record(text: str, where: str, number: int) -> Record:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BenchmarkError(f"{where}: each line must be a JSON object, but is {_shown(fields)}")
    identity = fields.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise BenchmarkError(f"{where}: id must be text or a whole number, but is {_shown(identity)}")
    return Record(str(identity), number, fields)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(where: object, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{where}: must be UTF-8, but byte {raw[error.start]:#04x} is not") from None


def _shown(value: object) -> str:
    """A value and its type, short enough for a message."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one probably meant, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1) if isinstance(word, str) else []
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


class Section:
    """Typed access to one mapping of a YAML file; every failure is a BenchmarkError naming `where` and key.

    Raises BenchmarkError at once when a key is not in `known`, with the nearest known one.
    """

    def __init__(self, values: object, where: str, known: Iterable[str]) -> None:
        if not isinstance(values, Mapping):
            raise BenchmarkError(f"{where}: must be a mapping of keys to values, but is {_shown(values)}")
        known = list(known)
        for key in values:
            if key not in known:
                raise BenchmarkError(f"{where}: unknown key {key!r}; {nearest(key, known)}")
        self.values = values
        self.where = where

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def _get(self, key: str, default: Any, rule: str) -> Any:
        if key in self.values:
            return self.values[key]
        if default is _REQUIRED:
            raise BenchmarkError(f"{self.where}: needs the key {key!r} ({rule})")
        return default

    def error(self, key: str, rule: str) -> BenchmarkError:
        return BenchmarkError(f"{self.where}: {key} must be {rule}, but is {_shown(self.values.get(key))}")

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default, "text")
        if not isinstance(value, str):
            raise self.error(key, "text" + (" (put it in quotes)" if isinstance(value, int | float) else ""))
        return value

    def spacing(self, key: str, default: Any = _REQUIRED) -> str:
        """Text in which a bare backslash-n is surely a mistake."""
        value = self.text(key, default)
        if _UNREAD_ESCAPES.fullmatch(value):
            raise BenchmarkError(
                f"{self.where}: {key} is a backslash and a letter, {value!r}: YAML reads escapes "
                f'in double quotes only, write "{value}"'
            )
        return value

    def name(self, key: str, default: Any = _REQUIRED) -> str:
        """Text that can stand in NAME=W,NAME=W."""
        value = self.text(key, default)
        if not value or value != value.strip() or re.search(r"[=,\n]", value):
            raise self.error(key, "a name without '=', ',' or surrounding spaces")
        return value

    def count(self, key: str, default: Any = _REQUIRED, *, least: int) -> Any:
        value = self._get(key, default, "a whole number")
        if value is default and key not in self.values:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(key, f"a whole number >= {least}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        value = self._get(key, default, "a number")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        """true or false; absent is false."""
        value = self._get(key, False, "true or false")
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of non-empty texts; a single text is a list of one; absent is empty."""
        value = self._get(key, [], "a list of texts")
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            raise self.error(key, "a list of non-empty texts")
        part = f"{self.where}: {key}"
        return tuple(Section({"entry": entry}, part, ["entry"]).spacing("entry") for entry in entries)

    def choice(self, key: str, known: Iterable[str], default: Any = _REQUIRED) -> str:
        value = self.text(key, default)
        if value not in known:
            raise BenchmarkError(f"{self.where}: unknown {key} {value!r}; {nearest(value, known)}")
        return value


Kind = TypeVar("Kind")


def make_named(spec: Any, kinds: Mapping[str, type[Kind]], what: str, where: str) -> Kind:
    """One of `kinds`, from `what: NAME` or `what: {name: NAME, OPTION: VALUE, ...}` in a benchmark file.

    A kind is a dataclass whose fields are the options; it checks their values itself, with ValueError.
    Raises BenchmarkError on an unknown name or option, or a value of the wrong type or range.
    """
    given: Mapping[Any, Any] = spec if isinstance(spec, Mapping) else {"name": spec}
    name = given.get("name")
    if not isinstance(name, str) or name not in kinds:
        raise BenchmarkError(f"{where}: unknown {what} {name!r}; {nearest(name, kinds)}")
    kind: Any = kinds[name]
    where = f"{where}: {what} {name}"
    section = Section(given, where, ["name", *(option.name for option in dataclasses.fields(kind))])
    options = {key: value for key, value in given.items() if key != "name"}
    hints = typing.get_type_hints(kind)
    for option in dataclasses.fields(kind):
        if option.name in options:
            _check_type(section, option.name, hints[option.name])
        elif option.default is dataclasses.MISSING:
            raise BenchmarkError(f"{where}: needs the option {option.name!r}")
    try:
        return typing.cast(Kind, kind(**options))
    except ValueError as error:
        raise BenchmarkError(f"{where}: {error}") from None


def _check_type(section: Section, key: str, hint: Any) -> None:
    value = section.values[key]
    kinds = typing.get_args(hint) or (hint,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        rules = {bool: "true or false", str: "text", float: "a number (YAML needs a dot: 1.0e-6)"}
        raise section.error(key, rules.get(kinds[0], "a number or a name"))
