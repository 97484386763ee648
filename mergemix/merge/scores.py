"""Scores of checkpoints from a file: CSV with the header checkpoint,score, or a JSON object."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from mergemix.checkpoints.strict_json import parse_object, read_bounded, shown
from mergemix.errors import CheckpointError, ConfigError

HEADER = ["checkpoint", "score"]

Row = tuple[str, str, Any]  # where it stands, what it names, its score as written


def read_scores(path: Path, names: Sequence[str], paths: Sequence[PurePath]) -> list[float]:
    """The score of each checkpoint, in their order.

    names: of the checkpoints, for messages. paths: absolute, or a Hub id's. A row names a checkpoint by its path
    or by the end of it (checkpoint-100, run1/checkpoint-100); rows of others are left alone.
    Raises ConfigError, with the line of a CSV, when the file cannot be read, a row means several checkpoints, or
    a checkpoint has no score, two, or one that is not a finite number.
    """
    by_tail: dict[tuple[str, ...], list[int]] = {}
    for index, whole in enumerate(paths):
        for begin in range(len(whole.parts)):
            by_tail.setdefault(whole.parts[begin:], []).append(index)
    found: dict[int, tuple[str, float]] = {}
    for where, key, value in _rows(path):
        indices = by_tail.get(PurePath(os.path.normpath(key)).parts) or by_tail.get(_absolute(key).parts, [])
        if len(indices) > 1:
            meant = " and ".join(names[index] for index in indices[:2])
            raise ConfigError(f"{where}: {shown(key)} means both {meant}; write more of the path")
        for index in indices:
            if index in found:
                raise ConfigError(
                    f"{where}: {names[index]} has a score already, in {found[index][0]}; leave one of them"
                )
            found[index] = (where, _score(value, where, names[index]))
    missing = [name for index, name in enumerate(names) if index not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(
            f"{path} has no score of {missing[0]}{more}; every checkpoint that is given needs one, by its name or path"
        )
    return [found[index][1] for index in range(len(names))]


def _rows(path: Path) -> list[Row]:
    try:
        raw = read_bounded(path, "the scores ")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip().startswith(b"{"):
        try:
            return [(str(path), key, value) for key, value in parse_object(raw, str(path)).items()]
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    return _csv_rows(raw, path)


def _csv_rows(raw: bytes, path: Path) -> list[Row]:
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        reader = csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            where = f"{path}:{reader.line_num}"
            if not any(cells):
                continue
            if header is None:
                header = cells
                if sorted(header) != HEADER:
                    raise ConfigError(
                        f"{where}: the first line must be {','.join(HEADER)}, but is {shown(','.join(cells))}"
                    )
            elif len(cells) != len(HEADER):
                raise ConfigError(f"{where}: a line holds a checkpoint and its score, but is {shown(cells)}")
            else:
                row = dict(zip(header, cells, strict=True))
                rows.append((where, row["checkpoint"], row["score"]))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: byte {error.start}: {error.reason}") from None
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    return rows


def _score(value: Any, where: str, name: str) -> float:
    """A finite number. A CSV holds text, a JSON object numbers."""
    try:
        score = math.nan if isinstance(value, bool | list | dict | None) else float(value)
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ConfigError(f"{where}: the score of {name} must be a finite number, but is {shown(value)}")
    return score


def _absolute(text: str) -> PurePath:
    return PurePath(os.path.abspath(os.path.expanduser(text)))
