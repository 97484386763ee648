"""Candidate x item rows from a study: who failed where, and what was answered."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from mergemix.errors import ConfigError
from mergemix.study import Study


def item_rows(
    study: Study,
    *,
    candidates: Collection[int] = (),
    benchmarks: Collection[str] = (),
    below: float | None = None,
) -> list[dict[str, Any]]:
    """Rows {candidate mixture benchmark item score text error cut unfinished}, ordered by benchmark, item, candidate.

    So that the answers of several candidates to one item stand beneath each other. Empty collections take
    all. score: None where error says why. below: only scores under it, and errors.
    Raises ConfigError on a candidate or benchmark that the study has not.
    """
    records = {record.id: record for record in study.candidates()}
    unknown = sorted(set(candidates) - set(records))
    if unknown:
        raise ConfigError(f"the study has no candidate {unknown[0]}; it has 1 to {max(records, default=0)}")
    rows: list[dict[str, Any]] = [
        {"candidate": record.id, "mixture": record.mixture.as_dict(), **asdict(result)}
        for record in records.values()
        if record.id in candidates or not candidates
        for result in study.results(record.id)
    ]
    known = sorted({str(row["benchmark"]) for row in rows})
    for name in benchmarks:
        if name not in known:
            raise ConfigError(f"the study has no benchmark {name!r}; it has {', '.join(known) or 'none'}")
    chosen = [
        row
        for row in rows
        if (row["benchmark"] in benchmarks or not benchmarks)
        and (below is None or row["score"] is None or row["score"] < below)
    ]
    place = {(row["benchmark"], row["item"]): index for index, row in reversed(list(enumerate(rows)))}
    return sorted(
        chosen, key=lambda row: (row["benchmark"], place[row["benchmark"], row["item"]], row["candidate"])
    )


def beside_rows(
    study: Study, candidate: int, other: int, *, benchmarks: Collection[str] = ()
) -> list[dict[str, Any]]:
    """What one candidate got wrong and another did not: rows of `candidate` with `beside`, the other's row.

    Items on which their scores differ, or only one is an error; where the candidate is furthest behind comes first.
    Raises ConfigError as `item_rows`, and when both are the same.
    """
    if candidate == other:
        raise ConfigError(f"a candidate is shown beside another one, but both are {candidate}")
    rows = item_rows(study, candidates=(candidate, other), benchmarks=benchmarks)
    others = {(row["benchmark"], row["item"]): row for row in rows if row["candidate"] == other}
    pairs = [
        (row, others[place])
        for row in rows
        if row["candidate"] == candidate and (place := (row["benchmark"], row["item"])) in others
    ]
    differing = [(own, beside) for own, beside in pairs if own["score"] != beside["score"]]
    differing.sort(key=lambda pair: -_ahead(pair[1]) + _ahead(pair[0]))
    return [{**own, "beside": beside} for own, beside in differing]


def _ahead(row: Mapping[str, Any]) -> float:
    """An error counts as less than every score: it is to be looked at first."""
    return -math.inf if row["score"] is None else float(row["score"])
