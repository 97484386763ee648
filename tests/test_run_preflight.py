"""The preflight of a run: said before the search, stored, and measured once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from mergemix import preparation
from mergemix.checkpoints.family import open_family
from mergemix.config import RunConfig
from mergemix.errors import CheckpointError, ConfigError
from mergemix.evidence import Silent
from mergemix.identity import identify
from mergemix.preparation import load_suites, make_search, preflight_once
from mergemix.report.run_tables import run_table
from mergemix.run import run
from tests.study_fixture import TinyStudy


class Told(Silent):
    """What an observer hears, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def note(self, text: str) -> None:
        self.heard.append(("note", text))

    def candidate(self, progress: Any) -> None:
        self.heard.append(("candidate", progress))


def config(tiny: TinyStudy, study: Path, **changes: Any) -> RunConfig:
    given = {
        "experts": {name: str(path) for name, path in tiny.paths.items() if name != "base"},
        "base": str(tiny.paths["base"]),
        "bench": tuple(map(str, tiny.bench)),
        "study": study,
        "budget": 5,
        "engine": "hf",
    }
    return RunConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def stranger(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert whose numbers have nothing to do with the base's."""
    path = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(next(p for name, p in tiny_study.paths.items() if name != "base"), path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    mixed = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
        for name, tensor in weights.items()
    }
    save_file(mixed, path / "model.safetensors", metadata={"format": "pt"})
    return path


def checked(run_config: RunConfig, told: list[str]) -> dict[str, Any]:
    """The preflight as `run` does it, without the run."""
    run_config.study.mkdir(exist_ok=True)
    family = open_family(run_config.base, run_config.experts)
    suite, _ = load_suites(run_config, family, "hf")
    identity = identify(run_config, family, suite, make_search(run_config, family, []), "hf")
    return preflight_once(run_config, family, identity, told.append)


def test_doubts_are_told_before_the_search_and_again_with_the_answer(
    tiny_study: TinyStudy, stranger: Path, tmp_path: Path
) -> None:
    plain = config(tiny_study, tmp_path / "study")
    name = next(iter(plain.experts))
    told = Told()
    summary = run(
        config(tiny_study, tmp_path / "study", experts={**plain.experts, name: str(stranger)}), told
    )
    kinds = [kind for kind, _ in told.heard]
    first = kinds.index("candidate")
    notes = [text for kind, text in told.heard[:first] if kind == "note"]
    assert "note" not in kinds[first:]
    assert any(text.startswith("Preflight, do not trust: ") and name in text for text in notes)
    assert summary["preflight"]["verdict"] == "do not trust"
    told_of = [check for check in summary["preflight"]["checks"] if check["verdict"] != "fine"]
    assert notes == [f"Preflight, {check['verdict']}: {check['why']}." for check in told_of]
    assert len(told_of) < len(summary["preflight"]["checks"])
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(run_table(summary))
    shown = console.export_text()
    assert all(text in shown for text in notes)
    stored = json.loads((tmp_path / "study" / "preflight.json").read_text())
    assert stored["checks"] == summary["preflight"]["checks"]
    assert set(stored["norms"]) == set(plain.experts), "the measurements are kept, too"


def test_a_family_is_measured_once_a_study(
    tiny_study: TinyStudy, stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config(tiny_study, tmp_path / "study")
    measured: list[int] = []
    measure = preparation.preflight_family

    def counted(*arguments: Any) -> dict[str, Any]:
        measured.append(1)
        return measure(*arguments)

    monkeypatch.setattr(preparation, "preflight_family", counted)
    first_told: list[str] = []
    first = checked(plain, first_told)
    assert len(measured) == 1
    again_told: list[str] = []
    assert checked(plain, again_told) == first
    assert again_told == first_told, "who comes back must hear it, too"
    assert len(measured) == 1
    name = next(iter(plain.experts))
    other = checked(config(tiny_study, plain.study, experts={**plain.experts, name: str(stranger)}), [])
    assert other["verdict"] == "do not trust"
    assert len(measured) == 2
    assert checked(plain, []) == first
    assert len(measured) == 3
    monkeypatch.setattr(preparation, "__version__", "another")
    assert checked(plain, []) == first, "another version may judge otherwise"
    assert len(measured) == 4


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "null",
        '{"about": {}}',
        "[" * 100_000,
        pytest.param(lambda found: {**found, "verdict": "good"}, id="verdict"),
        pytest.param(lambda found: {**found, "checks": 3}, id="no checks"),
        pytest.param(lambda found: {**found, "checks": ["fine"]}, id="a check that is none"),
        pytest.param(
            lambda found: {**found, "checks": [{"verdict": "doubtful"}]}, id="a check without a reason"
        ),
        pytest.param(
            lambda found: {**found, "checks": [{"verdict": "bad", "why": "x"}]}, id="another verdict"
        ),
    ],
)
def test_a_damaged_file_is_made_again(tiny_study: TinyStudy, tmp_path: Path, damage: Any) -> None:
    plain = config(tiny_study, tmp_path / "study")
    first = checked(plain, [])
    path = plain.study / "preflight.json"
    text = path.read_text()
    path.write_text(damage if isinstance(damage, str) else json.dumps(damage(json.loads(text))))
    assert checked(plain, []) == first
    again, whole = json.loads(path.read_text()), json.loads(text)
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_too_little_memory_is_a_doubt_and_no_end(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(family: Any) -> Any:
        raise ConfigError("memory_bytes must be at least 7")

    monkeypatch.setattr(preparation, "preflight_family", refuse)
    told: list[str] = []
    found = checked(config(tiny_study, tmp_path / "study"), told)
    assert told == ["Preflight, doubtful: not measured: memory_bytes must be at least 7."]
    assert found["verdict"] == "doubtful"

    def gone(family: Any) -> Any:
        raise CheckpointError("a file is gone")

    monkeypatch.setattr(preparation, "preflight_family", gone)
    (tmp_path / "study" / "preflight.json").unlink()
    with pytest.raises(CheckpointError, match="a file is gone"):
        checked(config(tiny_study, tmp_path / "study"), told)
