"""Wrong answers that try to be told right: each must fail."""

import pytest

from tests.evals.sandboxed import run

WRONG = "def f(x): return 0\n"
TESTS = "first = f(1)\nassert first == 2\nsecond = f(2)\nassert second == 3\ndone = True\n"

LEAVE_EARLY = [
    "import sys; sys.exit(0)",
    "exit()",
    "quit(0)",
    "raise SystemExit",
    "raise SystemExit(0)",
    "raise StopIteration",
    "raise GeneratorExit",
    "raise KeyboardInterrupt",
    "import os; os._exit(0)",
    "import posix; posix._exit(0)",
    "import signal, os; os.kill(os.getpid(), signal.SIGTERM)",
    "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(\"passed\")'])",
    "import _thread; _thread.interrupt_main()",
    "import threading, os; threading.Timer(0.1, os._exit, (0,)).start(); threading.Event().wait()",
]
# The same from inside the first call that a test makes.
FROM_A_TEST = [f"def f(x):\n    {line}\n" for line in LEAVE_EARLY]

REPLACE = [
    "import builtins; builtins.AssertionError = type('E', (), {})",
    "class AssertionError: pass",
    "import builtins\nfor n in dir(builtins): setattr(builtins, n, lambda *a, **k: True)",
    "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
    "import sys; sys.excepthook = sys.__excepthook__ = lambda *a: None",
    "import sys; sys.unraisablehook = lambda *a: None",
    "import sys\nfor n in list(sys.modules): del sys.modules[n]",
    "import sys\nsys.modules['__main__'].fail = lambda *a: None",
    "import sys\nvars(sys.modules['__main__']).clear()",
    "import os, posix\nos.write = posix.write = lambda *a: None\nos._exit = posix._exit = lambda *a: None",
    "import posix\nreal = posix.write\nposix.write = lambda fd, text: real(fd, b'passed')",
    "import atexit; atexit.register(print, 'passed')",
    "import sys\nclass T(tuple): pass\nsys.stdout = T()",
    "globals().clear()",
    "class K(str):\n def __eq__(s, o): raise StopIteration\n __hash__ = str.__hash__\n"
    "globals()[K('__builtins__')] = {}",
    "import gc\ngc.callbacks.append(lambda *a: exit(0))\ngc.set_threshold(1)",
    "class D:\n def __del__(s): raise StopIteration\nd = D()\nd.d = d",
    "import warnings; warnings.showwarning = lambda *a, **k: None",
    "import linecache, tokenize; linecache.getline = lambda *a: 'assert True'",
    "import types, sys\nm = types.ModuleType('m')\nsys.modules['answer'] = m",
    "__builtins__ = {'__build_class__': None}\nimport builtins; builtins.__import__ = None",
    "import signal\nsignal.signal(signal.SIGALRM, lambda *a: exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)",
]

