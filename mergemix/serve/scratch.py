"""Temporary directories that the next start removes where their process was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

LOCK = ".lock"  # held by the process as long as it lives


class Scratch:
    """A new directory. path: where it is."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_prefix()))
        unlocked = self.path / f"{LOCK}.new"
        self._descriptor = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK)  # there is no moment at which it can be seen unlocked

    def close(self) -> None:
        """Remove the directory; safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def remove_stale() -> list[Path]:
    """Remove this user's directories whose process is gone. Returns them."""
    removed = []
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        with suppress(OSError):  # it may go at any moment, or be somebody else's
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def _prefix() -> str:
    return f"mergemix-adapters-{os.getuid()}-"
