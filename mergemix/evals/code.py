"""Answers that are code: a program and its unit tests, run in the sandbox."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemix.errors import BenchmarkError
from mergemix.evals.graders import Code
from mergemix.evals.template import Template


@dataclass(frozen=True)
class UnitTests:
    """What one item's answer stands between, and the tests that the whole must pass."""

    prefix: str
    suffix: str
    tests: str


class UnitTestTemplates:
    """The templates of a code grader, compiled. Raises BenchmarkError when one does not parse."""

    def __init__(self, grader: Code, where: str) -> None:
        where = f"{where}: grader code"
        self.prefix = Template(grader.prefix, "prefix", where)
        self.suffix = Template(grader.suffix, "suffix", where)
        self.tests = Template(grader.tests, "tests", where)

    def render(self, fields: Mapping[str, Any], where: str) -> UnitTests:
        """Raises BenchmarkError when a template fails on the item, or its tests are none, or no Python."""
        from mergemix.evals.sandbox import check_tests

        tests = self.tests.render(fields, where)
        if not tests.strip():
            raise BenchmarkError(f"{where}: grader code needs unit tests, but the template tests gives none")
        check_tests(tests, where)
        return UnitTests(self.prefix.render(fields, where), self.suffix.render(fields, where), tests)


def check_allowed(where: str, allow_code: bool) -> None:
    """Raises BenchmarkError unless the user allows models' code to run, ConfigError where it cannot be confined."""
    if not allow_code:
        raise BenchmarkError(
            f"{where}: grader code runs what the model writes on this machine, in a sandbox; "
            "allow it with --allow-code-execution"
        )
    from mergemix.evals.sandbox import check_sandbox

    check_sandbox()


def passes(grader: Code, answer: str, item: UnitTests) -> bool:
    """Whether the program passes; a program that fails, crashes or does not end in time does not.

    Runs a process and waits for it; safe to call from several threads. Raises what the sandbox raises when it breaks,
    for that says nothing about the answer.
    """
    from mergemix.evals.sandbox import Limits, run_tests

    limits = Limits()
    if grader.timeout_s is not None:
        limits = Limits(wall_s=grader.timeout_s, cpu_s=math.ceil(grader.timeout_s))
    return run_tests(item.prefix + answer + item.suffix, item.tests, limits=limits).passed
