"""Kills, second processes, damaged files and full disks: nothing recorded is lost, and the message helps."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mergemix.errors import OutputError, StudyError
from mergemix.study import Study
from mergemix.study.database import FILE_NAME
from tests.study.answers import answers, mixture, open_study, record


def start_writer(directory, items=40) -> subprocess.Popen[str]:
    """A child that records candidates until it is killed; returns once it holds the study."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.study.answers", str(directory), str(items)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "open\n"
    return child


def kill(child: subprocess.Popen[str]) -> list[int]:
    """SIGKILL; the candidates that the child reported as committed."""
    child.kill()
    reported = child.stdout.read().splitlines(keepends=True)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    return [int(line) for line in reported if line.endswith("\n")]


def assert_intact(directory, items=40) -> list[int]:
    """The database is sound and every candidate in it is whole; their numbers."""
    with sqlite3.connect(directory / FILE_NAME) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    with Study.read(directory) as study:
        numbers = [round(candidate.mixture.weights[0] * 10_000) for candidate in study.candidates()]
        for candidate, n in zip(study.candidates(), numbers, strict=True):
            stored = [(r.benchmark, r.item, r.score, r.text) for r in study.results(candidate.id)]
            assert stored == [(a.benchmark, a.item, a.score, a.text) for a in answers(n, items)]
            assert len(candidate.scores) == 2
    return numbers


def test_a_kill_loses_at_most_the_candidate_in_flight(tmp_path):
    stored: list[int] = []
    for after in (0, 1, 3, 10):
        child = start_writer(tmp_path)
        for _ in range(after):
            child.stdout.readline()
        reported = kill(child)
        before, stored = stored, assert_intact(tmp_path)
        assert stored == list(range(len(stored)))
        assert len(before) + after + len(reported) <= len(stored) <= len(before) + after + len(reported) + 1
    assert len(stored) >= 14


def test_a_kill_while_the_study_is_created_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / FILE_NAME).touch()  # SQLite creates the file before the first transaction fills it
    with pytest.raises(StudyError, match="still empty"):
        Study.read(tmp_path)
    with open_study(tmp_path) as study:
        record(study, 1)
        assert len(study.candidates()) == 1


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    child = start_writer(tmp_path)
    with pytest.raises(StudyError, match=f"in use by process {child.pid} on {os.uname().nodename}: "):
        open_study(tmp_path)
    kill(child)
    with open_study(tmp_path):
        second = subprocess.run(
            [sys.executable, "-m", "tests.study.answers", str(tmp_path), "1"], capture_output=True, text=True
        )
        assert second.returncode == 1
        assert f"in use by process {os.getpid()}" in second.stderr
    kill(start_writer(tmp_path))


def test_the_same_process_is_refused_too(tmp_path):
    with open_study(tmp_path) as study:
        with pytest.raises(StudyError, match=f"in use by process {os.getpid()}"):
            open_study(tmp_path)
        record(study, 1)  # and the one that holds it goes on


def test_a_forked_child_neither_keeps_the_lock_nor_harms_the_study(tmp_path):
    study = open_study(tmp_path)
    record(study, 1, items=40)
    started = os.pipe()
    child = os.fork()
    if child == 0:  # an engine's worker, which outlives the run
        os.write(started[1], b"1")
        signal.pause()
    try:
        os.read(started[0], 1)
        record(study, 2, items=40)
        study.close()
        with open_study(tmp_path) as study:
            record(study, 3, items=40)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(started[0])
        os.close(started[1])
    assert assert_intact(tmp_path) == [1, 2, 3]


def test_a_study_can_be_read_while_it_is_written_and_after_a_kill(tmp_path):
    child = start_writer(tmp_path)
    for _ in range(3):
        child.stdout.readline()
    with Study.read(tmp_path) as study:
        assert len(study.candidates()) >= 3
        with pytest.raises(OutputError, match="readonly"):
            record(study, 9_999)
    kill(child)
    with Study.read(tmp_path) as study:
        assert len(study.candidates()) >= 3


