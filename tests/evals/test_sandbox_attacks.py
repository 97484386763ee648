"""Answers that attack the machine: each attempt must fail, and must not harm what is outside."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.evals.sandboxed import run

# Attempts are functions; those that get through are printed, and fail the item.
ATTEMPT = """
def attempt(*functions):
    through = []
    for function in functions:
        try:
            through.append((function.__name__, function()))
        except (OSError, MemoryError, ImportError, RuntimeError, ValueError) as error:
            print(function.__name__, "failed:", repr(error))
    assert not through, through
"""


def test_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        server.settimeout(0)
        hidden.bind(f"\0mergemix-sandbox-test-{os.getpid()}")  # an abstract name: no file to hide
        hidden.listen()
        program = f"""
            import socket, urllib.request, http.client, asyncio
            def tcp(): return socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)
            def tcp6(): return socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
            def udp(): return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53))
            def unix(): return socket.socket(socket.AF_UNIX).connect({hidden.getsockname()!r})
            def vsock(): return socket.socket(40, socket.SOCK_STREAM)
            def netlink(): return socket.socket(16, socket.SOCK_RAW)
            def packet(): return socket.socket(17, socket.SOCK_RAW)
            def crypto(): return socket.socket(38, socket.SOCK_SEQPACKET)
            def name(): return socket.getaddrinfo("localhost", 80)
            def url(): return urllib.request.urlopen("http://127.0.0.1:{server.getsockname()[1]}", timeout=1)
            def stream(): return asyncio.run(asyncio.open_connection("127.0.0.1", {server.getsockname()[1]}))
        """
        tests = ATTEMPT + "attempt(tcp, tcp6, udp, unix, vsock, netlink, packet, crypto, name, url, stream)"
        verdict = run(program, tests)
        assert verdict.passed, verdict
        with pytest.raises(BlockingIOError):
            server.accept()


def test_reading_the_users_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the user's secret")
    monkeypatch.setenv("API_KEY", "the user's secret")
    descriptor = os.open(secret, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    program = f"""
        import glob, os, sys
        def direct(): return open({str(secret)!r}).read()
        def climb(): return open("../" * 30 + {str(secret)!r}).read()
        def link():
            os.symlink({str(secret)!r}, "link")
            return open("link").read()
        def inherited(): return os.read({descriptor}, 100)
        def processes(): return os.listdir("/proc")
        def users(): return open("/etc/passwd").read()
        def home(): return open({str(Path.home() / ".bashrc")!r})
        def package(): return open({__file__!r}).read()
        def numpy(): import numpy
        def torch(): sys.path += {[path for path in sys.path if path]!r}; import torch
        def mount(): return os.chroot("/")
        def scratch_of_the_host(): return os.listdir({str(tmp_path)!r})
        def write(): return open(os.__file__, "a")
        def write_root(): return open("/file", "w")
        def write_null(): os.unlink("/dev/null")
        def chmod(): os.chmod("/", 0o777)
    """
    tests = """
        attempt(direct, climb, link, inherited, processes, users, home, package, numpy, torch, mount)
        attempt(scratch_of_the_host, write, write_root, write_null, chmod)
        assert set(os.environ) <= {"MALLOC_ARENA_MAX", "LD_LIBRARY_PATH"}, os.environ
        parts = ["/", "/dev", os.path.dirname(os.__file__), os.__file__, sys.executable]
        assert all(os.statvfs(path).f_flag & os.ST_RDONLY for path in parts)  # also where the user owns what is there
        assert os.listdir("/tmp") == ["link"] and os.getcwd() == "/tmp"
        seen = {name for name in os.listdir("/")}
        known = {".blank", ".empty", "tmp", "dev", "etc", "usr", "lib", "lib32", "lib64", "libx32", "bin", "sbin"}
        roots = {sys.base_prefix.split("/")[1], os.__file__.split("/")[1]}
        assert seen <= known | roots, seen
        assert os.listdir("/dev") == ["null"] and set(os.listdir("/etc")) <= {"ld.so.cache"}
        assert not glob.glob(os.path.dirname(os.__file__) + "/site-packages/*")
    """
    try:
        verdict = run(program, "\n".join([ATTEMPT, *[line.strip() for line in tests.splitlines()]]))
    finally:
        os.close(descriptor)
    assert verdict.passed, verdict
    assert "the user's secret" not in verdict.output


def test_scratch_is_empty_for_every_item() -> None:
    run("open('/tmp/note', 'w').write('for the next')")
    verdict = run("import os", "assert os.listdir('/tmp') == []")
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.system('true') and 1/0",
        "import os, sys\nos.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
        "import concurrent.futures as f\nwith f.ProcessPoolExecutor() as pool: pool.submit(print).result()",
        "import os\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  while True: pass",  # a daemon
    ],
)
def test_fork_bombs(program: str) -> None:
    verdict = run(program, "assert True", wall_s=60)
    assert not verdict.passed
    assert verdict.reason.startswith("failed: "), verdict


def test_thread_bomb() -> None:
    program = """
        import threading
        def bomb():
            while True:
                threading.Thread(target=bomb).start()
        count = 1
        stop = threading.Event()
        try:
            while count < 100:
                threading.Thread(target=stop.wait).start()
                count += 1
        except RuntimeError:
            print("threads:", count)
        stop.set()
        bomb()
    """
    verdict = run(program, "assert False", threads=8, cpu_s=2)
    assert not verdict.passed
    assert "threads: 8" in verdict.output


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10 ** 10)",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "x = 'x'\nwhile True: x += x",
        "x = [0] * 10 ** 12",
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(1000)]",
        "import os\nx = [os.memfd_create(str(i)) for i in range(1000)]",
        "import os\nx = [os.pipe() for i in range(1000)]",
        "from multiprocessing import shared_memory\nx = shared_memory.SharedMemory(create=True, size=1 << 20)",
    ],
)
def test_filling_the_memory(program: str) -> None:
    verdict = run(program, "assert False", memory_bytes=128 << 20)
    assert not verdict.passed
    assert verdict.reason.startswith(("memory: more than 128 MiB", "failed: OSError", "failed: PermissionError",
                                      "failed: FileNotFoundError")), verdict  # fmt: skip


def test_filling_the_disk() -> None:
    program = """
        import os
        def fill(name, size=1 << 30):
            taken = 0
            with open(name, "wb", buffering=0) as file:
                try:
                    while taken < size:
                        taken += file.write(bytes(1 << 16))
                except OSError as error:
                    print(name, error)
            return taken
        def sparse():
            with open("sparse", "wb") as file:
                file.truncate(1 << 40)
        def names():
            for i in range(100_000):
                open(f"name{i}", "w").close()
    """
    tests = """
        attempt(sparse)
        assert fill("one") == 1 << 20
        total = sum(fill(str(i)) for i in range(20)) + (1 << 20)
        assert (3 << 20) < total <= 4 << 20, total
        for name in os.listdir("."):
            os.unlink(name)
        attempt(names)
    """
    tests = "\n".join([ATTEMPT, *[line[8:] for line in tests.splitlines()]])
    verdict = run(program, tests, file_bytes=1 << 20, disk_bytes=4 << 20)
    assert verdict.passed, verdict


def test_printing_for_ever() -> None:
    verdict = run("while True: print('x' * 1000)", cpu_s=1, wall_s=60)
    assert verdict.reason == "cpu time: more than 1 s"
    assert len(verdict.output) == 64 << 10


def test_native_code_from_the_scratch_directory() -> None:
    program = """
        import glob, importlib.machinery, importlib.util, os, shutil, sys
        [source] = [p for p in glob.glob("/**/libz.so*", recursive=True)][:1]
        shutil.copy(source, "/tmp/evil.so")
        def load():
            loader = importlib.machinery.ExtensionFileLoader("evil", "/tmp/evil.so")
            return loader.create_module(importlib.util.spec_from_loader("evil", loader))
        def run():
            shutil.copy(sys.executable, "/tmp/python")
            os.chmod("/tmp/python", 0o755)
            os.execv("/tmp/python", ["/tmp/python", "-c", ""])
    """
    verdict = run(program, ATTEMPT + "attempt(load, run)")
    assert verdict.passed, verdict
    assert "failed to map segment" in verdict.output


# ---- outliving its parent

CALLER = """
from mergemix.evals.sandbox.runner import Limits, run_unchecked
print(run_unchecked("import signal\\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\\n"
                    "signal.pause()", "", Limits(wall_s=600)))
