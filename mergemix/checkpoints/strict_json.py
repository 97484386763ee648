"""JSON from files we did not write: one object, no duplicate keys, every violation a CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergemix.errors import CheckpointError

MAX_SHOWN = 120  # characters of a hostile value that an error message repeats
MAX_FILE_BYTES = 1 << 26  # the index of the largest checkpoints has 10 MB
# Every value costs 50 to 200 bytes and a fraction of a microsecond once parsed: so count what makes values before.
# Enough for a safetensors header of 250,000 tensors (of 9 dimensions), and 100,000 each in texts of its metadata.
MAX_MARKS = {b"{": 350_000, b"[": 600_000, b":": 1_100_000, b",": 3_100_000}


def shown(value: object) -> str:
    """`value` for an error message: escaped, and cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; nesting too deep
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, UTF-8. where: what the bytes are, for messages.

    Raises CheckpointError when the bytes are not UTF-8, not JSON, not an object, nested too deeply, hold too
    many values to be parsed in a second, or when any object in them repeats a key.
    """
    for mark, limit in MAX_MARKS.items():
        if (count := raw.count(mark)) > limit:
            raise CheckpointError(
                f"{where} holds {mark.decode()!r} {count} times; at most {limit}, for 250000 tensors, are accepted"
            )

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
    """The JSON object in the file `path`.

    Raises CheckpointError when it is too large, or cannot be read or parsed.
    """
    return parse_object(read_bounded(path), str(path))


def read_bounded(path: Path, what: str = "") -> bytes:
    """The bytes of a file. what: what the file is, for messages ("the scores ").

    Raises CheckpointError when it cannot be read or is larger than MAX_FILE_BYTES.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {what}{path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} has more than the {MAX_FILE_BYTES} bytes that are accepted")
    return raw
