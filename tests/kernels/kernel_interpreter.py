"""Runs the tests of a file with Triton's interpreter, which a process must ask for before it imports Triton."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run_interpreted(file: str) -> None:
    """AssertionError with what pytest said unless every test of the file, beside this one, passed."""
    here = Path(__file__).parent
    # Without conftest.py, whose imports take longer than these tests.
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(here / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"\d+ passed", finished.stdout)
    assert "skipped" not in finished.stdout
