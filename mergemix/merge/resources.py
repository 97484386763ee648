"""Memory and disk space: what there is of them now."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """Bytes that this process had resident at most; with what started it, where the system tells no better."""
    with suppress(OSError, KeyError):
        # Not ru_maxrss: that begins with the resident memory of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(dict(line.split(":", 1) for line in status.splitlines())["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def process_memory() -> int:
    """Bytes that this process has resident now; the peak where that cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * resource.getpagesize()


def free_memory() -> int | None:
    """Bytes that processes can still get: of the machine, and of the container's limit. None: unknown."""
    limits = []
    with suppress(OSError):
        information = _fields(Path("/proc/meminfo"), ":")
        limits.append(1024 * (information.get("MemAvailable", 0) + information.get("SwapFree", 0)))
    with suppress(OSError, ValueError):  # "max": no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        limits.append(limit - used + _fields(CGROUP / "memory.stat").get("file", 0))  # caches can go
    return min(limits, default=None)


def free_disk(out: Path) -> int:
    """Bytes free for the new directory `out`, with what killed merges into it left: the next one removes that.

    Raises OSError when its parent is not there.
    """
    whole = Path(os.path.abspath(out))
    free = shutil.disk_usage(whole.parent).free
    for entry in os.scandir(whole.parent):
        if entry.name.startswith(f".{whole.name}.tmp-"):
            for folder, _, files in os.walk(entry.path):
                with suppress(OSError):
                    free += sum(512 * os.lstat(os.path.join(folder, file)).st_blocks for file in files)
    return free


def _fields(path: Path, separator: str | None = None) -> dict[str, int]:
    """The numbers of a file with one name and number a line."""
    pairs = (line.split(separator, 1) for line in path.read_text().splitlines())
    return {name: int(rest.split()[0]) for name, rest in pairs}
