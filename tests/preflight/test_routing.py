"""Routers' choices on real, tiny mixture-of-experts models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mergemix.checkpoints.family import open_family
from mergemix.mixture import Mixture
from mergemix.preflight import text_checks
from mergemix.preflight.models import load_model
from mergemix.preflight.routing import agreement, chance_agreement, num_experts, router_choices
from mergemix.preflight.texts import Snippet
from tests.serve.tiny_models import make_family

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=6, moe_intermediate_size=8, head_dim=8)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6)),
    "granite": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SIZES, num_local_experts=6)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES, n_routed_experts=6, moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=1,
            n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8,
        )
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES, num_local_experts=6, intermediate_size_mlp=32, head_dim=8, interleave_moe_layer_step=1
        )
    ),
}  # fmt: skip
TEXT = (Snippet((1, 5, 2, 7, 3), 1), Snippet((2, 4, 31), 2))


def tiny(kind: str, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_routers_of_several_architectures_are_found(kind: str) -> None:
    """One per sparse layer; two experts of six for each of eight tokens, those that compute it."""
    model = tiny(kind)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    chosen = router_choices(model, TEXT)
    sparse = 2 if kind == "deepseek_v3" else 3
    assert [each.shape for each in chosen.values()] == [(8, 2)] * sparse
    assert all(len(set(row)) == 2 for each in chosen.values() for row in each.tolist())
    assert all(0 <= each.min() <= each.max() < 6 for each in chosen.values())
    assert num_experts(model.config.to_dict()) == 6
    if (
        kind != "llama4"
    ):  # transformers hooks its own modules where it gives out router logits, and leaves that
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    [first, *_] = chosen.values()
    assert sorted(set(first.ravel())) != [0, 1], "they depend on the token"


def test_choices_are_those_of_the_router_weights() -> None:
    """Checked by hand in the first layer of Qwen3-MoE: the largest logits of what enters its block."""
    model = tiny("qwen3_moe")
    seen: list[torch.Tensor] = []
    block = model.model.layers[0].mlp
    block.register_forward_hook(lambda _, given, __: seen.append(given[0].reshape(-1, 16)))
    chosen = router_choices(model, TEXT)["model.layers.0.mlp.gate"]
    logits = torch.cat(seen) @ block.gate.weight.T
    assert np.array_equal(np.sort(chosen), np.sort(logits.topk(2).indices.numpy()))


def test_agreement_is_one_with_itself_and_that_of_chance_with_another_model() -> None:
    one = router_choices(tiny("qwen3_moe"), TEXT)
    assert set(agreement(one, one).values()) == {1.0}
    rng = np.random.default_rng(0)
    drawn = [{"router": np.array([rng.permutation(64)[:8] for _ in range(4000)])} for _ in range(2)]
    assert agreement(*drawn)["router"] == pytest.approx(chance_agreement(64, 8), abs=0.01)


def test_agreement_is_the_jaccard_index() -> None:
    one, other = (
        {"router": np.array([[0, 1], [2, 3], [4, 5]])},
        {"router": np.array([[1, 0], [3, 0], [6, 7]])},
    )
    assert agreement(one, other)["router"] == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_a_merge_lies_between_its_experts(tmp_path: Path) -> None:
    """On checkpoints: a merge agrees more with each of its experts than the experts agree with each other."""
    paths = make_family(tmp_path, "qwen3_moe", experts=2)
    family = open_family(str(paths["base"]), {name: str(paths[name]) for name in ("math", "code")})
    text = tuple(Snippet(tuple(range(begin, begin + 24)), 1) for begin in range(8, 80, 8))
    math, code, both = (
        router_choices(load_model(family, Mixture.of(family.names, weights)), text)
        for weights in ({"math": 1}, {"code": 1}, {"math": 0.5, "code": 0.5})
    )
    apart = np.mean(list(agreement(math, code).values()))
    for expert in (math, code):
        assert apart < np.mean(list(agreement(expert, both).values())) < 1


def test_a_dense_model_has_no_routers(tmp_path: Path) -> None:
    paths = make_family(tmp_path, "llama", experts=1)
    family = open_family(str(paths["base"]), {"math": str(paths["math"])})
    model = load_model(family, Mixture.base_only(family.names))
    assert router_choices(model, TEXT) == {}
    assert num_experts(family.template.config) is None


def test_what_does_not_fit_in_memory_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_family(tmp_path, "qwen3_moe", experts=1)
    family = open_family(str(paths["base"]), {"math": str(paths["math"])})
    texts = {"math": (Snippet((5, 6, 7), 1),), "code": (Snippet((8, 9, 10), 1),)}
    stages: list[str] = []
    monkeypatch.setattr(text_checks, "_free_memory", lambda: 100_000)
    for check in (text_checks.check_routing, text_checks.check_curvature):
        [why] = check(family, texts, stages.append).missing.values()
        assert "of memory, and" in why
    assert stages == [], "nothing was loaded"