# Everything that looks like a token, wherever Python code can look, is written to every descriptor.
SEARCH = """
import gc, os, re, sys, types
found, tests, seen = set(), [], {}

def look(thing, depth=0):
    if id(thing) in seen or depth > 20:
        return
    seen[id(thing)] = thing
    if isinstance(thing, (bytes, str)):
        text = thing if isinstance(thing, bytes) else thing.encode(errors="replace")
        found.update(token for token in re.findall(rb"^[0-9a-f]{32}", text) if len(set(token)) > 6)
    elif isinstance(thing, types.CodeType):
        if thing.co_filename == "<tests>":
            tests.append(thing)
        look(thing.co_consts, depth + 1)
    elif isinstance(thing, dict):
        for key, value in list(thing.items()):
            look(key, depth + 1), look(value, depth + 1)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for value in list(thing):
            look(value, depth + 1)
    elif isinstance(thing, types.FrameType):
        for value in (thing.f_locals, thing.f_globals, thing.f_builtins, thing.f_code, thing.f_back):
            look(value, depth + 1)
    elif isinstance(thing, types.FunctionType):
        for value in (thing.__closure__, thing.__globals__, thing.__code__, thing.__defaults__):
            look(value, depth + 1)
    elif isinstance(thing, types.CellType):
        look(thing.cell_contents, depth + 1)
    elif isinstance(thing, types.BuiltinMethodType):
        look(thing.__self__, depth + 1)
    elif isinstance(thing, types.ModuleType):
        look(vars(thing), depth + 1)

def look_everywhere():
    look(sys._getframe())
    look(sys._current_frames())
    look(sys.modules)
    def own():
        yield running.gi_frame
        yield running.gi_frame.f_back
    running = own()
    for frame in running:
        look(frame)
    try:
        1 / 0
    except ZeroDivisionError as error:
        look(error.__traceback__.tb_frame)

def look_on_the_stacks():
    frame = sys._getframe()
    while frame is not None:
        for thing in gc.get_referents(frame):
            look(thing)
        frame = frame.f_back

def write_what_was_found():
    for token in found:
        for descriptor in range(64):
            try:
                os.write(descriptor, token)
            except OSError:
                pass
"""
FORGE = [
    "print('passed')",
    SEARCH + "look_everywhere(), write_what_was_found(), os._exit(0)\n",
    SEARCH + "look_on_the_stacks(), write_what_was_found(), os._exit(0)\n",
    SEARCH + "for thing in gc.get_objects(): look(thing)\nwrite_what_was_found(), os._exit(0)\n",
    SEARCH + "for thing in gc.get_referrers(exec): look(thing)\nwrite_what_was_found(), os._exit(0)\n",
    SEARCH + "def f(x): look_everywhere(), write_what_was_found(), os._exit(0)\n",
    SEARCH + "def f(x): look_on_the_stacks(), write_what_was_found(), os._exit(0)\n",
    SEARCH + "look_everywhere()\ndef f(x): return next(t.co_consts[x] for t in tests)\n",
    SEARCH + "look_on_the_stacks()\ndef f(x): return next(t.co_consts[x] for t in tests)\n",
    # a pipe of its own in place of the channel, to read the token and pass it on
    "import os, threading\nreal = {}\nfor d in range(3, 32):\n  try: real[os.dup(d)] = d\n  except OSError: pass\n"
    "r, w = os.pipe()\nfor d in real.values(): os.dup2(w, d)\n"
    "threading.Thread(target=lambda: [os.write(d, os.read(r, 32)) for d in real]).start()",
    "import os\nos.closerange(3, 64)",
    "import os\nfor d in range(64):\n  try: os.set_blocking(d, False); print(os.read(d, 1000))\n  except OSError: pass",
    # tests that are others than those sent
    "import os\nr, w = os.pipe()\nos.dup2(r, 0)\nos.write(w, b'pass')",
    "import sys\nframe = sys._getframe(1)\nwhile frame:\n  t = frame.f_locals.get('take')\n"
    "  if t: t.__self__.extend([compile('', '', 'exec')] * 20)\n  frame = frame.f_back",
    "import sys\nsys.addaudithook(lambda event, a: event == 'exec' and setattr(sys, 'tests', a[0].co_consts))\n"
    "def f(x): return sys.tests[x]",
    "def f(x):\n import sys\n"
    " def jump(frame, event, arg):\n"
    "  if event == 'line' and frame.f_code.co_filename == '<tests>': frame.f_lineno = 5\n  return jump\n"
    " sys.settrace(jump)\n sys._getframe(1).f_trace = jump",
    "def f(x):\n import sys, threading\n"
    " def jump(frame, event, arg):\n"
    "  if event == 'line' and frame.f_code.co_filename == '<tests>': frame.f_lineno = 5\n  return jump\n"
    " getattr(threading, 'settrace_all_threads', threading.settrace)(jump)\n"
    " frame = sys._getframe(1)\n while frame: frame.f_trace = jump; frame = frame.f_back",
    "def f(x):\n import sys, bdb\n bdb.Bdb().set_trace(sys._getframe(1))",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL); os.kill(1, signal.SIGKILL); os.kill(-1, signal.SIGKILL)",
    "import os, signal\nos.killpg(0, signal.SIGKILL)",
    "import resource\nresource.prlimit(1, resource.RLIMIT_AS, (0, 0))",
    "open('/proc/self/mem', 'r+b')",
    "open('/proc/1/fd/1', 'wb').write(b'started\\nexit 0 0 0\\n')",
]
MEMORY = [
    "import ctypes",
    "import sys; sys.modules.pop('ctypes', None); import _ctypes",
    "import _testcapi",
    "import _testinternalcapi",
    "import _xxsubinterpreters as i; i.run_string(i.create(), 'import ctypes')",
    "import _interpreters as i; i.exec(i.create(), 'import ctypes')",
    "import _imp, importlib.machinery as m\nprint(_imp.create_builtin(m.ModuleSpec('_ctypes', None)).dlopen)",
    "import glob, importlib.machinery as m, importlib.util as u, os\n"
    "[p] = glob.glob(os.path.dirname(os.__file__) + '/lib-dynload/_ctypes.*')\n"
    "m.ExtensionFileLoader('_ctypes', p).create_module(u.spec_from_file_location('_ctypes', p))",
]


