"""Shared memory that the processes of a session use, to be removed when all of them were killed.

vLLM's ranks talk through files in shared memory that only a graceful end removes. Their names do not say whose they
are; that a process of the session has one mapped does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PROCESSES = Path("/proc")
PLACE = Path("/dev/shm")
# Python's multiprocessing, and vLLM's communication between ranks on a CPU.
PREFIXES = ("psm_", "vllm_dist_")


def mapped_by(session: int) -> dict[Path, int]:
    """Path -> inode of the files in shared memory that its living processes have mapped; {} without /proc."""
    found: dict[Path, int] = {}
    with suppress(OSError):
        for process in PROCESSES.iterdir():
            with suppress(OSError, ValueError):  # it may end at any moment
                if os.getsid(int(process.name)) == session:
                    found |= _mapped(process / "maps")
    return found


def remove(files: Mapping[Path, int]) -> None:
    """Remove these files of this user, where they are the same still."""
    for path, inode in files.items():
        with suppress(OSError):
            state = path.stat(follow_symlinks=False)
            if (state.st_ino, state.st_uid) == (inode, os.getuid()):
                path.unlink()


def _mapped(maps: Path) -> dict[Path, int]:
    found = {}
    for line in maps.read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, path
        if len(fields) == 6 and fields[5].startswith(str(PLACE)):
            path = Path(fields[5])
            if path.parent == PLACE and path.name.startswith(PREFIXES):
                found[path] = int(fields[4])
    return found
