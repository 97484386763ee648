"""Candidate x item rows from a study: who failed where, and what was answered."""

from __future__ import annotations

from collections.abc import Collection
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
    """Rows {candidate mixture benchmark item score text}, ordered by benchmark, item, candidate.

    So that the answers of several candidates to one item stand beneath each other. Empty collections take
    all. below: only scores under it. Raises ConfigError on a candidate or benchmark that the study has not.
    """
    records = {record.id: record for record in study.candidates()}
    unknown = sorted(set(candidates) - set(records))
    if unknown:
        raise ConfigError(f"the study has no candidate {unknown[0]}; it has 1 to {max(records, default=0)}")
    rows: list[dict[str, Any]] = [
        {
            "candidate": record.id,
            "mixture": record.mixture.as_dict(),
            "benchmark": result.benchmark,
            "item": result.item,
            "score": result.score,
            "text": result.text,
        }
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
        if (row["benchmark"] in benchmarks or not benchmarks) and (below is None or row["score"] < below)
    ]
    place = {(row["benchmark"], row["item"]): index for index, row in reversed(list(enumerate(rows)))}
    return sorted(
        chosen, key=lambda row: (row["benchmark"], place[row["benchmark"], row["item"]], row["candidate"])
    )
