"""What the tests of the sandbox share."""

import re
import textwrap

import pytest

from mergemix.errors import ConfigError
from mergemix.evals.sandbox import Limits, Verdict, missing_guarantees, run_tests


def run(program: str, tests: str = "", **limits: float) -> Verdict:
    """run_tests; on a machine that lacks a guarantee, checks that it refuses and says why, and ends the test."""
    program, tests = textwrap.dedent(program), textwrap.dedent(tests)
    if missing := missing_guarantees():
        with pytest.raises(ConfigError, match=re.escape(missing[0])):
            run_tests(program, tests)
        pytest.skip(f"refused, as it must be: this machine lacks {missing}")
    return run_tests(program, tests, limits=Limits(**limits))  # type: ignore[arg-type]
