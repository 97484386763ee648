"""What of the sandbox's guarantees this machine does not give; nothing runs where one is missing."""

from __future__ import annotations

import functools
import platform
import sys
import threading
from pathlib import Path

from mergemix.errors import ConfigError
from mergemix.evals.sandbox.runner import Limits, SandboxRefused, Verdict, run_unchecked
from mergemix.evals.sandbox.seccomp import AUDIT_ARCH

_ATTEMPTS = (Path(__file__).resolve().parent / "attempts.py").read_text()
_ALL_TRIED = "all tried"
_SMALL = Limits(
    wall_s=30,
    cpu_s=10,
    memory_bytes=256 << 20,
    file_bytes=1 << 20,
    disk_bytes=4 << 20,
    threads=6,
    output_bytes=1 << 14,
)
_HELP = (
    "It takes Linux 5.14 or newer on x86_64 or aarch64, and the right to make user namespaces (sysctl "
    "user.max_user_namespaces, and where they exist kernel.unprivileged_userns_clone=1 and "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container also: --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined). Otherwise leave out the benchmarks that run code."
)
_asking = threading.Lock()


def _broken_inside() -> list[str]:
    """Tries in the sandbox itself to break each guarantee."""
    tried = run_unchecked(_ATTEMPTS, f"main({vars(_SMALL)})", _SMALL)
    lines = tried.output.splitlines()
    if not tried.passed or _ALL_TRIED not in lines:
        return [f"Python inside the sandbox ({tried.reason})"]
    broken = [line for line in lines if line != _ALL_TRIED]
    spinning = run_unchecked("while True: pass", "", Limits(cpu_s=1, wall_s=30))
    if not spinning.reason.startswith("cpu time"):
        broken.append(f"limited CPU time: an endless loop ended with {spinning.reason!r}")
    sleeping = run_unchecked("import time; time.sleep(60)", "", Limits(wall_s=0.3))
    if not sleeping.reason.startswith("timeout"):
        broken.append(f"limited wall time: an endless sleep ended with {sleeping.reason!r}")
    return broken


@functools.cache
def _missing() -> tuple[str, ...]:
    if sys.platform != "linux" or platform.machine() not in AUDIT_ARCH:
        return (f"Linux on {' or '.join(AUDIT_ARCH)}, but this is {sys.platform} on {platform.machine()}",)
    try:
        return tuple(_broken_inside())
    except (SandboxRefused, ConfigError) as error:
        return (str(error),)


def missing_guarantees() -> list[str]:
    """What this machine lacks, in words; empty where the sandbox can be used. Tried for real, once per process."""
    with _asking:
        return list(_missing())


def check_sandbox() -> None:
    """Raises ConfigError where a guarantee is missing; says which, and what to do."""
    if missing := missing_guarantees():
        raise ConfigError(
            f"the sandbox refuses to run code; this machine lacks {'; '.join(missing)}. {_HELP}"
        )


def run_tests(program: str, tests: str, *, limits: Limits | None = None) -> Verdict:
    """Runs a model's program, then its unit tests in the same namespace, in a sandbox of their own.

    May be called from several threads at once; each call costs a process or two and waits for them. A program
    or tests that are no Python fail. Raises ConfigError where the machine lacks a guarantee, and BenchmarkError
    where the sandbox could not be set up this once: both before anything of the program has run.
    """
    check_sandbox()
    try:
        return run_unchecked(program, tests, limits or Limits())
    except SandboxRefused as error:
        raise SandboxRefused(f"the sandbox did not start this time; it lacked {error}") from error
