from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.study_fixture import TinyStudy

# Tests reach nothing outside this machine: no usage statistics, no model hub.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    from tests.study_fixture import make_tiny_study  # imports torch and transformers, which few tests need

    return make_tiny_study(tmp_path_factory.mktemp("tiny-study"))
