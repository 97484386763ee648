"""The transformers engine keeps every engine's promises, and its live weights are the disk merge bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergemix.checkpoints.family import Family
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, EngineSpec, Generate, LogLikelihood
from mergemix.serve.hf_engine import HfEngine
from tests.serve.conformance import (
    MAX_TOKENS,
    PAIRS,
    PROMPTS,
    EngineConformance,
    StartEngine,
    mixtures_in_mixed_order,
)


class HfConformance(EngineConformance):
    swap_path: str

    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls) -> StartEngine:
        return lambda family, mixture: HfEngine(EngineSpec(family, kind="hf"), mixture)

    def test_live_weights_equal_a_fresh_load_of_the_merge_on_disk(
        self, engine: HfEngine, family: Family, tmp_path: Path
    ) -> None:
        assert engine.swap_path == self.swap_path
        checksums = []
        for number, mixture in enumerate(mixtures_in_mixed_order(family.names)):
            engine.apply(mixture)
            merge_to_directory(family, mixture, tmp_path / str(number))
            fresh = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).state_dict()
            live = engine._model.state_dict()
            assert list(live) == list(fresh)
            assert all(torch.equal(live[name], fresh[name]) for name in fresh), mixture
            checksums.append(engine.checksum())
        assert checksums[0] == checksums[-1]
        assert len(set(checksums)) == len(checksums) - 1

    def test_a_swapped_engine_answers_exactly_as_one_started_on_the_mixture(
        self, engine: Engine, family: Family, make_engine: StartEngine
    ) -> None:
        mixture = Mixture(family.names, (0.25, 0.25, 0.5))
        requests = [
            *(Generate(prompt, MAX_TOKENS) for prompt in PROMPTS),
            *(LogLikelihood(*p) for p in PAIRS),
        ]
        engine.apply(mixture)
        with make_engine(family, mixture) as fresh:
            assert engine.submit(requests) == fresh.submit(requests)
        assert engine.submit(requests[::-1]) == engine.submit(requests)[::-1]


class TestTiedLlama(HfConformance):
    arch = "llama"
    swap_path = "in place"


class TestLlama(HfConformance):
    arch = "llama_untied"
    swap_path = "in place"


class TestQwen3Moe(HfConformance):
    arch = "qwen3_moe"
    swap_path = "reload"
