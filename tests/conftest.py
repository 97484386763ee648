from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.command_line import Invoke
    from tests.study_fixture import TinyStudy

# Tests reach nothing outside this machine: no usage statistics, no model hub.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    from tests.study_fixture import make_tiny_study  # imports torch and transformers, which few tests need

    return make_tiny_study(tmp_path_factory.mktemp("tiny-study"))


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Invoke:
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from mergemix.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mergemix", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code: Any = 0
        except SystemExit as error:
            code = error.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return call
