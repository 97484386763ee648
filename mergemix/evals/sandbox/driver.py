"""Runs inside the sandbox, as a script of its own: an answer, then its unit tests, then the success token.

Answer and tests share one interpreter, because tests call the answer's functions. So the answer must not be
able to say "passed" itself. From the moment it starts, no Python code of ours runs until the token is written,
and nothing that Python code can reach refers to the token or to the tests: see `main`.
"""

from __future__ import annotations

import builtins
import posix
import sys

TYPE_CHECKING = False  # the real one costs the import of typing
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_MESSAGE_CHARACTERS = 500


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: no introspection that reaches the operands of a running expression, no raw memory."""
    if event in {
        "gc.get_objects",  # a second line: no interpreter so far shows the operands of a running frame
        "gc.get_referents",
        "gc.get_referrers",
        "sys.settrace",  # a tracer may jump over lines of the tests
        "sys.addaudithook",  # a hook is handed the compiled tests
        "cpython.PyInterpreterState_New",  # hooks do not hold in other interpreters
    } or event.startswith("ctypes."):
        raise RuntimeError(f"{event} is not available in the sandbox")
    if event == "import" and arguments[0] in {
        "ctypes",
        "_ctypes",
        "_testcapi",
        "_testinternalcapi",
        "_testlimitedcapi",
        "_interpreters",
        "_xxsubinterpreters",
    }:
        raise ImportError(f"{arguments[0]} is not available in the sandbox")


def request() -> tuple[bytes, bytes, bytes]:
    """Reads (token, program, tests) from standard input, which is empty afterwards."""
    parts = []
    while part := posix.read(0, 1 << 20):
        parts.append(part)
    head, _, rest = b"".join(parts).partition(b"\n")
    token, size = head.split()
    return token, rest[: int(size)], rest[int(size) :]


def operands(channel: int) -> list[Any]:
    """What `main` needs, the last first. Raises what compiling the program or the tests raises."""
    token, program, tests = request()
    compiled = [
        compile(source, name, "exec", dont_inherit=True)
        for source, name in [(program, "<answer>"), (tests, "<tests>")]
    ]
    # Not "__main__": as in other harnesses, what stands under that condition is not part of the answer.
    module = type(sys)("answer")
    sys.modules["answer"] = module
    # The tests get the builtins as they are now, whatever the answer does to the module.
    pristine = {"__builtins__": dict(vars(builtins))}
    space = vars(module)
    run, check = compiled
    return [space, run, exec, pristine, space.update, space, check, exec, token, channel, posix.write]


def describe(error: BaseException) -> str:
    """For people: what was raised, and at which line of which part."""
    name, message = type(error).__name__, str(error)[:_MESSAGE_CHARACTERS]
    lines = {}
    trace = error.__traceback__
    while trace is not None:
        lines[trace.tb_frame.f_code.co_filename] = trace.tb_lineno
        trace = trace.tb_next
    where = [
        f"line {lines[f'<{part}>']} of the {part}" for part in ("tests", "answer") if f"<{part}>" in lines
    ]
    return name + (f": {message}" if message else "") + (f" ({where[0]})" if where else "")


def fail(channel: int, error: BaseException) -> None:
    """Says why on the channel; whatever is not the token is a failure, so nothing here needs to be trusted."""
    try:
        text = describe(error)
    except BaseException:
        text = type(error).__name__
    posix.write(channel, text.encode(errors="replace"))
    sys.stdout.flush()
    sys.__excepthook__(type(error), error, error.__traceback__ and error.__traceback__.tb_next)


def main() -> None:
    channel = int(sys.argv[1])
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # what module site would do
    try:
        try:
            take: Callable[[], Any] = operands(channel).pop
            sys.addaudithook(refuse)
            # write(channel, (token, exec(check, (space, update((pristine, exec(run, space))[0]))[0]))[0])
            #
            # Written so that all operands lie on the value stack before the answer runs: the list is empty then,
            # and no name, frame, closure or container that the answer could find refers to them. Only when the
            # answer and then the tests have returned, the interpreter itself goes on to pass the token to write.
            # An exception leaves the whole expression, and drops the token.
            take()(
                take(), (take(), take()(take(), (take(), take()((take(), take()(take(), take()))[0]))[0]))[0]
            )
        except BaseException as error:
            fail(channel, error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        posix._exit(0)  # no exit handlers, no waiting for threads


if __name__ == "__main__":
    main()
