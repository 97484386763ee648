"""Where an engine's own output goes, and what of it says why it failed."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from pathlib import Path

from mergemix.errors import OutputError

TAIL_BYTES = 256 << 10
# What vLLM's processes say when another process failed: never the reason itself.
_ECHOES = ("initialization failed", "Engine core", "EngineCore encountered", "Failed core proc")
_PREFIX = re.compile(r"^(?:\([\w -]+pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]+\] ?)?")
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception)): (?P<message>.+)$")


class EngineLog:
    """Takes the output of a child process: `fileno` goes to its stdout and stderr.

    path: a file that is appended to, or None for this process's stderr. Raises OutputError when the file cannot be
    written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tail: deque[bytes] = deque(maxlen=256)
        self._begin = 0
        if path is None:
            self.fileno = self._pipe_to_stderr()
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fileno = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"cannot write the engine's log {path}: {error.strerror}") from error
        self._begin = os.fstat(self.fileno).st_size

    def release(self) -> None:
        """To be called when the child has the descriptor: only its processes keep it open then."""
        os.close(self.fileno)

    @property
    def where(self) -> str:
        """Tells a user where to read it."""
        return "its output is above" if self._path is None else f"its log is {self._path}"

    def reason(self) -> str | None:
        """The error that the child's processes reported first, or None if none can be told."""
        if self._path is None:
            return find_reason(b"".join(self._tail).decode(errors="replace"))
        with self._path.open("rb") as file:
            file.seek(max(self._begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return find_reason(file.read().decode(errors="replace"))

    def _pipe_to_stderr(self) -> int:
        reader, writer = os.pipe()
        stderr = os.dup(2)

        def pump() -> None:
            while data := os.read(reader, 1 << 16):
                self._tail.append(data)
                os.write(stderr, data)
            os.close(reader)
            os.close(stderr)

        threading.Thread(target=pump, name="mergemix-engine-output", daemon=True).start()
        return writer


def find_reason(text: str) -> str | None:
    """The first exception in vLLM's log that is not the echo of another; one of our own is preferred.

    Its class is left out where it is ours, since the message then says all.
    """
    raised = []
    for line in text.splitlines():
        match = _RAISED.match(_PREFIX.sub("", line.strip()).strip())
        if match and not any(echo in match["message"] for echo in _ECHOES):
            raised.append((match["kind"], match["message"].strip()))
    for kind, message in raised:
        if kind.startswith("mergemix."):
            return message
    return f"{raised[0][0].rpartition('.')[2]}: {raised[0][1]}" if raised else None
