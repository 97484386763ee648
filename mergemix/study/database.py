"""The SQLite file of a study: its schema, how it is opened, and what its errors mean to a user."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergemix.errors import OutputError, StudyError

FILE_NAME = "study.sqlite"
APPLICATION_ID = 0x4D4D4958  # "MMIX": tells our files from other SQLite files
SCHEMA_VERSION = 3

_SCHEMA = (
    """CREATE TABLE manifest (
        part TEXT NOT NULL CHECK (part IN ('identity', 'info')),
        key TEXT NOT NULL,
        value TEXT NOT NULL,  -- JSON
        PRIMARY KEY (part, key)
    )""",
    """CREATE TABLE candidate (
        id INTEGER PRIMARY KEY,  -- 1, 2, ... in the order of evaluation
        mixture TEXT NOT NULL,  -- Mixture.key()
        repeat INTEGER NOT NULL CHECK (repeat >= 0),  -- n: evaluated over again, for the noise floor
        origin TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('done', 'failed', 'stopped')),
        reason TEXT CHECK ((reason IS NULL) = (status = 'done')),
        estimate TEXT CHECK ((estimate IS NOT NULL) = (status = 'stopped')),  -- JSON, of one stopped early
        proven INTEGER NOT NULL CHECK (proven IN (0, 1)),  -- the engine's self-test had passed
        timings TEXT NOT NULL,  -- JSON, name to seconds
        swap TEXT NOT NULL,  -- JSON, what the swap to it moved: bytes by place, destinations
        metrics TEXT NOT NULL,  -- JSON, what benchmarks report besides their means
        recorded TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
        UNIQUE (mixture, repeat)
    )""",
    """CREATE TABLE benchmark_score (
        candidate INTEGER NOT NULL REFERENCES candidate (id),
        benchmark TEXT NOT NULL,
        score REAL NOT NULL,  -- mean over the items that have one
        PRIMARY KEY (candidate, benchmark)
    ) WITHOUT ROWID""",
    """CREATE TABLE item (
        id INTEGER PRIMARY KEY,  -- in the order of the suite
        benchmark TEXT NOT NULL,
        item TEXT NOT NULL,
        UNIQUE (benchmark, item)
    )""",
    """CREATE TABLE item_score (
        candidate INTEGER NOT NULL REFERENCES candidate (id),
        item INTEGER NOT NULL REFERENCES item (id),
        score REAL CHECK ((score IS NULL) = (error IS NOT NULL)),
        text TEXT,  -- what the model answered, where it was kept
        error TEXT,  -- why the item could not be scored
        cut INTEGER NOT NULL,  -- tokens of its prompts that did not fit the model
        unfinished INTEGER NOT NULL,  -- answers that were ended by their limit
        PRIMARY KEY (candidate, item)
    ) WITHOUT ROWID""",
)

# Errors of the place, not of the data: SQLite's primary result codes.
_OUTPUT_ERRORS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into ones that say what to do; a bug keeps its traceback.

    Raises OutputError where the disk is full or the place cannot be written, StudyError where the file is
    damaged, not a database, or held by another program.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _OUTPUT_ERRORS:
            raise OutputError(
                f"the study must be writable, but {path} gives {error}: free space or permissions there "
                "and run the same command again; what was recorded before is safe"
            ) from error
        if code in _DAMAGE:
            raise StudyError(
                f"the study must be an intact SQLite database, but {path} gives {error}: "
                "restore it from a copy, or give another --study DIR"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise StudyError(
                f"the study must be free to write, but another program holds {path}: "
                "close it and run the same command again"
            ) from error
        raise
    except OSError as error:
        raise OutputError(
            f"the study directory must be writable, but {error.filename or path} gives "
            f"{error.strerror or error}: give another --study DIR"
        ) from error


def connect(path: Path) -> sqlite3.Connection:
    """Open or create the database for writing; its schema is complete or the file is still empty.

    WAL with synchronous=FULL: a committed result survives a kill and, as every commit is synced, a power
    failure too. That costs milliseconds a candidate, and a candidate costs seconds.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    try:
        _check_version(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """Open an existing database for reading, also while a run is writing it.

    Raises StudyError when there is none, or none with a study in it.
    """
    if not path.is_file():
        raise StudyError(f"a study must exist to be read, but there is no {path}: check --study DIR")
    # SQLite needs to write beside a WAL database even to read it. In somebody else's directory that fails,
    # but there a file without a log has been closed, and can be read as it is.
    closed = not path.with_name(f"{path.name}-wal").exists() and not os.access(path.parent, os.W_OK)
    uri = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if closed else ''}"
    connection = sqlite3.connect(uri, uri=True, timeout=10.0)
    try:
        if _check_version(connection, path):
            raise StudyError(f"a study must exist to be read, but {path} is still empty: run it first")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself on some errors
            connection.execute("ROLLBACK")
        raise


def create_schema(connection: sqlite3.Connection) -> None:
    """Inside a transaction, so that a kill leaves an empty file and not half a schema."""
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def is_empty(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _check_version(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is still empty. Raises StudyError when it is another program's or version's."""
    if is_empty(connection):
        return True
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application_id != APPLICATION_ID:
        raise StudyError(f"{path} is an SQLite database but not a study: give another --study DIR")
    if version != SCHEMA_VERSION:
        raise StudyError(
            f"this mergemix reads studies of schema version {SCHEMA_VERSION}, but {path} has version "
            f"{version}: use the mergemix that wrote it, or give another --study DIR"
        )
    return False
