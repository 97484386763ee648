from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.serve.tiny_models import tiny_llama
from tests.train.files import write_corpora


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that randomness inside of the model matters too."""
    directory = tiny_llama(tmp_path_factory.mktemp("train") / "base", seed=3)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    return directory


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout."""
    return tiny_llama(tmp_path_factory.mktemp("train") / "base", seed=3)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the processes have that tests start: sums over other numbers of threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