"""


def processes() -> dict[int, tuple[int, str]]:
    """Parent and start time by process; those that have ended and wait to be collected are left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, *rest = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state not in "ZX":
            found[int(path.parent.name)] = (int(parent), rest[17])
    return found


def descendants(pid: int) -> dict[int, tuple[int, str]]:
    every, found, fresh = processes(), {}, {pid}
    while fresh:
        fresh = {child for child, (parent, _) in every.items() if parent in fresh}
        found |= {child: every[child] for child in fresh}
    return found


def wait_until(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def ignores_signals(pid: int) -> bool:
    """Whether a process has come to the point where it ignores SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    [ignored] = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn")]
    return bool(int(ignored, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.parametrize("victim", ["caller", "supervisor", "first process"])
def test_outliving_its_parent(victim: str) -> None:
    run("")  # ends the test here where the sandbox refuses
    caller = subprocess.Popen([sys.executable, "-c", CALLER], stdout=subprocess.PIPE)
    try:
        assert wait_until(lambda: any(map(ignores_signals, descendants(caller.pid))))
        started = descendants(caller.pid)
        assert len(started) == 3
        supervisor, first, _ = sorted(started)
        os.kill(
            {"caller": caller.pid, "supervisor": supervisor, "first process": first}[victim], signal.SIGKILL
        )

        def gone() -> bool:
            now = processes()
            return not any(now.get(pid, (0, ""))[1] == begun for pid, (_, begun) in started.items())

        assert wait_until(gone), f"still there: {started}"
        if victim != "caller":
            assert caller.stdout is not None
            assert b"passed=False, reason='killed: with its supervisor'" in caller.stdout.read()
    finally:
        caller.kill()
        caller.wait()
        assert caller.stdout is not None
        caller.stdout.close()


def test_called_from_a_thread_that_ends() -> None:
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(run("x = 1", "assert x == 1")))
    run("")
    thread.start()
    thread.join()
    assert verdicts[0].passed
