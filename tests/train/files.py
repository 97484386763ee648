"""Bases, corpora and configurations of tiny trainings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergemix.train import TrainConfig


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_corpora(directory: Path, documents: int = 200) -> dict[str, Path]:
    """Two domains: sums as prompt and answer, and texts of very uneven length."""
    sums = [{"prompt": f"{n} + {n % 7} =", "answer": f" {n + n % 7}"} for n in range(documents)]
    texts = [{"text": "the abc in a " * (1 + n * n % 11) + str(n)} for n in range(documents)]
    return {
        "sums": write_lines(directory / "sums.jsonl", sums),
        "texts": write_lines(directory / "texts.jsonl", texts),
    }


def tiny_config(base: Path, data: Mapping[str, Path], out: Path, **changed: Any) -> TrainConfig:
    """12 steps of 4 sequences of 32 tokens."""
    given: dict[str, Any] = {
        "base": str(base), "data": data, "mixture": {"sums": 0.4, "texts": 0.6}, "out": out, "tokens": 1536,
        "sequence_length": 32, "batch": 4, "learning_rate": 1e-3, "save_every": 3,
    }  # fmt: skip
    return TrainConfig(**{**given, **changed})


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()
