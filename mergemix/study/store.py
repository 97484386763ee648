"""The study: every candidate with all its evidence, in one SQLite file that survives a kill."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.study import database, manifest
from mergemix.study.lock import DirectoryLock
from mergemix.study.records import CandidateRecord, ItemRecord, ItemResult

_CANDIDATE = "SELECT id, mixture, repeat, origin, status, reason, proven, timings, swap FROM candidate"


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
            "(SELECT coalesce(max(id), 0) FROM candidate WHERE status = 'done')"
        )
        self._to_retry = {row[0] for row in rows}

    def _holds_nothing(self) -> bool:
        return (
            self._connection.execute("SELECT count(*) FROM candidate WHERE status = 'done'").fetchone()[0]
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
    ) -> CandidateRecord:
        """Store one evaluated candidate with all its items, whole or not at all, and return it as stored.

        proven: the engine's self-test had passed before these scores were taken. swap: JSON values.

        Raises ValueError when a result already stands for this mixture and repeat, there are no results, or a
        score is not finite; OutputError when the disk is full (earlier results are intact).
        """
        if not results:
            raise ValueError(f"a done candidate has item results, but {mixture} has none")
        for result in results:
            if not math.isfinite(result.score):
                raise ValueError(f"item {result.item!r} of {result.benchmark!r} has the score {result.score}")
        with database.explained(self.path), database.transaction(self._connection):
            candidate = self._put(mixture, repeat, origin, None, timings, swap or {}, proven)
            self._connection.executemany(
                "INSERT INTO item (benchmark, item) VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(result.benchmark, result.item) for result in results],
            )
            self._connection.executemany(
                "INSERT INTO item_score (candidate, item, score, text) "
                "SELECT ?, id, ?, ? FROM item WHERE benchmark = ? AND item = ?",
                [(candidate, float(r.score), r.text, r.benchmark, r.item) for r in results],
            )
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
            candidate = self._put(mixture, repeat, origin, reason, timings or {}, {}, proven=False)
        return self._get(candidate)

    def results(self, candidate_id: int) -> list[ItemRecord]:
        """All item results of a candidate in suite order; empty when it failed."""
        with database.explained(self.path):
            rows = self._connection.execute(
                "SELECT benchmark, item.item, score, text FROM item_score "
                "JOIN item ON item.id = item_score.item WHERE candidate = ? ORDER BY item.id",
                (candidate_id,),
            )
            return [ItemRecord(*row) for row in rows]

    def item_scores(self, candidate_id: int) -> dict[str, list[tuple[str, float]]]:
        """(item, score) by benchmark, in suite order."""
        scores: dict[str, list[tuple[str, float]]] = {}
        for result in self.results(candidate_id):
            scores.setdefault(result.benchmark, []).append((result.item, result.score))
        return scores

    def score_matrix(self, benchmark: str, candidate_ids: Sequence[int]) -> tuple[list[str], np.ndarray]:
        """The benchmark's items in suite order, and their float64 scores [candidates, items].

        NaN where a candidate has no score for an item.
        """
        with database.explained(self.path):
            items = self._connection.execute(
                "SELECT id, item FROM item WHERE benchmark = ? ORDER BY id", (benchmark,)
            ).fetchall()
            column = {item_id: index for index, (item_id, _) in enumerate(items)}
            matrix = np.full((len(candidate_ids), len(items)), np.nan)
            for row, candidate in enumerate(candidate_ids):
                scores = self._connection.execute(
                    "SELECT item, score FROM item_score WHERE candidate = ?", (candidate,)
                )
                for item_id, score in scores:
                    if item_id in column:
                        matrix[row, column[item_id]] = score
        return [name for _, name in items], matrix

    def item_evaluations(self) -> int:
        """How many items have been answered by all candidates together: what the study has cost."""
        with database.explained(self.path):
            return int(self._connection.execute("SELECT count(*) FROM item_score").fetchone()[0])

    def close(self) -> None:
        """Close the file and let others in; safe to call twice."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(
        self,
        mixture: Mixture,
        repeat: int,
        origin: str,
        reason: str | None,
        timings: Mapping[str, float],
        swap: Mapping[str, Any],
        proven: bool,
    ) -> int:
        """Write the candidate's row in the caller's transaction; a failure that is retried keeps its id."""
        status = "done" if reason is None else "failed"
        seconds = json.dumps({name: float(s) for name, s in timings.items()})
        values = (origin, status, reason, int(proven), seconds, json.dumps(dict(swap)))
        found = self._connection.execute(
            "SELECT id FROM candidate WHERE mixture = ? AND repeat = ?", (mixture.key(), repeat)
        ).fetchone()
        if found is None:
            cursor = self._connection.execute(
                "INSERT INTO candidate (mixture, repeat, origin, status, reason, proven, timings, swap) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (mixture.key(), repeat, *values),
            )
            return int(cursor.lastrowid or 0)
        if found[0] not in self._to_retry:
            raise ValueError(f"repeat {repeat} of {mixture} has a result already: candidate {found[0]}")
        self._connection.execute(
            "UPDATE candidate SET origin = ?, status = ?, reason = ?, proven = ?, timings = ?, swap = ? "
            "WHERE id = ?",
            (*values, found[0]),
        )
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
            )
            for row in rows
        ]


def _means(results: Sequence[ItemResult]) -> dict[str, float]:
    """Mean score by benchmark; exactly rounded sums, so that the order of the items does not matter."""
    scores: dict[str, list[float]] = {}
    for result in results:
        scores.setdefault(result.benchmark, []).append(float(result.score))
    return {benchmark: math.fsum(values) / len(values) for benchmark, values in scores.items()}
