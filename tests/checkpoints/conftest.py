"""Real bases and one adapter for them, made once; PEFT, which takes seconds to import, only where they are used."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

BaseOf = Callable[[str], Path]  # the base of an architecture, by its name


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """The base of an architecture, written once."""
    from tests.checkpoints.peft_adapters import write_base

    root = tmp_path_factory.mktemp("bases")

    def base_of(arch: str) -> Path:
        path = root / arch
        return path if path.exists() else write_base(path, arch)

    return base_of


@pytest.fixture(scope="session")
def made(base_of: BaseOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of the plain Llama, not to be changed."""
    from tests.checkpoints.peft_adapters import write_adapter

    path = tmp_path_factory.mktemp("made") / "adapter"
    write_adapter(
        base_of("llama"), path, r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]
    )
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The adapter `made`, to be changed."""
    return shutil.copytree(made, tmp_path / "adapter")
