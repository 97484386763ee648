"""What tests of the command line share: how it is run, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable

Invoke = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


def refused(result: tuple[int, str, str], code: int, *said: str) -> None:
    """One message, no traceback, nothing on stdout."""
    got, out, err = result
    assert got == code, err
    assert out == ""
    assert "Traceback" not in err
    for text in said:
        assert text in err.replace("\n", " "), err
