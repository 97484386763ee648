"""Benchmark files that tests write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

PROMPT = "Question: {{ question }}\nAnswer:"
SUM = {"question": "1+1", "answer": 2}


def write(directory: Path, items: list[Any] | bytes, /, **keys: Any) -> Path:
    """A benchmark file and its items in `directory`; a key given as None is left out."""
    if isinstance(items, list):
        items = "".join(json.dumps(item) + "\n" for item in items).encode()
    (directory / "items.jsonl").write_bytes(items)
    content = {"name": "sums", "items": "items.jsonl", "prompt": PROMPT, "grader": "exact", **keys}
    path = directory / "sums.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path
