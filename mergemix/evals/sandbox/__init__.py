"""Runs a model's Python answer against unit tests, isolated from this machine (docs/sandbox.md).

runner.py starts, for every item, supervisor.py in a fresh process; that one builds the isolation and starts
driver.py inside it, which runs the answer and its tests.
"""

from mergemix.evals.sandbox.probe import check_sandbox, missing_guarantees, run_tests
from mergemix.evals.sandbox.runner import Limits, Verdict, check_tests

__all__ = ["Limits", "Verdict", "check_sandbox", "check_tests", "missing_guarantees", "run_tests"]
