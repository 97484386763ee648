"""What processes that were killed leave behind: shared memory of vLLM's ranks, temporary directories."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from mergemix.serve import scratch, session_memory
from mergemix.serve.session_memory import mapped_by, remove

MAP = """
import mmap, os, sys
for path in sys.argv[1:]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, 4096)
    globals()[path] = mmap.mmap(descriptor, 4096)
print("mapped", flush=True)
sys.stdin.read()
"""
HOLD = """
import sys
from mergemix.serve.scratch import Scratch
held = Scratch()
print(held.path, flush=True)
sys.stdin.read()
"""


def child(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(not session_memory.PLACE.is_dir(), reason="no /dev/shm")
def test_shared_memory_of_a_session_that_was_killed_is_removed_and_no_other() -> None:
    mark = uuid.uuid4().hex[:8]
    place = session_memory.PLACE
    ours = [place / f"psm_{mark}", place / f"vllm_dist_{mark}-cpushm_0"]
    others = [place / f"psm_{mark}-other", place / f"else_{mark}"]
    others[0].touch()
    with child(MAP, *map(str, [*ours, others[1]])) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        found = mapped_by(process.pid)
        assert set(found) == set(ours)
        process.kill()
    try:
        assert mapped_by(process.pid) == {}
        again = ours[0].with_name(f"{ours[0].name}-kept")
        ours[0].rename(again)
        ours[0].touch()  # of that name, but another file
        remove(found)
        assert [path.exists() for path in (*ours, *others)] == [True, False, True, True]
    finally:
        for path in (*ours, *others, again):
            path.unlink(missing_ok=True)


def test_a_scratch_directory_is_removed_when_its_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)
    unlocked = tmp_path / f"{scratch._prefix()}unlocked"  # perhaps it is being made
    unlocked.mkdir()
    with child(HOLD) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.parent == tmp_path
        assert scratch.remove_stale() == []
        process.kill()
    assert path.is_dir()
    mine = scratch.Scratch()
    assert scratch.remove_stale() == [path]
    assert not path.exists()
    assert mine.path.is_dir()
    mine.close()
    mine.close()
    assert [*tmp_path.iterdir()] == [unlocked]
