"""The study: every candidate with all its evidence, in one SQLite file that survives a kill."""

from __future__ import annotations

import itertools
import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.study import database, manifest
from mergemix.study.lock import DirectoryLock
from mergemix.study.records import CandidateRecord, Estimate, ItemRecord, ItemResult

_CANDIDATE = (
    "SELECT id, mixture, repeat, origin, status, reason, proven, timings, swap, "
    "metrics, estimate FROM candidate"
)


class Study:
    """DIRECTORY/study.sqlite, open in one process for writing or in any number for reading.

    Each result is one synced transaction: a kill or a power failure at any moment loses at most the
    candidate in flight, never part of one. Derived things (best mixture, intervals, reports) are not
    stored; they are recomputed from what is.

    Failures are results, with one exception. A failed candidate is final for its own run, and, once
    other candidates were done after it, for ever: the search went on from it, and its proposals must
    stay what they were. But failures with nothing done after them are what a run broke off with (a full
    GPU, a lost node), so `find` hides them from the next run, which tries each once more.
    """

    def __init__(self, directory: Path, connection: sqlite3.Connection, lock: DirectoryLock | None) -> None:
        self.directory = directory
        self.path = directory / database.FILE_NAME
        self._connection = connection
        self._lock = lock
        self._to_retry: set[int] = set()

    @classmethod
    def open(cls, directory: Path, identity: Mapping[str, Any], info: Mapping[str, Any]) -> Study:
        """Create the study, or continue it; holds its lock until `close`.

        identity: JSON values that must be those the study was started with. info: JSON values worth
        keeping (versions, budget), replaced at each opening.
        Raises StudyError when another process holds the study, its identity differs (nothing is changed
        then), or its file is damaged or of another schema version; OutputError when the directory cannot be
        written.
        """
        path = directory / database.FILE_NAME
        with database.explained(path):
            directory.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(directory)
            try:
                study = cls(directory, database.connect(path), lock)
            except BaseException:
                lock.release()
                raise
            try:
                study._start(identity, info)
            except BaseException:
                study.close()
                raise
            return study

    @classmethod
    def read(cls, directory: Path) -> Study:
        """An existing study for reading only, also while a run is writing it.

        Raises StudyError when there is none.
        """
        path = directory / database.FILE_NAME
        with database.explained(path):
            return cls(directory, database.connect_read_only(path), None)

    def _start(self, identity: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        with database.transaction(self._connection):
            if database.is_empty(self._connection):
                database.create_schema(self._connection)
            if self._holds_nothing():  # a run that never got to a result binds nobody
                if self.identity != identity:
                    self._connection.execute("DELETE FROM candidate")  # failures of another configuration
                manifest.write(self._connection, "identity", identity)
            else:
                manifest.check_identity(self.identity, identity, self.directory)
            manifest.write(self._connection, "info", info)
        rows = self._connection.execute(
            "SELECT id FROM candidate WHERE status = 'failed' AND id > "
            "(SELECT coalesce(max(id), 0) FROM candidate WHERE status != 'failed')"
        )
        self._to_retry = {row[0] for row in rows}

    def _holds_nothing(self) -> bool:
        return (
            self._connection.execute("SELECT count(*) FROM candidate WHERE status != 'failed'").fetchone()[0]
            == 0
        )

    @property
    def identity(self) -> dict[str, Any]:
        with database.explained(self.path):
            return manifest.read(self._connection, "identity")

    @property
    def info(self) -> dict[str, Any]:
        with database.explained(self.path):
            return manifest.read(self._connection, "info")

    def find(self, mixture: Mixture, repeat: int = 0) -> CandidateRecord | None:
        """The result that stands for this mixture, done or failed; None when it is to be evaluated."""
        found = self._select(f"{_CANDIDATE} WHERE mixture = ? AND repeat = ?", (mixture.key(), repeat))
        return found[0] if found and found[0].id not in self._to_retry else None

    def candidates(self) -> list[CandidateRecord]:
        """All candidates in the order of evaluation, failed ones included."""
        return self._select(f"{_CANDIDATE} ORDER BY id", ())

    def record(
        self,
        mixture: Mixture,
        *,
        repeat: int = 0,
        origin: str,
        results: Sequence[ItemResult],
        timings: Mapping[str, float],
        swap: Mapping[str, Any] | None = None,
        proven: bool = False,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        stopped: tuple[str, Estimate] | None = None,
    ) -> CandidateRecord:
        """Store one evaluated candidate with all its items, whole or not at all, and return it as stored.

        proven: the engine's self-test had passed before these scores were taken. swap: JSON values. metrics: what the
        benchmarks report besides means. stopped: why it was stopped before it had answered all items, and its estimate.

        Raises ValueError when a result already stands for this mixture and repeat, there are no results, a
        score is not finite, or a result has neither score nor error; OutputError when the disk is full (earlier
        results are intact).
        """
        _check_results(mixture, results)
        reason, estimate = stopped or (None, None)
        row = {
            "origin": origin,
            "status": "done" if stopped is None else "stopped",
            "reason": reason,
            "estimate": None if estimate is None else json.dumps(asdict(estimate)),
            "proven": int(proven),
            "timings": _seconds(timings),
            "swap": json.dumps(dict(swap or {})),
            "metrics": json.dumps({name: dict(values) for name, values in (metrics or {}).items()}),
        }
        with database.explained(self.path), database.transaction(self._connection):
            candidate = self._put(mixture, repeat, row)
            self._connection.executemany(
                "INSERT INTO item (benchmark, item) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(result.benchmark, result.item) for result in results],
            )
            self._connection.executemany(
                "INSERT INTO item_score (candidate, item, score, text, error, cut, unfinished) "
                "SELECT ?, id, ?, ?, ?, ?, ? FROM item WHERE benchmark = ? AND item = ?",
                [
                    (candidate, r.score, r.text, r.error, r.cut, r.unfinished, r.benchmark, r.item)
                    for r in results
                ],
            )
            if stopped is None:  # the means of different items are not comparable
                self._connection.executemany(
                    "INSERT INTO benchmark_score (candidate, benchmark, score) VALUES (?, ?, ?)",
                    [(candidate, benchmark, mean) for benchmark, mean in _means(results).items()],
                )
        return self._get(candidate)

    def record_failure(
        self,
        mixture: Mixture,
        *,
        repeat: int = 0,
        origin: str,
        reason: str,
        timings: Mapping[str, float] | None = None,
    ) -> CandidateRecord:
        """Store that a candidate failed, and why. Raises like `record`."""
        with database.explained(self.path), database.transaction(self._connection):
            row = {"origin": origin, "status": "failed", "reason": reason, "estimate": None, "proven": 0}
            row |= {"timings": _seconds(timings or {}), "swap": "{}", "metrics": "{}"}
            candidate = self._put(mixture, repeat, row)
        return self._get(candidate)

    def results(self, candidate_id: int) -> list[ItemRecord]:
        """All item results of a candidate in suite order; empty when it failed."""
        with database.explained(self.path):
            rows = self._connection.execute(
                "SELECT benchmark, item.item, score, text, error, cut, unfinished FROM item_score "
                "JOIN item ON item.id = item_score.item WHERE candidate = ? ORDER BY item.id",
                (candidate_id,),
            )
            return [ItemRecord(*row) for row in rows]

    def score_matrices(self, candidate_ids: Sequence[int]) -> dict[str, np.ndarray]:
        """By benchmark the float64 scores [candidates, items], items in the order of the suite.

        NaN where a candidate has no score for an item.
        """
        with database.explained(self.path):
            items = self._connection.execute("SELECT id, benchmark FROM item ORDER BY id").fetchall()
            rows = self._connection.execute(
                "SELECT candidate, item, score FROM item_score WHERE score IS NOT NULL"
            )
            known = np.fromiter(itertools.chain.from_iterable(rows), np.float64).reshape(-1, 3)
        wanted, item_ids = (
            np.array(candidate_ids, np.float64),
            np.array([item for item, _ in items], np.float64),
        )
        known = known[np.isin(known[:, 0], wanted)]
        by_id = np.argsort(wanted)
        matrix = np.full((len(wanted), len(items)), np.nan)
        if len(known):
            at = by_id[np.searchsorted(wanted, known[:, 0], sorter=by_id)]
            matrix[at, np.searchsorted(item_ids, known[:, 1])] = known[:, 2]
        columns: dict[str, list[int]] = {}
        for number, (_, benchmark) in enumerate(items):
            columns.setdefault(benchmark, []).append(number)
        return {benchmark: matrix[:, numbers] for benchmark, numbers in columns.items()}

    def item_evaluations(self) -> int:
        """How many items have been answered by all candidates together: what the study has cost."""
        with database.explained(self.path):
            return int(self._connection.execute("SELECT count(*) FROM item_score").fetchone()[0])

    def item_troubles(self) -> dict[str, dict[str, int]]:
        """By benchmark, of all candidates' answers: items, errors, cut (prompts did not fit), unfinished answers.

        Benchmarks without any trouble are left out.
        """
        with database.explained(self.path):
            rows = self._connection.execute(
                "SELECT benchmark, count(*), count(error), sum(cut > 0), sum(unfinished > 0) FROM item_score "
                "JOIN item ON item.id = item_score.item GROUP BY benchmark ORDER BY benchmark"
            ).fetchall()
        names = ("items", "errors", "cut", "unfinished")
        return {name: dict(zip(names, counts, strict=True)) for name, *counts in rows if any(counts[1:])}

    def close(self) -> None:
        """Close the file and let others in; safe to call twice."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, mixture: Mixture, repeat: int, row: Mapping[str, Any]) -> int:
        """Write the candidate's row in the caller's transaction; a failure that is retried keeps its id."""
        found = self._connection.execute(
            "SELECT id FROM candidate WHERE mixture = ? AND repeat = ?", (mixture.key(), repeat)
        ).fetchone()
        if found is None:
            row = {"mixture": mixture.key(), "repeat": repeat, **row}
            places = ", ".join("?" * len(row))
            cursor = self._connection.execute(
                f"INSERT INTO candidate ({', '.join(row)}) VALUES ({places})", tuple(row.values())
            )
            return int(cursor.lastrowid or 0)
        if found[0] not in self._to_retry:
            raise ValueError(f"repeat {repeat} of {mixture} has a result already: candidate {found[0]}")
        changes = ", ".join(f"{name} = ?" for name in row)
        self._connection.execute(f"UPDATE candidate SET {changes} WHERE id = ?", (*row.values(), found[0]))
        return int(found[0])

    def _get(self, candidate_id: int) -> CandidateRecord:
        """The committed candidate; from here on its result stands."""
        self._to_retry.discard(candidate_id)
        return self._select(f"{_CANDIDATE} WHERE id = ?", (candidate_id,))[0]

    def _select(self, query: str, parameters: tuple[object, ...]) -> list[CandidateRecord]:
        with database.explained(self.path):
            rows = self._connection.execute(query, parameters).fetchall()
            scores: dict[int, dict[str, float]] = {row[0]: {} for row in rows}
            wanted = "" if len(rows) != 1 else f" WHERE candidate = {int(rows[0][0])}"
            for candidate, benchmark, score in self._connection.execute(
                f"SELECT candidate, benchmark, score FROM benchmark_score{wanted}"
            ):
                if candidate in scores:
                    scores[candidate][benchmark] = score
            answered = dict(
                self._connection.execute(
                    f"SELECT candidate, count(*) FROM item_score{wanted} GROUP BY candidate"
                )
            )
        return [
            CandidateRecord(
                id=row[0],
                mixture=Mixture.from_key(row[1]),
                repeat=row[2],
                origin=row[3],
                status=row[4],
                reason=row[5],
                proven=bool(row[6]),
                timings=json.loads(row[7]),
                swap=json.loads(row[8]),
                scores=scores[row[0]],
                metrics=json.loads(row[9]),
                items=answered.get(row[0], 0),
                estimate=None if row[10] is None else Estimate(**json.loads(row[10])),
            )
            for row in rows
        ]


def _check_results(mixture: Mixture, results: Sequence[ItemResult]) -> None:
    if not results:
        raise ValueError(f"an evaluated candidate has item results, but {mixture} has none")
    for result in results:
        finite = result.score is not None and math.isfinite(result.score)
        if not finite and (result.error is None or result.score is not None):
            raise ValueError(f"item {result.item!r} of {result.benchmark!r} has the score {result.score}")


def _seconds(timings: Mapping[str, float]) -> str:
    return json.dumps({name: float(seconds) for name, seconds in timings.items()})


def _means(results: Sequence[ItemResult]) -> dict[str, float]:
    """Mean score by benchmark over the items that have one; exactly rounded sums, so the order does not matter."""
    scores: dict[str, list[float]] = {}
    for result in results:
        if result.score is not None:
            scores.setdefault(result.benchmark, []).append(float(result.score))
    return {benchmark: math.fsum(values) / len(values) for benchmark, values in scores.items()}
