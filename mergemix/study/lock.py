"""One process at a time in a study directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from mergemix.errors import StudyError


class DirectoryLock:
    """An exclusive flock on DIRECTORY/lock, held until `release` or the end of the process, however it ends.

    The file holds "pid host" of the owner for the message; it stays behind, because removing it would let
    two processes lock two different files of that name. A forked child drops its copy of the descriptor:
    an engine's worker that outlives a killed run must not keep the study locked.

    Raises StudyError naming the owner when another process (or this one) holds it, OSError when the file
    cannot be opened.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._descriptor, 256, 0).decode(errors="replace").split()
            self._close()
            by = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
            raise StudyError(
                f"a study directory can be used by one process at a time, but {directory} is in use by {by}: "
                "wait for it or stop it, or give another --study DIR"
            ) from None
        except OSError:
            self._close()
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        """Let others in; safe to call twice."""
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the last descriptor of the open file takes the flock with it
            self._descriptor = None
