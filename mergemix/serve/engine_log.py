"""Where an engine's own output goes, and what of it says why a start failed.

vLLM's processes inherit the file descriptors 1 and 2 of the process that starts them, for life. So both are
exchanged around the start, and this process's own stdout stays clean.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergemix.errors import OutputError

TAIL_BYTES = 256 << 10
# What vLLM's processes say when another process failed: never the reason itself.
_ECHOES = ("initialization failed", "EngineCore failed to start", "Engine core", "Failed core proc")
_PREFIX = re.compile(r"^(?:\([\w -]+pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]+\] ?)?")
_RAISED = re.compile(r"^(?P<kind>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)): (?P<message>.+)$")


class EngineLog:
    """Receives the output of the processes that are started inside `redirected`.

    path: a file that is appended to, or None for this process's stderr. Raises OutputError when the file cannot be
    written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._tail: deque[bytes] = deque()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise OutputError(f"cannot write the engine's log {path}: {error.strerror}") from error
            self._begin = os.fstat(self._sink).st_size
        else:
            self._sink = self._pipe_to_stderr()

    @contextmanager
    def redirected(self) -> Iterator[None]:
        """Exchange descriptors 1 and 2 of this process, so that whoever is started now writes here."""
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(self._sink, 1)
            os.dup2(self._sink, 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])

    def adopt_logger(self, name: str) -> None:
        """Let the handlers of this process's logger `name`, which write to stdout, write here."""
        stream = os.fdopen(os.dup(self._sink), "w", buffering=1)
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(stream)

    def reason(self) -> str | None:
        """The error that the processes reported first, or None if none can be told."""
        return find_reason(self._read_tail())

    def close(self) -> None:
        os.close(self._sink)

    def _read_tail(self) -> str:
        if self._path is None:
            return b"".join(self._tail).decode(errors="replace")
        with self._path.open("rb") as file:
            file.seek(max(self._begin, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            return file.read().decode(errors="replace")

    def _pipe_to_stderr(self) -> int:
        reader, writer = os.pipe()
        terminal = os.dup(2)

        def pump() -> None:
            while data := os.read(reader, 1 << 16):
                self._tail.append(data)
                if len(self._tail) > 256:
                    self._tail.popleft()
                os.write(terminal, data)
            os.close(reader)
            os.close(terminal)

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
    if raised:
        return f"{raised[0][0].rpartition('.')[2]}: {raised[0][1]}"
    return None
