"""Checkpoints to resume from: each whole or absent, the last good one kept until the next one is on the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError, OutputError
from mergemix.train.averaging import WeightMean

IDENTITY, STATE = "identity.json", "state.json"
PREFIX = "step-"


@dataclass
class Progress:
    """How far a training is.

    losses: of each step done. seconds: spent in them. resumed_at: steps that were done at each resume.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)


class States:
    """The hidden directory beside `out` that holds what a training needs to go on; locked while one uses it.

    All processes open it; `main` is the one that writes. Raises OutputError when another training uses it or it cannot
    be made, ConfigError when it holds another training than `identity`.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, main: bool) -> None:
        self.directory = out.parent / f".{out.name}.training"
        self._main = main
        self._lock = -1
        if not main:
            return
        with _translated(self.directory):
            self.directory.mkdir(exist_ok=True)
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._take_lock(out)
            self._check_same(out, identity)
        except BaseException:
            os.close(self._lock)
            raise

    def _take_lock(self, out: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another training uses {out}: wait for it or stop it, or give another directory"
            ) from None
        except OSError:
            pass  # some network file systems have no locks

    def _check_same(self, out: Path, identity: dict[str, Any]) -> None:
        path = self.directory / IDENTITY
        if path.is_file():
            check_same(json.loads(path.read_text()), identity, f"the training begun in {self.directory}", out)
            return
        with _translated(self.directory):
            _write(self.directory / f"{IDENTITY}.tmp", json.dumps(identity).encode())
            os.rename(self.directory / f"{IDENTITY}.tmp", path)

    def latest(self) -> Path | None:
        """The last good checkpoint."""
        found = sorted(self.directory.glob(f"{PREFIX}*"))
        return found[-1] if found else None

    def save(self, accelerator: Any, progress: Progress, mean: WeightMean) -> None:
        """Write a checkpoint aside, bring it to the disk, rename it, and only then remove the one before.

        Called by all processes. Raises OutputError when it cannot be written; the one before is then still there.
        """
        aside = self.directory / "new"
        if self._main:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        with _translated(aside, self.latest()), _quiet():
            accelerator.save_state(str(aside))
            mean.save(aside, accelerator)
        accelerator.wait_for_everyone()
        if self._main:
            before = list(self.directory.glob(f"{PREFIX}*"))
            with _translated(aside, self.latest()):
                _write(aside / STATE, json.dumps(asdict(progress)).encode())
                for folder, _, files in os.walk(aside):
                    for name in (*files, "."):
                        _sync(Path(folder) / name)
                os.rename(aside, self.directory / f"{PREFIX}{progress.step:09d}")
                _sync(self.directory)
            for path in before:
                shutil.rmtree(path, ignore_errors=True)
        accelerator.wait_for_everyone()

    def nbytes(self) -> int:
        """Bytes of the checkpoints that are there."""
        files = self.directory.glob(f"{PREFIX}*/**/*")
        return sum(path.stat().st_size for path in files if path.is_file())

    def load(self, accelerator: Any, mean: WeightMean) -> Progress:
        """Put the last good checkpoint into what `accelerator` prepared and `mean`. Without one, nothing is changed."""
        path = self.latest()
        if path is None:
            return Progress()
        with _random_states_kept():
            accelerator.load_state(str(path))
        mean.load(path, accelerator)
        progress = Progress(**json.loads((path / STATE).read_text()))
        progress.resumed_at.append(progress.step)
        return progress

    def remove(self) -> None:
        """All of it: the training is finished."""
        if self._main:
            shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """Let others in. Where nothing was saved, nothing stays."""
        if self._lock >= 0:
            if self.latest() is None:
                shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def check_same(found: dict[str, Any], identity: dict[str, Any], what: str, out: Path) -> None:
    """Raise ConfigError naming all in which `found` is another training than `identity`."""
    differing = [text for key in identity for text in _differences(key, found.get(key), identity[key])]
    if differing:
        raise ConfigError(
            f"{what} is another one ({'; '.join(differing)}): give the same options and data as then, or another "
            f"directory than {out}"
        )


def _differences(key: str, there: Any, asked: Any) -> Iterator[str]:
    """A text for each value that differs; of mappings by their keys, of digests the beginning."""
    if there == asked:
        return
    if isinstance(there, dict) and isinstance(asked, dict):
        for name in sorted({*there, *asked}):
            yield from _differences(f"{key} of {name}", there.get(name), asked.get(name))
        return
    shown = [value[:12] if isinstance(value, str) else value for value in (there, asked)]
    yield f"{key}: {shown[0]} there, {shown[1]} asked for"


@contextmanager
def _quiet() -> Iterator[None]:
    """Accelerate warns at every checkpoint of a model whose weights are tied."""
    logger = logging.getLogger("accelerate")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Accelerate restores Python's and numpy's random states too, which belong to the caller."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def _translated(path: Path, kept: Path | None = None) -> Iterator[None]:
    """Errors of the disk as OutputError. torch and safetensors report them as RuntimeError and SafetensorError."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else:
            full = shutil.disk_usage(path.parent).free < 1 << 20
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        if full and not isinstance(error, OSError):  # torch tells of a position in its file
            why = os.strerror(errno.ENOSPC)
        hint = "; free some space" if full else ""
        there = f"; the checkpoint before is {kept}, and the same command goes on there" if kept else ""
        shutil.rmtree(path, ignore_errors=True) if path.name == "new" else None
        raise OutputError(f"cannot write {path}: {why}{hint}{there}") from error


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
