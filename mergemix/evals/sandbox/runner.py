"""One item: the plan for the supervisor, its report, the verdict."""

from __future__ import annotations

import functools
import marshal
import os
import platform
import secrets
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.sandbox.files import base_python, outer_environment, python_files
from mergemix.evals.sandbox.seccomp import PIVOT_ROOT, seccomp_filter

_HERE = Path(__file__).resolve().parent
# By import, not as a script: so the interpreter finds it compiled.
_START = f"import sys; sys.path.append({str(_HERE)!r}); import supervisor; supervisor.main()"
_GRACE_SECONDS = 20.0  # for the supervisor to set up and report, on a machine that is busy
_REASON_CHARACTERS = 600


@dataclass(frozen=True)
class Limits:
    """What one item may use. All must be positive; the scratch directory counts as memory of the machine too."""

    wall_s: float = 10.0
    cpu_s: int = 5  # the kernel counts whole seconds
    memory_bytes: int = 512 << 20  # address space: what Python itself maps (some 20 MiB) counts
    file_bytes: int = 16 << 20  # a single file
    disk_bytes: int = 64 << 20  # the whole scratch directory
    threads: int = 16  # there is one process, and no way to start another
    output_bytes: int = 64 << 10  # kept for people; what is printed beyond is thrown away

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"limits of the sandbox must be positive, but {name} is {value}")


@dataclass(frozen=True)
class Verdict:
    """Whether the tests passed; `reason` starts with one of passed, failed, timeout, cpu time, memory, killed, ended.

    The reason of a failure and `output` (standard output and error, cut) are the answer's own words: for people.
    """

    passed: bool
    reason: str
    output: str


class SandboxRefused(BenchmarkError):
    """The supervisor could not give a guarantee; nothing of the answer has run."""


def check_tests(tests: str, where: str) -> None:
    """Raises BenchmarkError where unit tests are no Python: the fault of the benchmark, not of an answer."""
    try:
        compile(tests, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BenchmarkError(f"{where}: unit tests must be Python, but: {error}") from error


@functools.cache
def _fixed_plan() -> dict[str, object]:
    files = python_files()
    machine = platform.machine()
    driver = (_HERE / "driver.py").read_text()
    return {
        "python": files.python,
        "command": [files.python, "-I", "-S", "-B", "-X", "utf8", "-c", driver],
        "environment": outer_environment(),
        "binds": list(files.binds),
        "masks": list(files.masks),
        "links": files.links,
        "pivot_root": PIVOT_ROOT[machine],
        "filter": seccomp_filter(machine),
    }


def run_unchecked(program: str, tests: str, limits: Limits) -> Verdict:
    """As run_tests, where check_sandbox has been asked, or is the one that asks. Raises SandboxRefused."""
    token = secrets.token_hex(16).encode()
    source = program.encode(errors="surrogatepass")
    request = b"%s %d\n%s%s" % (token, len(source), source, tests.encode(errors="surrogatepass"))
    plan = _fixed_plan() | vars(limits) | {"parent": os.getpid()}
    command = [base_python(), "-I", "-S", "-c", _START, marshal.dumps(plan).hex()]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=outer_environment(),
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            report, errors = process.communicate(request, limits.wall_s + _GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return Verdict(False, f"timeout: still running after {limits.wall_s:g} s", "")
        finally:
            process.kill()  # with it, all of the item's processes; no harm where it has ended
    return report_of(report, errors, token, limits)


def report_of(report: bytes, errors: bytes, token: bytes, limits: Limits) -> Verdict:
    """Reads the supervisor's report: "started", how it ended, the driver's verdict, the output."""
    begun, _, rest = report.partition(b"\n")
    if begun != b"started":
        words = (
            report.removeprefix(b"refused ") or errors.strip().rpartition(b"\n")[2] or b"its process ended"
        )
        raise SandboxRefused(words.decode(errors="replace"))
    head, _, body = rest.partition(b"\n")
    fields = head.split()
    if len(fields) != 4:
        return Verdict(False, "killed: with its supervisor", "")
    how, code, cpu_s, size = fields[0].decode(), int(fields[1]), float(fields[2]), int(fields[3])
    words, output = body[:size], body[size:].decode(errors="replace")
    if secrets.compare_digest(words, token):
        return Verdict(True, "passed", output)
    return Verdict(False, _why(how, code, cpu_s, words.decode(errors="replace"), limits), output)


def _why(how: str, code: int, cpu_s: float, words: str, limits: Limits) -> str:
    used_up = code == signal.SIGXCPU or (code == signal.SIGKILL and cpu_s >= limits.cpu_s)
    if how == "signal" and used_up:
        return f"cpu time: more than {limits.cpu_s} s"
    if words.startswith("MemoryError"):
        return f"memory: more than {limits.memory_bytes >> 20} MiB"
    if words:
        return f"failed: {words[:_REASON_CHARACTERS]}"
    if how == "timeout":
        return f"timeout: still running after {limits.wall_s:g} s"
    if how == "signal":
        return f"killed: {signal.strsignal(code) or 'signal'} ({code})"
    return f"ended: exit code {code} before the tests were done"
