"""Mixtures and scores that somebody has measured, from CSV files in the ratios/metrics layout of RegMix and Olmix.

Two files with a header line: one row per run, in the first a column of shares per domain, in the second a column per
metric. Leading columns called as in ID_COLUMNS identify the run; rows belong together by the first such column that
both files have, and by their order where there is none.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergemix.errors import ConfigError

ID_COLUMNS = ("", "index", "id", "name", "run", "run_id", "run_name", "unnamed: 0")
# Shares that were rounded to three decimals sum to 1 within half of this, whatever the number of domains in use.
SUM_TOLERANCE = 0.01
EXACT = 1e-6
SHOWN = 3


@dataclass(frozen=True)
class Table:
    """The numbers of one file. ids: by id column, in the order of rows. lines: of the file, for messages."""

    path: Path
    columns: tuple[str, ...]
    values: np.ndarray  # (rows, columns)
    ids: Mapping[str, tuple[str, ...]]
    lines: tuple[int, ...]

    def row(self, number: int) -> str:
        return f"{self.path}, line {self.lines[number]}"


@dataclass(frozen=True)
class Measured:
    """n runs. shares: (n, K), each row of sum 1. scores: (n, metrics). notes, warnings: what was done about them."""

    domains: tuple[str, ...]
    metrics: tuple[str, ...]
    shares: np.ndarray
    scores: np.ndarray
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_measured(mixtures: Path, scores: Path, *, like: Measured | None = None) -> Measured:
    """The runs of a pair of files. like: of a test set, the training set whose columns it must have, in any order.

    Raises ConfigError, naming file, line and rule, for a file that cannot be read, cells that are missing or no finite
    numbers, shares that are negative or do not sum to 1, ids that repeat or do not match, and other columns.
    """
    ratios, metrics = read_table(mixtures), read_table(scores)
    if like is not None:
        ratios, metrics = (
            _arranged(ratios, like.domains, "shares"),
            _arranged(metrics, like.metrics, "scores"),
        )
    if len(ratios.columns) < 2:
        raise ConfigError(
            f"{mixtures}: at least two columns of shares are needed, but there are {len(ratios.columns)} "
            f"({', '.join(ratios.columns)})"
        )
    order, matched = _matching(ratios, metrics)
    shares, notes = _shares(ratios)
    return Measured(
        ratios.columns,
        metrics.columns,
        shares,
        metrics.values[order],
        (matched, *notes),
        tuple(_suspicions(ratios, shares)),
    )


def read_table(path: Path) -> Table:
    """A CSV file of finite numbers, behind columns of ids if there are any. Raises ConfigError."""
    lines, rows = _raw_rows(path)
    header = [name.strip() for name in rows[0]] if rows else []
    if not header or len(rows) < 2:
        raise ConfigError(
            f"{path}: a header line and at least one row are needed, but there are {len(rows)} lines"
        )
    num_ids = next((i for i, name in enumerate(header) if name.lower() not in ID_COLUMNS), len(header))
    columns = header[num_ids:]
    if not columns:
        raise ConfigError(f"{path}: there are only columns of ids ({', '.join(header)}), and none of numbers")
    for number, name in enumerate(header):
        if name in header[:number]:
            raise ConfigError(f"{path}: names of columns must differ, but {name!r} is there twice")
        if not name and number >= num_ids:
            raise ConfigError(f"{path}: column {number + 1} has no name: give it one in the header line")
    for line, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            raise ConfigError(
                f"{path}, line {line}: each row must have {len(header)} cells like the header, but this has {len(row)}"
            )
    values = [
        [_number(cell, path, line, name) for cell, name in zip(row[num_ids:], columns, strict=True)]
        for line, row in zip(lines[1:], rows[1:], strict=True)
    ]
    ids = {header[i].lower(): tuple(row[i].strip() for row in rows[1:]) for i in range(num_ids)}
    return Table(path, tuple(columns), np.array(values, np.float64), ids, tuple(lines[1:]))


def _raw_rows(path: Path) -> tuple[list[int], list[list[str]]]:
    """(line numbers, cells) of the lines that are not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            found = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{path} must be a CSV file in UTF-8, but cannot be read as one: {error}"
        ) from error
    return [line for line, _ in found], [row for _, row in found]


def _number(cell: str, path: Path, line: int, column: str) -> float:
    where = f"{path}, line {line}, column {column!r}"
    if not cell.strip():
        raise ConfigError(f"{where}: the cell is empty: fill it in, or leave the run out of both files")
    try:
        value = float(cell)
    except ValueError:
        raise ConfigError(
            f"{where}: a number is needed, but the cell is {cell!r}; ids go into leading columns called "
            f"{', '.join(name for name in ID_COLUMNS[1:-1])}"
        ) from None
    if not math.isfinite(value):
        raise ConfigError(f"{where}: a finite number is needed, but the cell is {cell.strip()}")
    return value


