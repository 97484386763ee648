"""Builds the isolation for one item, runs the driver in it, reports. A program of its own: imports no MergeMix.

Started by runner.py in a fresh interpreter, because namespaces cannot be entered by a process with threads.
Three processes: this one enters the namespaces and waits; its child is the first process of the process
namespace, so that all others die with it, and supervises; its child in turn becomes the driver.

Standard output carries the report, see `report_of` in runner.py. Standard input goes through to the driver.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False  # the real one costs the import of typing, for every item
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_NAMESPACES = {  # in the order in which they are entered; the user namespace gives the right to the others
    "a mount namespace": 0x00020000,
    "a network namespace": 0x40000000,
    "a process namespace": 0x20000000,
    "an IPC namespace": 0x08000000,
    "a host name namespace": 0x04000000,
}
_NEW_USER = 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR, _CURRENT_DIRECTORY, _RECURSIVE, _READ_ONLY_NOSUID = 442, -100, 0x8000, 3
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_KILL = 9
_NOBODY = 65534
# Hides everything of the outer system while the new root is built; the kernel's own files are no source of it.
_NEW_ROOT = "/proc"
_CHUNK_BYTES = 1 << 16
_VERDICT_BYTES = 4096
_LAST_WORDS_SECONDS = 1.0  # for the driver to flush its output, once it has given its verdict
_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine does not give a guarantee."""


