"""LoRA adapters in a real vLLM: folded into the weights, and served beside the base, against merges on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve import open_engine
from mergemix.serve.engine import Engine, EngineSpec, Generate, LogLikelihood, Output, Request
from mergemix.serve.vllm_engine import VllmEngine
from mergemix.serve.vllm_loader import parse_config
from tests.checkpoints.peft_adapters import write_adapter
from tests.serve.conformance import PAIRS, PROMPTS, Reference, check_likelihoods
from tests.serve.tiny_models import MAX_POSITIONS, tiny_llama

ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "code": {"target_modules": ["down_proj", "o_proj"], "r": 6, "lora_alpha": 3, "use_rslora": True},
    "web": {"target_modules": ["q_proj", "k_proj", "down_proj"], "r": 2, "rank_pattern": {"down_proj": 5}},
}  # fmt: skip
MAX_TOKENS = 8
REQUESTS: list[Request] = [
    *(Generate(prompt, MAX_TOKENS) for prompt in PROMPTS),
    *(LogLikelihood(*pair) for pair in PAIRS),
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_llama(root / "base", 0, tied=True)
    for name, settings in ADAPTERS.items():
        write_adapter(base, root / name, size=0.1, **settings)
    return {"base": str(base), **{name: str(root / name) for name in ADAPTERS}}


@pytest.fixture(scope="module")
def family(paths: dict[str, str]) -> Family:
    return open_family(paths["base"], {name: paths[name] for name in ADAPTERS})


class Given:
    """Likelihoods that were given already, as check_likelihoods asks an engine for them."""

    def __init__(self, outputs: list[Output]) -> None:
        self._outputs = outputs

    def loglikelihood(self, requests: list[LogLikelihood]) -> list[Output]:
        assert len(requests) == len(self._outputs)
        return self._outputs


def check(outputs: list[Output], reference: Reference, mixture: Mixture) -> None:
    """The answers to REQUESTS are the reference's, but for what rounding may change."""
    for prompt, answer in reference.stable().items():
        assert outputs[PROMPTS.index(prompt)].text.startswith(answer.text), (mixture, prompt)  # type: ignore[union-attr]
    check_likelihoods(Given(outputs[len(PROMPTS) :]), reference, PAIRS)  # type: ignore[arg-type]


def test_folded_and_beside_the_base_they_answer_as_their_merges_on_disk(
    family: Family, tmp_path: Path
) -> None:
    weights = [(1, 0, 0), (0.2, 0.5, 0.3), (0, 0, 0), (1.2, -0.4, 0.5), (0, 0, 1)]
    mixtures = [Mixture(family.names, tuple(map(float, each))) for each in weights]
    references = []
    for number, mixture in enumerate(mixtures):
        merge_to_directory(family, mixture, tmp_path / str(number))
        references.append(Reference(tmp_path / str(number)))

    def answers(engine: Engine) -> list[list[Output]]:
        assert engine.proven
        outputs = engine.submit_each(mixtures, REQUESTS)
        for mixture, reference, of_mixture in zip(mixtures, references, outputs, strict=True):
            check(of_mixture, reference, mixture)
        return outputs

    spec = EngineSpec(
        family, "vllm", max_model_len=MAX_POSITIONS, log=tmp_path / "engine.log", verify_swaps="every"
    )
    with open_engine(spec, Mixture.uniform(family.names)) as engine:
        assert isinstance(engine, VllmEngine)
        [rank] = engine.describe()
        assert rank["problems"] == []
        assert rank["cache"]["factors"] > 0
        folded = answers(engine)
        swap = engine.apply(mixtures[0])
        assert swap.bytes_read["host"] > 0
        assert swap.skipped > 0
        assert engine.apply(mixtures[0]).bytes_written == 0

    spec = EngineSpec(
        family, "vllm", max_model_len=MAX_POSITIONS, log=tmp_path / "lora.log", lora_in_flight=3
    )
    with open_engine(spec, mixtures[0]) as engine:
        assert engine.in_flight == 3
        beside = answers(engine)
    assert len({tuple(map(str, each)) for each in folded}) == len(mixtures)
    assert all(len(one) == len(other) for one, other in zip(folded, beside, strict=True))


def test_vllm_serve_takes_its_model_as_the_base_of_adapters(paths: dict[str, str]) -> None:
    experts = {"math": paths["math"], "web": paths["web"]}
    config = parse_config({"experts": experts}, paths["base"])
    assert config.family.base is not None
    assert config.family.base.source == paths["base"]
    with pytest.raises(ConfigError, match=r"math .* is a LoRA adapter.*give the base"):
        parse_config({"experts": experts, "base": None}, paths["base"])
