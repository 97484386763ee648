"""The sandbox runs nothing on a machine that does not give a guarantee, and says which one."""

import dataclasses
import json
import platform
import re
import subprocess
import sys

import pytest

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.sandbox import Limits, Verdict, missing_guarantees, probe, run_tests, runner
from mergemix.evals.sandbox.seccomp import AUDIT_ARCH
from tests.evals.sandboxed import run

# Restricts its own process the way administrators and containers do, then asks for what is missing.
ASK = """
import ctypes, json, os, sys
from mergemix.errors import ConfigError
from mergemix.evals.sandbox import missing_guarantees, run_tests

libc = ctypes.CDLL(None, use_errno=True)

def forbid_namespaces(kind):
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(0x10000000):
        return  # no user namespaces here anyway
    for name, text in [("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with open(f"/proc/sys/user/max_{kind}_namespaces", "w") as file:
        file.write("0")

def forbid_call(machine, number, first_argument):
    from mergemix.evals.sandbox.seccomp import _do, _LOAD, _EQUAL, _RETURN, _ALLOW, _FAIL
    program = b"".join([
        _do(_LOAD, 0), _do(_EQUAL, number, 0, 3),
        _do(_LOAD, 16), _do(_EQUAL, first_argument, 0, 1) if first_argument is not None else _do(_EQUAL, 0, 0, 0),
        _do(_RETURN, _FAIL | 1), _do(_RETURN, _ALLOW),
    ])
    code = ctypes.create_string_buffer(program, len(program))
    head = (len(program) // 8).to_bytes(8, "little") + ctypes.addressof(code).to_bytes(8, "little")
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, head, 0, 0) == 0

restriction = json.loads(sys.argv[1])
globals()[restriction.pop(0)](*restriction)
missing = missing_guarantees()
try:
    run_tests("open('/tmp/mergemix-ran', 'w')", "")
    error = None
except ConfigError as refusal:
    error = str(refusal)
print(json.dumps([missing, error]))
"""
CALLS = {  # (x86_64, aarch64)
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "prctl": (157, 167),
    "setns": (308, 268),
}


def ask(*restriction: object) -> tuple[list[str], str | None]:
    command = [sys.executable, "-c", ASK, json.dumps(restriction)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    missing, error = json.loads(done.stdout)
    return missing, error


@pytest.mark.parametrize(
    ("kind", "guarantee"),
    [
        ("user", "a user namespace"),
        ("mnt", "a mount namespace"),
        ("net", "a network namespace"),
        ("pid", "a process namespace"),
        ("ipc", "an IPC namespace"),
        ("uts", "a host name namespace"),
    ],
)
def test_namespaces_that_the_administrator_forbids(kind: str, guarantee: str) -> None:
    missing, error = ask("forbid_namespaces", kind)
    assert len(missing) == 1
    if missing_guarantees():  # this machine lacks more
        guarantee = missing[0]
    assert missing[0].startswith(guarantee)
    assert error is not None
    assert f"the sandbox refuses to run code; this machine lacks {guarantee}" in error
    assert "user.max_user_namespaces" in error


@pytest.mark.parametrize(
    ("call", "first_argument", "guarantee"),
    [
        ("mount", None, "a file system of Python alone: [Errno 1]"),
        ("mount_setattr", None, "a read-only file system: [Errno 1]"),
        ("prctl", 22, "a filter of system calls, without new privileges: [Errno 1]"),
        ("prctl", 38, "a filter of system calls, without new privileges: [Errno 1]"),
        ("prctl", 1, "an end with the process that asked: [Errno 1]"),
    ],
)
def test_calls_that_a_container_forbids(call: str, first_argument: int | None, guarantee: str) -> None:
    if missing_guarantees() or platform.machine() not in AUDIT_ARCH:
        run("")  # checks the refusal, and ends the test
    number = CALLS[call][list(AUDIT_ARCH).index(platform.machine())]
    missing, error = ask("forbid_call", platform.machine(), number, first_argument)
    assert len(missing) == 1
    assert missing[0].startswith(guarantee)
    assert error is not None
    assert guarantee in error


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"filter": b"\x06\0\0\0\0\0\xff\x7f"}, ["no network", "no other processes"]),  # allows all calls
        ({"binds": ["/home"]}, ["no files but those of Python"]),
        ({"environment": {"SECRET": "x"}}, ["an empty environment"]),
    ],
)
def test_the_check_notices_what_can_be_broken(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], broken: list[str]
) -> None:
    run("")
    plan = dict(runner._fixed_plan())
    for key, value in change.items():
        plan[key] = [*plan[key], *value] if isinstance(value, list) else value  # type: ignore[misc]
    monkeypatch.setattr(runner, "_fixed_plan", lambda: plan)
    assert [line.partition(":")[0] for line in probe._broken_inside()] == broken


@pytest.mark.parametrize(
    ("limit", "value", "broken"),
    [
        ("memory_bytes", 1 << 31, "limited memory"),
        ("threads", 100, "a limited number of threads"),
        ("file_bytes", 3 << 20, "files of limited size"),
        ("disk_bytes", 1 << 28, "a scratch directory of limited size"),
    ],
)
def test_the_check_notices_limits_that_do_not_hold(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, broken: str
) -> None:
    """As on a kernel that takes a limit and does not enforce it: the machine's limits are wider than those asked."""
    run("")

    def wider(program: str, tests: str, limits: Limits) -> Verdict:
        return runner.run_unchecked(program, tests, dataclasses.replace(limits, **{limit: value}))

    monkeypatch.setattr(probe, "run_unchecked", wider)
    assert [line.partition(":")[0] for line in probe._broken_inside()] == [broken]


def test_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    [missing] = probe._missing.__wrapped__()
    assert missing == "Linux on x86_64 or aarch64, but this is linux on riscv64"


def test_a_set_up_that_fails_once_is_an_error_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    run("")
    plan = runner._fixed_plan() | {"binds": ["/absent/file"]}
    monkeypatch.setattr(runner, "_fixed_plan", lambda: plan)
    with pytest.raises(
        BenchmarkError, match="did not start this time; it lacked a file system of Python alone"
    ):
        run_tests("", "")


def test_an_interpreter_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from mergemix.evals.sandbox import files

    monkeypatch.setattr(files, "base_python", lambda: "/absent/python")
    with pytest.raises(ConfigError, match=re.escape("cannot ask /absent/python which files it needs")):
        files.python_files.__wrapped__()