def system_call(name: str, *arguments: object) -> None:
    """Calls a function of the C library that returns -1 on errors. Raises OSError."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def must(guarantee: str, step: Callable, *arguments: object) -> None:
    """Raises Refused, in words for the user, where a step fails."""
    try:
        step(*arguments)
    except (OSError, ValueError) as error:
        raise Refused(f"{guarantee}: {error}") from error


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# ---- user namespace


def start_mapper(pid: int) -> Callable[[], bool]:
    """Root only: a process that stays outside and gives the user namespace two ids, root and nobody.

    The kernel does not count the threads of root, so the answer must run as somebody else.
    """
    go_read, go_write = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(go_write)
        try:
            if os.read(go_read, 1):
                for kind in ("uid", "gid"):
                    write(f"/proc/{pid}/{kind}_map", f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
            os._exit(0)
        except OSError:
            os._exit(1)

    def map_ids() -> bool:
        os.write(go_write, b"g")
        os.close(go_write)
        os.close(go_read)
        return os.waitpid(mapper, 0)[1] == 0

    return map_ids


def enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    map_as_root = None
    if uid == 0:
        try:  # noqa: SIM105  # contextlib costs an import for every item
            os.setgroups([])
        except PermissionError:
            pass  # root of a container that is a user namespace itself
        map_as_root = start_mapper(os.getpid())
    system_call("unshare", _NEW_USER)
    if map_as_root is None or not map_as_root():
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{_NOBODY} {uid} 1\n")
        write("/proc/self/gid_map", f"{_NOBODY} {gid} 1\n")


# ---- file system


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    system_call("mount", *encoded[:3], flags, encoded[3])


def place(path: str, made: set[str]) -> None:
    """Makes the mount point of `path`, a directory or a file, below the new root."""
    directory = path if os.path.isdir(path) else os.path.dirname(path)
    if directory not in made:
        os.makedirs(_NEW_ROOT + directory, exist_ok=True)
        made.add(directory)
    if directory != path:
        os.close(os.open(_NEW_ROOT + path, os.O_CREAT | os.O_WRONLY, 0o644))


def build_root(plan: dict[str, Any]) -> None:
    """A root of nothing but `binds`, read-only, without `masks`, and an empty scratch directory at /tmp."""
    os.umask(0o022)
    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", _NEW_ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for name, target in plan["links"].items():
        os.symlink(target, _NEW_ROOT + name)
    made: set[str] = set()
    for path in plan["binds"]:
        place(path, made)
        mount(path, _NEW_ROOT + path, None, _MS_BIND | _MS_REC)
    for name in ("/tmp", "/.empty"):
        os.makedirs(_NEW_ROOT + name, exist_ok=True)
    write(_NEW_ROOT + "/.blank", "")
    for path in plan["masks"]:
        blank = "/.empty" if os.path.isdir(path) else "/.blank"
        mount(_NEW_ROOT + blank, _NEW_ROOT + path, None, _MS_BIND)


def enter_root(plan: dict[str, Any]) -> None:
    os.chdir(_NEW_ROOT)
    system_call("syscall", plan["pivot_root"], b".", b".")
    system_call("umount2", b".", _DETACH)
    attributes = _READ_ONLY_NOSUID.to_bytes(8, sys.byteorder) + bytes(24)
    system_call("syscall", _MOUNT_SETATTR, _CURRENT_DIRECTORY, b"/", _RECURSIVE, attributes, len(attributes))


def mount_scratch(plan: dict[str, Any]) -> None:
    options = f"size={plan['disk_bytes']},nr_inodes=4096,mode=700,uid={_NOBODY},gid={_NOBODY}"
    mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
    os.chdir("/tmp")


# ---- the processes


def enter_namespaces(plan: dict[str, Any]) -> None:
    must("a user namespace", enter_user_namespace)
    for name, flag in _NAMESPACES.items():
        must(name, system_call, "unshare", flag)
    must("the host name", system_call, "sethostname", b"sandbox", 7)
    must("a file system of Python alone", build_root, plan)
    must("a read-only file system", enter_root, plan)
    must("a scratch directory of limited size", mount_scratch, plan)


def die_with_parent() -> None:
    system_call("prctl", _PR_SET_PDEATHSIG, _KILL, 0, 0, 0)


def set_limits(plan: dict[str, Any]) -> None:
    same_user = 2 if os.getuid() == _NOBODY else 0  # this process and its parent count
    wanted = {
        resource.RLIMIT_AS: plan["memory_bytes"],
        resource.RLIMIT_CPU: plan["cpu_s"],
        resource.RLIMIT_FSIZE: plan["file_bytes"],
        resource.RLIMIT_NPROC: plan["threads"] + same_user,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_SIGPENDING: 64,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # One second between the signal that says "CPU time" and the one that cannot be ignored.
        upper = value + 1 if kind == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else value
        resource.setrlimit(kind, (value, upper))


def drop_rights(program: bytes) -> None:
    """Nobody, no way to become somebody, and the system calls that `program` (BPF) allows."""
    if os.getuid() != _NOBODY:
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    system_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the number of instructions of 8 bytes, padding, the address
    instructions = (len(program) // 8).to_bytes(8, "little") + ctypes.addressof(code).to_bytes(8, "little")
    system_call("prctl", _PR_SET_SECCOMP, 2, instructions, 0, 0)


def become_driver(plan: dict[str, Any], output: int, verdict: int, errors: int) -> NoReturn:
    """Turns this process into the driver; what fails before is told on `errors`, which closes on success."""
    try:
        os.setsid()  # no signals to the group of the supervisor
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.set_inheritable(verdict, True)
        must("limits on resources", set_limits, plan)
        must("a filter of system calls, without new privileges", drop_rights, plan["filter"])
        # The capabilities of the namespace end here: the new program is not run by its root.
        must(
            "Python itself", os.execve, plan["python"], [*plan["command"], str(verdict)], plan["environment"]
        )
    except Refused as error:
        os.write(errors, str(error).encode())
    finally:
        os._exit(1)


def supervise(plan: dict[str, Any], pid: int, output: int, verdict: int, life: int) -> bytes:
    """Waits for the driver, at most `wall_s`. Returns the report; ends with the outer process (`life`)."""
    handle = os.pidfd_open(pid)
    received = {output: b"", verdict: b""}
    limits = {output: plan["output_bytes"], verdict: _VERDICT_BYTES}
    poll = select.poll()
    for descriptor in (output, verdict, life, handle):
        poll.register(descriptor, select.POLLIN)

    def take(descriptor: int) -> bool:
        part = os.read(descriptor, _CHUNK_BYTES)
        received[descriptor] += part[: limits[descriptor] - len(received[descriptor])]
        return bool(part)

    deadline = time.monotonic() + plan["wall_s"]
    ended = timed_out = False
    while not ended and not timed_out:
        timeout_ms = max(0.0, deadline - time.monotonic()) * 1000
        ready = dict(poll.poll(timeout_ms))
        timed_out = time.monotonic() >= deadline
        if life in ready:
            os._exit(1)
        ended = handle in ready
        for descriptor in received:
            if descriptor in ready and not take(descriptor):
                poll.unregister(descriptor)
        if received[verdict]:
            deadline = min(deadline, time.monotonic() + _LAST_WORDS_SECONDS)
    os.kill(pid, _KILL)
    _, status, usage = os.wait4(pid, 0)
    for descriptor in received:  # nobody holds the other ends any more
        while take(descriptor):
            pass
    how = "timeout" if timed_out and not ended else "signal" if os.WIFSIGNALED(status) else "exit"
    code = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)
    head = f"{how} {code} {usage.ru_utime + usage.ru_stime:.3f} {len(received[verdict])}\n"
    return head.encode() + received[verdict] + received[output]


def first_process(plan: dict[str, Any], life: int) -> None:
    """The first process of the process namespace: starts the driver and supervises it."""
    must("an end with the process that asked", die_with_parent)
    output_read, output_write = os.pipe()
    verdict_read, verdict_write = os.pipe()
    errors_read, errors_write = os.pipe()
    driver = os.fork()
    if driver == 0:
        become_driver(plan, output_write, verdict_write, errors_write)
    for descriptor in (output_write, verdict_write, errors_write):
        os.close(descriptor)
    if problem := os.read(errors_read, _VERDICT_BYTES):
        raise Refused(problem.decode())
    os.write(1, b"started\n")
    report = supervise(plan, driver, output_read, verdict_read, life)
    while report:
        report = report[os.write(1, report) :]


def main() -> None:
    plan = marshal.loads(bytes.fromhex(sys.argv[1]))
    try:
        enter_namespaces(plan)
        life_read, life_write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(life_write)
            first_process(plan, life_read)
            os._exit(0)
        os.close(life_read)
        must("an end with the process that asked", die_with_parent)
        if os.getppid() != plan["parent"]:  # gone before the line above
            os._exit(1)
        os.waitpid(child, 0)
    except Refused as refused:
        os.write(1, f"refused {refused}".encode())
    os._exit(0)


if __name__ == "__main__":
    main()