def _arranged(table: Table, columns: Sequence[str], what: str) -> Table:
    """The same with the columns in the order of the training set."""
    missing = [name for name in columns if name not in table.columns]
    extra = [name for name in table.columns if name not in columns]
    if missing or extra:
        raise ConfigError(
            f"{table.path}: the columns of {what} must be those of the training set; "
            + "; ".join(
                f"{word}: {_some(names)}"
                for word, names in (("missing", missing), ("unknown", extra))
                if names
            )
        )
    chosen = [table.columns.index(name) for name in columns]
    return Table(table.path, tuple(columns), table.values[:, chosen], table.ids, table.lines)


def _matching(ratios: Table, metrics: Table) -> tuple[np.ndarray, str]:
    """(for each mixture the row of its scores, how that was found)."""
    common = [name for name in ratios.ids if name in metrics.ids]
    if not common:
        if len(ratios.lines) != len(metrics.lines):
            raise ConfigError(
                f"{ratios.path} has {len(ratios.lines)} rows and {metrics.path} {len(metrics.lines)}: rows without a "
                "common id column belong together by their order, so there must be as many"
            )
        return np.arange(len(ratios.lines)), "rows of mixtures and scores were matched by their order"
    # Olmix has the name of the whole experiment beside the run's own.
    unique = [
        name for name in common if all(len(set(t.ids[name])) == len(t.lines) for t in (ratios, metrics))
    ]
    name = unique[0] if unique else common[0]
    rows = [_by_id(table, name) for table in (ratios, metrics)]
    for (table, found), (other, others) in (
        (zip((ratios, metrics), rows, strict=True)),
        (zip((metrics, ratios), rows[::-1], strict=True)),
    ):
        if lost := [key for key in found if key not in others]:
            raise ConfigError(
                f"{table.row(found[lost[0]])}: {name or 'the first column'} {_some(lost)} "
                f"{'is' if len(lost) == 1 else 'are'} not in {other.path}: every run needs its row in both files"
            )
    order = np.array([rows[1][key] for key in ratios.ids[name]])
    return order, f"rows of mixtures and scores were matched by {name or 'the first column'!r}"


def _by_id(table: Table, name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, key in enumerate(table.ids[name]):
        if key in found:
            raise ConfigError(
                f"{table.row(number)}: ids must differ, but {name or 'the first column'} {key!r} is in line "
                f"{table.lines[found[key]]} as well"
            )
        found[key] = number
    return found


def _shares(table: Table) -> tuple[np.ndarray, list[str]]:
    """(rows of sum 1, what was done to make them so)."""
    for number, row in enumerate(table.values):
        if row.min() < 0:
            column = table.columns[int(row.argmin())]
            raise ConfigError(
                f"{table.row(number)}, column {column!r}: shares must be >= 0, but this is {row.min():g}"
            )
        if abs(row.sum() - 1) > SUM_TOLERANCE:
            raise ConfigError(
                f"{table.row(number)}: shares must sum to 1 (within {SUM_TOLERANCE:g}, for rounding), but sum to "
                f"{row.sum():.6g}: divide them by their sum, or add the domain that is missing"
            )
    sums = table.values.sum(axis=1)
    rounded = int((np.abs(sums - 1) > EXACT).sum())
    notes = [
        f"{table.path}: {rounded} of {len(sums)} mixtures were rounded (sums {sums.min():.4g} to {sums.max():.4g}) and "
        "were divided by their sums"
    ]  # fmt: skip
    return table.values / sums[:, None], notes if rounded else []


def _suspicions(table: Table, shares: np.ndarray) -> list[str]:
    found = []
    firsts: dict[bytes, int] = {}
    repeats = []
    for number, row in enumerate(shares):
        first = firsts.setdefault(row.round(9).tobytes(), number)
        if first != number:
            repeats.append(f"lines {table.lines[first]} and {table.lines[number]}")
    if repeats:
        found.append(
            f"{table.path}: the same mixture is there more than once ({_some(repeats)}): "
            "taken as repeated measurements"
        )
    unused = [
        name for name, used in zip(table.columns, (shares > 0).sum(axis=0).tolist(), strict=True) if not used
    ]
    if unused and len(shares) > 1:
        found.append(f"{table.path}: no mixture has any of {_some(unused)}: what it does cannot be known")
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
