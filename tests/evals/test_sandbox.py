"""Answers that are graded as they should be, whatever they do to themselves."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.sandbox import Limits, check_sandbox, check_tests, missing_guarantees
from tests.evals.sandboxed import run

ADD = "def add(a, b):\n    return a + b\n"
CHECK = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\n"


def test_right_and_wrong_answers() -> None:
    assert run(ADD, CHECK).reason == "passed"
    wrong = run("def add(a, b): return a * b", CHECK)
    assert not wrong.passed
    assert wrong.reason == "failed: AssertionError (line 1 of the tests)"


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def add(a, b):\n  return a +", CHECK, "failed: SyntaxError: invalid syntax"),
        ("x = '\0'", CHECK, "failed: "),
        ("def add(a): return a", CHECK, "failed: TypeError"),
        ("", CHECK, "failed: NameError: name 'add' is not defined (line 1 of the tests)"),
        ("1/0", CHECK, "failed: ZeroDivisionError: division by zero (line 1 of the answer)"),
        (
            ADD,
            "assert add(1, 1) == 3, 'one and one'",
            "failed: AssertionError: one and one (line 1 of the tests)",
        ),
        (ADD, "raise ValueError('no')", "failed: ValueError: no (line 1 of the tests)"),
        (ADD, "assert add(", "failed: SyntaxError"),
        ("def add(a, b): return int(input())", CHECK, "failed: EOFError"),
        (ADD + "raise StopIteration", CHECK, "failed: StopIteration"),
        ("class E(Exception):\n  def __str__(self): raise self\nraise E", CHECK, "failed: E"),
        ("class E(Exception):\n  def __str__(self): return 7\nraise E", CHECK, "failed: E"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", CHECK, "killed: Killed (9)"),
        ("import os; os.abort()", CHECK, "killed: Aborted (6)"),
        ("import os; os._exit(3)", CHECK, "ended: exit code 3 before the tests were done"),
        ("import sys; sys.exit(3)", CHECK, "failed: SystemExit: 3"),
        ("def f(n): return f(n + 1)\nf(0)", CHECK, "failed: RecursionError"),
        ("def f():\n yield from f()\nimport sys\nsys.setrecursionlimit(10**9)\nlist(f())", CHECK, ""),
        ("s = '('*100000 + ')'*100000\neval(s)", CHECK, ""),
        ("'\ud800'", "assert False", "failed: "),
    ],
)
def test_answers_that_fail_say_why(program: str, tests: str, reason: str) -> None:
    verdict = run(program, tests)
    assert not verdict.passed
    assert verdict.reason.startswith(reason), verdict


def test_a_huge_message_is_cut() -> None:
    verdict = run("raise ValueError('x' * 50_000_000)")
    assert verdict.reason.startswith("failed: ValueError: xxx")
    assert len(verdict.reason) < 1000
    assert len(verdict.output) <= Limits().output_bytes


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()",
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
        "10 ** 10 ** 9",
    ],
)
def test_endless_work_ends_by_cpu_time(program: str) -> None:
    assert run(program, "while True: pass", cpu_s=1, wall_s=60).reason == "cpu time: more than 1 s"


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(1000)",
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\nsignal.pause()",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os; r, w = os.pipe(); os.read(r, 1)",
        "import threading; threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()",
    ],
)
def test_endless_waiting_ends_by_wall_time(program: str) -> None:
    assert run(program, "assert False", wall_s=0.5).reason == "timeout: still running after 0.5 s"


def test_threads_that_are_left_behind_do_not_delay_the_verdict() -> None:
    program = """
        import atexit, threading, time
        threading.Thread(target=time.sleep, args=(1000,)).start()
        atexit.register(time.sleep, 1000)
    """
    start = time.monotonic()
    assert run(program, "assert True", wall_s=100).passed
    assert time.monotonic() - start < 90


def test_a_verdict_stands_when_the_last_words_hang() -> None:
    program = """
        import sys, time
        class Slow:
            def write(self, text): pass
            def flush(self): time.sleep(1000)
        sys.stdout = Slow()
    """
    assert run(program, "assert True", wall_s=100).passed
    assert run(program, "assert False", wall_s=100).reason == "failed: AssertionError (line 1 of the tests)"


def test_output_is_kept_up_to_its_limit_and_does_not_fail_an_answer() -> None:
    verdict = run(ADD + "print('é' * 10)\nprint('x' * 1_000_000)\n", CHECK, output_bytes=1000)
    assert verdict.passed
    assert verdict.output.startswith("é" * 10 + "\nxxx")
    assert len(verdict.output.encode()) == 1000


def test_output_that_is_no_text() -> None:
    verdict = run("import os, sys\nos.write(1, b'\\xff\\xfe\\0')\nsys.stdout.close()\nos.close(2)")
    assert verdict.passed
    assert verdict.output == "\ufffd\ufffd\0"


def test_the_standard_library_works() -> None:
    tests = """
        import asyncio, bz2, dataclasses, datetime, decimal, hashlib, json, lzma, math, multiprocessing, pickle, re
        import random, signal, socket, sqlite3, ssl, statistics, string, subprocess, tempfile, threading, unittest
        import uuid, xml.etree.ElementTree, zlib, collections, typing, enum, fractions, heapq, itertools, zoneinfo

        @dataclasses.dataclass
        class Point:
            x: int
            y: typing.Optional["Point"] = None

        assert pickle.loads(pickle.dumps(Point(1, Point(2)))) == Point(1, Point(2))
        assert typing.get_type_hints(Point)["y"] == typing.Optional[Point]
        async def three():
            await asyncio.sleep(0)
            return 3
        assert asyncio.run(three()) == 3
        results = []
        threads = [threading.Thread(target=results.append, args=(i,)) for i in range(8)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert sorted(results) == list(range(8))
        with tempfile.NamedTemporaryFile("w+") as file:
            file.write("scratch")
        assert sqlite3.connect(":memory:").execute("select 1 + 1").fetchone() == (2,)
        assert hashlib.sha256(b"").hexdigest().startswith("e3b0") and hashlib.md5(b"").hexdigest().startswith("d41d")
        with open("/dev/null", "w") as null:
            print("nothing", file=null)

        class Cases(unittest.TestCase):
            def test_raises(self):
                with self.assertRaises(ValueError):
                    int("x")
        result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Cases))
        assert result.testsRun == 1 and result.wasSuccessful()
    """
    verdict = run("from __future__ import annotations", tests)
    assert verdict.passed, verdict


def test_program_and_tests_share_one_module() -> None:
    program = """
        def make(): return Node(LIMIT)
        if __name__ == "__main__":
            raise SystemExit("not part of the answer")
    """
    tests = """
        LIMIT = 7
        class Node:
            def __init__(self, value): self.value = value
        assert make().value == 7
        import answer
        assert answer.make is make
    """
    assert run(program, tests).passed


def test_large_tests() -> None:
    tests = "".join(f"assert add({i}, 1) == {i + 1}\n" for i in range(20_000))
    assert run(ADD, tests).passed
    assert run(ADD, tests + "assert add(1, 1) == 3\n").reason.endswith("(line 20001 of the tests)")


def test_items_at_once_keep_their_verdicts_apart() -> None:
    run("")  # ends the test here where the sandbox refuses
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda i: run(f"print({i})", f"assert {i} % 3"), range(16)))
    assert [verdict.passed for verdict in verdicts] == [i % 3 != 0 for i in range(16)]
    assert [verdict.output.split()[0] for verdict in verdicts] == [str(i) for i in range(16)]


def test_nothing_is_left_behind() -> None:
    run("")
    before = len(os.listdir("/proc/self/fd"))
    run("import time; time.sleep(1000)", wall_s=0.2)
    run("import os; os._exit(1)")
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_tests_that_are_no_python_are_the_benchmarks_fault() -> None:
    check_tests("assert True", "item 1")
    with pytest.raises(BenchmarkError, match=r"item 2: unit tests must be Python, but: .*line 1"):
        check_tests("assert (", "item 2")


@pytest.mark.parametrize("name", list(vars(Limits())))
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"must be positive, but {name} is 0"):
        Limits(**{name: 0})


def test_the_check_agrees_with_the_list() -> None:
    if missing_guarantees():
        with pytest.raises(ConfigError, match="the sandbox refuses to run code; this machine lacks"):
            check_sandbox()
    else:
        check_sandbox()
