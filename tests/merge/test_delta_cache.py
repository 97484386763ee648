"""The delta cache without tensors: who goes into which tier, and the memory that engines share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.merge import delta_cache
from mergemix.merge.delta_cache import Layout, Segment, assign_tiers, remove_stale

LAYOUT = Layout(flags=3, nbytes=10_000)
USER = """
import sys
from pathlib import Path
from mergemix.merge.delta_cache import Layout, Segment
segment = Segment(sys.argv[1], Layout(flags=3, nbytes=10_000), Path(sys.argv[2]))
print(int(segment.flags[1]), int(segment.data[77]), flush=True)
segment.data[77] = 9
segment.flags[1] = 1
print("filled", flush=True)
sys.stdin.readline()
segment.close()
print("closed", flush=True)
"""


@given(sizes=st.lists(st.integers(0, 100), max_size=30), device=st.integers(0, 500), host=st.integers(0, 500))
def test_tiers_keep_to_their_budgets_and_leave_no_destination_out_that_would_fit(
    sizes: list[int], device: int, host: int
) -> None:
    tiers = assign_tiers(sizes, device, host)
    used = {
        tier: sum(s for s, t in zip(sizes, tiers, strict=True) if t == tier) for tier in delta_cache.TIERS
    }
    assert used["device"] <= device
    assert used["host"] <= host
    for size, tier in zip(sizes, tiers, strict=True):
        assert tier == "device" or used["device"] + size > device
        assert tier != "disk" or used["host"] + size > host


def test_what_comes_first_in_the_plan_is_nearest() -> None:
    assert assign_tiers([4, 4, 4, 4, 1], 8, 5) == ["device", "device", "host", "disk", "host"]
    assert assign_tiers([4, 4], 0, 0) == ["disk", "disk"]


@pytest.fixture
def others(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def user(others: list[subprocess.Popen[str]], place: Path) -> subprocess.Popen[str]:
    """Another process that uses the segment, and has filled a slot."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER, "abc", str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    others.append(process)
    return process


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_share_what_one_has_filled_and_the_last_one_removes_it(
    tmp_path: Path, others: list[subprocess.Popen[str]]
) -> None:
    first = user(others, tmp_path)
    assert (line(first), line(first)) == ("0 0", "filled")
    second = user(others, tmp_path)
    assert (line(second), line(second)) == ("1 9", "filled")
    assert remove_stale(tmp_path) == []
    first.communicate("\n")
    [path] = tmp_path.iterdir()
    assert path.stat().st_size == LAYOUT.total
    assert path.stat().st_mode & 0o777 == 0o600
    second.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_removed_by_the_next(
    tmp_path: Path, others: list[subprocess.Popen[str]]
) -> None:
    process = user(others, tmp_path)
    assert (line(process), line(process)) == ("0 0", "filled")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [path] = tmp_path.iterdir()
    foreign = tmp_path / "mergemix-of-somebody-else"
    foreign.touch()
    assert remove_stale(tmp_path) == [path]
    assert list(tmp_path.iterdir()) == [foreign]


def test_one_process_may_use_a_segment_twice_and_close_twice(tmp_path: Path) -> None:
    first, second = Segment("abc", LAYOUT, tmp_path), Segment("abc", LAYOUT, tmp_path)
    other = Segment("abd", LAYOUT, tmp_path)
    first.data[5] = 3
    first.flags[2] = 1
    assert (second.data[5], second.flags[2], other.data[5]) == (3, 1, 0)
    assert second.data.size == LAYOUT.nbytes
    kept = second.data
    first.close()
    first.close()
    assert len(list(tmp_path.iterdir())) == 2
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == [other.path.name]
    assert kept[5] == 3
    other.close()


def test_memory_that_is_not_there_is_an_error_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"host cache needs .* more of shared memory, but only .* are free"):
        Segment("abc", Layout(1, 1 << 50), tmp_path)
    assert list(tmp_path.iterdir()) == []

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        Segment("abc", LAYOUT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_segment_is_taken_as_a_whole_when_it_is_made(tmp_path: Path) -> None:
    segment = Segment("abc", Layout(1, 1 << 20), tmp_path)
    assert 512 * segment.path.stat().st_blocks >= 1 << 20
    segment.close()
