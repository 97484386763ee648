"""Runs inside the sandbox in place of an answer: tries what must not work. Its test calls `main`.

Prints the guarantees that do not hold, one a line, and at last that all was tried.
"""

import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable

_FAILURES = (OSError, MemoryError, RuntimeError, ValueError)


def works(attempt: Callable, *arguments: object) -> bool:
    try:
        attempt(*arguments)
    except _FAILURES:
        return False
    return True


def readable(path: str) -> bool:
    return works(os.listdir, path) or works(open, path)


def writable(path: str) -> bool:
    """By the mount, whoever owns what is there."""
    return not os.statvfs(path).f_flag & os.ST_RDONLY


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def fill(name: str, size: int) -> int:
    """Bytes that a new file of the scratch directory took, of `size`."""
    block, taken = bytes(1 << 16), 0
    with open(name, "wb", buffering=0) as file:
        while taken < size:
            try:
                taken += file.write(block)
            except OSError:
                break
    return taken


def scratch_bytes(limits: dict[str, int]) -> int:
    """What fits into the scratch directory, up to twice what should."""
    total, count = 0, 0
    while total < 2 * limits["disk_bytes"]:
        taken = fill(f"file{count}", limits["file_bytes"])
        if not taken:
            break
        total, count = total + taken, count + 1
    for name in os.listdir("."):
        os.unlink(name)
    return total


def thread_count(limit: int) -> int:
    """How many threads can be alive, the main one included, up to twice as many as should."""
    stop = threading.Event()
    threads: list[threading.Thread] = []
    while len(threads) < 2 * limit:
        thread = threading.Thread(target=stop.wait)
        if not works(thread.start):
            break
        threads.append(thread)
    stop.set()
    for thread in threads:
        thread.join()
    return len(threads) + 1


def open_descriptors() -> int:
    return sum(works(os.fstat, number) for number in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def kill_supervisor() -> bool:
    """True where it can be done: then this process is gone too, or nobody's child."""
    works(os.kill, os.getppid(), signal.SIGKILL)
    works(os.kill, -1, signal.SIGTERM)
    return os.getppid() != 1


def main(limits: dict[str, int]) -> None:
    outer = ("/home", "/proc", "/sys", "/var", "/run", "/etc/passwd", "/dev/shm", "/dev/kmsg", "/mnt", "/opt")
    broken = {
        "no network": works(socket.socket),
        "no files but those of Python": any(map(readable, outer)),
        "no writing outside the scratch directory": any(map(writable, ("/", os.__file__, sys.executable))),
        "a scratch directory of limited size": scratch_bytes(limits) > limits["disk_bytes"],
        "files of limited size": fill("file", 2 * limits["file_bytes"]) > limits["file_bytes"],
        "limited memory": works(bytearray, limits["memory_bytes"]),
        "no other processes": works(fork),
        "a limited number of threads": thread_count(limits["threads"]) > limits["threads"],
        "no rights": works(os.setuid, 0) or works(os.chroot, "/") or works(socket.sethostname, "outer"),
        "an empty environment": bool(set(os.environ) - {"MALLOC_ARENA_MAX", "LD_LIBRARY_PATH"}),
        "no open files of the outer process": open_descriptors() > 4,
        "no way to the supervisor": kill_supervisor(),
    }
    lines = [f"{name}: it could be broken" for name in broken if broken[name]]
    sys.stdout.write("\n".join([*lines, "all tried"]))
