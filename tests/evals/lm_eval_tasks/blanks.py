"""Code of a task of our own, as a user writes it."""

from __future__ import annotations

from typing import Any


def doc_to_text(doc: dict[str, Any]) -> int:
    return "12".index(doc["answer"])


def doc_to_target(doc: dict[str, Any]) -> str:
    return str(doc["sentence"].split("_")[1].strip())


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    return [doc["sentence"].split("_")[0] + doc[key] for key in ("first", "second")]


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    values = [value for value, _ in results]
    right = "12".index(doc["answer"])
    return {"right": float(values[right] >= max(values)), "surprise": -values[right]}
