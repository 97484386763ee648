"""Files of a study for programs: there whole, or as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergemix.errors import OutputError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside, sync, rename. Raises OutputError when the place is full or cannot be written."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror}; free space or permissions there and run the same command "
            "again: every result is stored"
        ) from error
