"""What a study is a study of: facts that must not change under it, and facts worth keeping."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mergemix.errors import StudyError

_ABSENT = "nothing"


def write(
    connection: sqlite3.Connection, part: Literal["identity", "info"], values: Mapping[str, Any]
) -> None:
    """Replace one part of the manifest, inside the caller's transaction."""
    connection.execute("DELETE FROM manifest WHERE part = ?", (part,))
    connection.executemany(
        "INSERT INTO manifest (key, part, value) VALUES (?, ?, ?)",
        [(key, part, _encode(value)) for key, value in values.items()],
    )


def read(connection: sqlite3.Connection, part: Literal["identity", "info"]) -> dict[str, Any]:
    rows = connection.execute("SELECT key, value FROM manifest WHERE part = ? ORDER BY rowid", (part,))
    return {key: json.loads(value) for key, value in rows}


def check_identity(stored: Mapping[str, Any], given: Mapping[str, Any], directory: Path) -> None:
    """Raises StudyError listing every key whose value in the study is not the given one."""
    differences = []
    for key in dict.fromkeys([*stored, *given]):
        was, now = (_encode(part[key]) if key in part else _ABSENT for part in (stored, given))
        if was != now:
            differences.append(f"  {key}: the study has {was}, this run has {now}")
    if differences:
        raise StudyError(
            f"a study is continued with the configuration it was started with, but {directory} differs:\n"
            + "\n".join(differences)
            + "\nrun with the study's values to resume it, or give another --study DIR"
        )


def _encode(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
