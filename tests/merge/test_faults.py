"""A merge whose files fail at any point: a clear error, no partial output, the inputs as they were."""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemix.checkpoints import ranges
from mergemix.errors import CheckpointError, MergeMixError, OutputError
from mergemix.merge import merge_many
from mergemix.merge import stream as stream_module
from mergemix.merge.buffers import Buffers
from mergemix.mixture import Mixture
from tests.merge.families import NAMES, write_family
from tests.tiny import random_tensors

MIXTURES = {"a": Mixture.uniform(NAMES), "b": Mixture.of(NAMES, {"math": 3, "web": 1})}


class FaultyFiles:
    """A file layer that fails at its n-th call: reads at the operands' side, writes at the output's.

    fault: "EIO", "ENOSPC", "EDQUOT": that error; "short": half of what was asked for; "end": as if the file ended.
    """

    def __init__(self, fault: str, call: int) -> None:
        self.calls = 0
        self._fault = fault
        self._call = call
        self._lock = threading.Lock()

    def hits(self) -> bool:
        with self._lock:
            self.calls += 1
            return self.calls - 1 == self._call

    def error(self) -> OSError:
        number = getattr(errno, self._fault)
        return OSError(number, os.strerror(number))

    def reading(self, read: Callable[..., int]) -> Callable[..., int]:
        def faulty(file: ranges.LocalFile, view: memoryview, offset: int) -> int:
            if not self.hits():
                return read(file, view, offset)
            if self._fault == "end":
                return 0
            if self._fault == "short":
                return read(file, view[: max(len(view) // 2, 1)], offset)
            raise self.error()

        return faulty

    def writing(self, write: Callable[..., int]) -> Callable[..., int]:
        def faulty(file: int, data: memoryview, offset: int) -> int:
            if not self.hits():
                return write(file, data, offset)
            if self._fault == "short":
                return write(file, data[: max(len(data) // 2, 1)], offset)
            raise self.error()

        return faulty

    def calling(self, call: Callable[..., None]) -> Callable[..., None]:
        def faulty(*arguments: int) -> None:
            if self.hits():
                raise self.error()
            call(*arguments)

        return faulty


@contextmanager
def failing(place: str, faulty: FaultyFiles) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if place == "read":
            patch.setattr(ranges.LocalFile, "read_into", faulty.reading(ranges.LocalFile.read_into))
        elif place == "write":
            patch.setattr(os, "pwrite", faulty.writing(os.pwrite))
        else:
            patch.setattr(os, place, faulty.calling(getattr(os, place)))
        yield


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


PLACES = {
    "read": ["EIO", "ESTALE", "short", "end"],
    "write": ["EIO", "ENOSPC", "EDQUOT", "short"],
    "fsync": ["EIO", "ENOSPC"],
    "posix_fallocate": ["ENOSPC", "EOPNOTSUPP"],
}


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place_and_fault=st.sampled_from([(place, fault) for place, faults in PLACES.items() for fault in faults]),
    call=st.integers(0, 60),
    workers=st.integers(1, 5),
    pages=st.integers(1, 4),
)
def test_a_fault_at_any_point_leaves_nothing_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    place_and_fault: tuple[str, str],
    call: int,
    workers: int,
    pages: int,
) -> None:
    place, fault = place_and_fault
    root = tmp_path_factory.mktemp("faults")
    shapes = {"embed": (300, 40), "layer": (128, 40), "norm": (40,)}
    experts = {name: random_tensors(shapes, seed) for seed, name in enumerate(NAMES)}
    family = write_family(root / "inputs", None, experts, (2, 1, 3))
    (root / "outputs").mkdir()
    buffers = Buffers(workers, 4096 * pages, 0, 0)
    monkeypatch.setattr(stream_module, "divide_memory", lambda plan, memory_bytes: buffers)
    merge_many(family, MIXTURES, root / "whole")
    before, open_files = digests(root / "inputs"), len(os.listdir("/proc/self/fd"))
    faulty = FaultyFiles(fault, call)
    harmless = fault in ("short", "EOPNOTSUPP")
    error: MergeMixError | None = None
    with failing(place, faulty):
        try:
            merge_many(family, MIXTURES, root / "outputs" / "out")
        except MergeMixError as raised:
            error = raised
    complete = "is complete, but may not survive a power failure" in str(error)
    if error is not None:
        assert isinstance(error, CheckpointError if place == "read" else OutputError)
        assert "\n" not in str(error)
        assert re.search("inputs/(math|code|web)/model" if place == "read" else "outputs/out", str(error))
    assert digests(root / "inputs") == before
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mergemix-merge")]
    assert (error is not None) == (faulty.calls > call and not harmless)
    assert not complete or place == "fsync"
    if error is not None and not complete:
        assert os.listdir(root / "outputs") == []
    else:
        assert digests(root / "outputs" / "out") == digests(root / "whole")


@pytest.mark.parametrize("place", ["read", "write", "fsync", "posix_fallocate"])
def test_every_place_is_really_passed(tmp_path: Path, place: str) -> None:
    """Otherwise the test above could not fail."""
    experts = {name: random_tensors({"w": (5000,)}, seed) for seed, name in enumerate(NAMES)}
    faulty = FaultyFiles("EIO", -1)
    with failing(place, faulty):
        merge_many(write_family(tmp_path, None, experts), MIXTURES, tmp_path / "out")
    assert faulty.calls >= 2


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = {name: random_tensors({"w": (5000,)}, seed) for seed, name in enumerate(NAMES)}
    family = write_family(tmp_path, None, experts)
    merge_many(family, MIXTURES, tmp_path / "direct")
    open_, refused = os.open, []

    def no_direct(path: str | Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and not flags & os.O_DIRECTORY:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "open", no_direct)
    merge_many(family, MIXTURES, tmp_path / "ordinary")
    assert len(refused) == 1
    assert digests(tmp_path / "ordinary") == digests(tmp_path / "direct")
