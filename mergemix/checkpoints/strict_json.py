"""JSON from files we did not write: one object, no duplicate keys, every violation a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergemix.errors import CheckpointError

MAX_SHOWN = 120  # characters of a hostile value that an error message repeats


def shown(value: object) -> str:
    """`value` for an error message: escaped, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; nesting too deep
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, UTF-8. where: what the bytes are, for messages.

    Raises CheckpointError when the bytes are not UTF-8, not JSON, not an object, nested too deeply, or when
    any object in them repeats a key.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = set()
            repeated = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where} holds the key {shown(repeated)} twice")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=distinct)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8: byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be what it claims to be") from None
    except ValueError as error:  # JSONDecodeError, and integers beyond Python's digit limit
        raise CheckpointError(f"{where} is not valid JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object, but is {shown(value)}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises CheckpointError when it cannot be read or parsed."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_object(raw, str(path))
