"""A search over LoRA adapters: folded into the weights, and several candidates at once beside the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergemix.config import RunConfig, load_config_file
from mergemix.errors import ConfigError, StudyError
from mergemix.generate import GenerateConfig, generate
from mergemix.run import run
from tests.checkpoints.peft_adapters import write_adapter
from tests.study_fixture import TinyStudy

BUDGET = 6


@pytest.fixture(scope="module")
def experts(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    for name, modules in {"math": ["q_proj", "v_proj"], "code": ["down_proj"]}.items():
        write_adapter(tiny_study.paths["base"], root / name, target_modules=modules, r=3, size=0.1)
    return {name: str(root / name) for name in ("math", "code")}


def config(tiny: TinyStudy, experts: dict[str, str], study: Path, **changes: Any) -> RunConfig:
    given = {
        "experts": experts,
        "base": str(tiny.paths["base"]),
        "bench": tuple(map(str, tiny.bench)),
        "study": study,
        "budget": BUDGET,
        "engine": "hf",
        "search": "random",
    }
    return RunConfig(**{**given, **changes})


def test_adapters_and_a_full_checkpoint_in_one_search(
    tiny_study: TinyStudy, experts: dict[str, str], tmp_path: Path
) -> None:
    mixed = {**experts, "web": str(tiny_study.paths["web"])}
    summary = run(config(tiny_study, mixed, tmp_path / "study", budget=7, verify_swaps="every"))
    assert summary["failed"] == 0
    assert summary["swaps"]["proven"] is True
    assert set(summary["baselines"]) == {"uniform", "base", "math", "code", "web"}


def test_generate_takes_adapters(tiny_study: TinyStudy, experts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat 12\n")
    given = GenerateConfig(
        experts=experts,
        base=str(tiny_study.paths["base"]),
        prompts=tmp_path / "prompts.txt",
        weights=({"math": 1.0}, {"math": 0.5, "code": 1.5}),
        max_tokens=4,
        engine="hf",
    )
    result = generate(given)
    assert result["proven"] is True
    assert len(result["outputs"]) == 2


def test_several_candidates_at_once_and_what_makes_it_another_study(
    tiny_study: TinyStudy, experts: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    study = tmp_path / "study"
    several = config(tiny_study, experts, study, engine="vllm", max_model_len=64, lora_in_flight=3)
    summary = run(several)
    assert summary["failed"] == 0
    assert summary["swaps"]["proven"] is True
    assert summary["candidates"] == BUDGET
    # Two at once or three: the same study, which is complete. Folded: another one.
    again = run(config(tiny_study, experts, study, engine="vllm", max_model_len=64, lora_in_flight=2))
    assert again["best"] == summary["best"]
    with pytest.raises(StudyError, match="lora_in_flight"):
        run(config(tiny_study, experts, study, engine="vllm", max_model_len=64))


def test_what_it_does_not_go_with(tiny_study: TinyStudy, experts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora_in_flight must be at least 0, but is -1"):
        config(tiny_study, experts, tmp_path / "study", lora_in_flight=-1)
    with pytest.raises(ConfigError, match=r"needs vLLM's multi-LoRA, but the engine is hf"):
        run(config(tiny_study, experts, tmp_path / "study", lora_in_flight=2))
    (tmp_path / "study.yaml").write_text("lora_in_flight: many\n")
    with pytest.raises(ConfigError, match=r"lora_in_flight must be a whole number, but is 'many'"):
        load_config_file(tmp_path / "study.yaml")