@pytest.mark.parametrize("attack", [*LEAVE_EARLY, *FROM_A_TEST])
def test_leaving_early(attack: str) -> None:
    verdict = run(WRONG + attack, TESTS, wall_s=30)
    assert not verdict.passed, verdict


@pytest.mark.parametrize("attack", REPLACE)
def test_replacing_parts_of_python(attack: str) -> None:
    verdict = run(WRONG + attack, TESTS, wall_s=5)
    assert not verdict.passed, verdict


@pytest.mark.parametrize("attack", FORGE)
def test_forging_the_verdict(attack: str) -> None:
    verdict = run(WRONG + attack, TESTS, wall_s=5)
    assert not verdict.passed, verdict


@pytest.mark.parametrize("attack", MEMORY)
def test_ways_to_raw_memory_are_closed(attack: str) -> None:
    """A right answer otherwise: it is the attempt itself that fails."""
    verdict = run("def f(x): return x + 1\n" + attack, TESTS)
    assert not verdict.passed, verdict


def test_the_search_sees_what_can_be_seen() -> None:
    """The search finds a token that a driver would keep in a name, a closure or a list."""
    keep = (
        "def driver(token):\n    return (lambda: token), look_everywhere()\ndriver('0123456789abcdef' * 2)\n"
    )
    assert run(SEARCH + keep, "assert b'0123456789abcdef' * 2 in found\nassert not tests").passed


@pytest.mark.parametrize(
    "tests",
    [
        "assert all([f(1) == 2])",
        "assert isinstance(f(1), str)",
        "assert sorted([f(1), -1]) == [7]",
        "assert len([f(1)]) == 2",
        "try:\n    f(1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError",
        "for case in range(3):\n    if f(case) != case + 1:\n        raise ValueError",
    ],
)
def test_tests_have_builtins_of_their_own(tests: str) -> None:
    attack = """
        import builtins
        class Equal:
            __eq__ = lambda self, other: True
        for name in ["all", "any", "isinstance", "len", "sorted", "sum", "abs", "range"]:
            setattr(builtins, name, lambda *a, **k: Equal())
        def f(x): return 0
    """
    assert run(attack, "assert f(1) == 0").passed
    verdict = run(attack, tests)
    assert not verdict.passed, verdict


def test_an_attack_does_not_fail_a_right_answer_by_itself() -> None:
    """So the attacks above fail because their answers are wrong, not because they cannot run."""
    for attack in [REPLACE[0], REPLACE[4], REPLACE[9], REPLACE[11], FORGE[0], SEARCH + "look_everywhere()"]:
        verdict = run(f"{attack}\ndef f(x): return x + 1\n", TESTS)
        assert verdict.passed, (attack, verdict)


@pytest.mark.parametrize(
    ("answer", "tests"),
    [
        ("class Equal:\n    __eq__ = lambda self, other: True\ndef f(x): return Equal()", TESTS),
        (
            "import math\nmath.isclose = lambda a, b: True\n" + WRONG,
            "import math\nassert math.isclose(f(1), 2)",
        ),
        ("import sys\ndef f(x): return sys._getframe(1).f_code.co_consts[x]", TESTS),
    ],
)
def test_what_remains_possible(answer: str, tests: str) -> None:
    """Told in docs/sandbox.md: tests believe the objects and modules they are given, and callers can be seen."""
    assert run(answer, tests).passed