@pytest.mark.parametrize("damage", ["header", "middle", "truncated"])
def test_a_damaged_file_is_reported(tmp_path, damage):
    with open_study(tmp_path) as study:
        for n in range(5):
            record(study, n, items=200)
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:100] = b"x" * 100
    elif damage == "middle":
        content[4096:] = b"\xff" * (len(content) - 4096)
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)

    def use(study: Study) -> None:
        with study:
            for candidate in study.candidates():
                study.results(candidate.id)

    with pytest.raises(StudyError, match=f"intact SQLite database, but {path}"):
        use(Study.read(tmp_path))
    with pytest.raises(StudyError, match=f"intact SQLite database, but {path}"):
        use(open_study(tmp_path))


def test_another_schema_version_and_another_program_are_refused(tmp_path):
    open_study(tmp_path).close()
    path = tmp_path / FILE_NAME
    for statement, rule in [
        ("PRAGMA user_version = 2", "schema version 3, but .* has version 2"),
        ("PRAGMA user_version = 4", "schema version 3, but .* has version 4"),
        ("PRAGMA application_id = 7", "not a study"),
    ]:
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(StudyError, match=rule):
            open_study(tmp_path)
        with pytest.raises(StudyError, match=rule):
            Study.read(tmp_path)


def test_another_program_that_holds_the_file_is_reported(tmp_path, monkeypatch):
    with open_study(tmp_path) as study:
        study._connection.execute("PRAGMA busy_timeout = 0")
        other = sqlite3.connect(tmp_path / FILE_NAME)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StudyError, match="another program holds"):
            record(study, 1)
        other.close()
        record(study, 1)


def test_a_full_database_keeps_what_was_recorded(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 0, items=40)
        pages = study._connection.execute("PRAGMA page_count").fetchone()[0]
        study._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutputError, match=r"full.*recorded before is safe"):
            record(study, 1, items=2_000)
        assert [candidate.id for candidate in study.candidates()] == [1]
    assert assert_intact(tmp_path) == [0]
    with open_study(tmp_path) as study:
        record(study, 1, items=40)
    assert assert_intact(tmp_path) == [0, 1]


def test_a_full_disk_keeps_what_was_recorded(tmp_path):
    """A file-size limit fails the write calls themselves, as a full disk does."""
    child = subprocess.run(
        [sys.executable, "-m", "tests.study.answers", str(tmp_path), "40"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1].startswith("mergemix.errors.OutputError: the study must be writable")
    reported = [int(line) for line in child.stdout.splitlines()[1:]]
    assert len(reported) >= 2
    assert assert_intact(tmp_path) == reported
    with open_study(tmp_path) as study:
        record(study, len(reported), items=40)
    assert assert_intact(tmp_path) == [*reported, len(reported)]


def test_a_directory_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "study"):
        with pytest.raises(OutputError, match=r"the study directory must be writable, but .*file"):
            open_study(directory)


def test_a_database_file_that_cannot_be_opened_is_reported_and_unlocked(tmp_path):
    (tmp_path / FILE_NAME).mkdir()
    for _ in range(2):
        with pytest.raises(OutputError, match="unable to open database file"):
            open_study(tmp_path)
    (tmp_path / FILE_NAME).rmdir()
    open_study(tmp_path).close()


def test_somebody_elses_study_can_be_read():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to other users
        path = Path(directory)
        with open_study(path) as study:
            record(study, 1)
        path.chmod(0o555)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.geteuid() == 0:  # to whom every directory is writable
                    os.setuid(65534)
                with Study.read(path) as study:
                    status = 0 if [c.mixture for c in study.candidates()] == [mixture(1)] else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert [p.name for p in sorted(path.iterdir())] == ["lock", FILE_NAME]
        path.chmod(0o755)


def test_reading_what_does_not_exist_creates_nothing(tmp_path):
    with pytest.raises(StudyError, match=r"there is no .*study\.sqlite: check --study DIR"):
        Study.read(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []
