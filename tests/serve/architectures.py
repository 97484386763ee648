"""Tiny random checkpoints of many architectures: what each is called, how large, and how vLLM must be started on it.

Most are built by transformers and saved as it saves them. Those that transformers does not have are written tensor by
tensor, in the layout that vLLM's loader reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from tests.serve.tiny_models import EXPERT_NAMES, MAX_POSITIONS, VOCAB_SIZE, tiny_tokenizer

SPREAD = 0.4  # of an expert around the base, in standard deviations of the base's tensor
ROUTERS = ("gate.weight", "router.weight")

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_SHARED = {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
# The only latent cache that vLLM's kernel for CPUs was built for: 512 and 64 of rotary embedding.
_LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "n_group": 2,
    "topk_group": 1,
}
_SMALL_LATENT = {**_LATENT, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64}
# Processors with AMX would take another one.
_REFERENCE_MLA = {"attention_backend": "CPU_MLA"}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    config: name of the transformers config class, or None where `tensors` says what a checkpoint holds.
    sizes: what differs from the common sizes. tensors: shape of each tensor. files: further files of a checkpoint.
    options: vLLM's EngineArgs beyond the usual. environment: variables that vLLM needs.
    replayable: whether swaps are possible; a model whose loading computes with its weights gets a fresh engine instead.
    refused: what plain vLLM says when it cannot run this on a CPU.
    """

    config: str | None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    replayable: bool = True
    refused: str | None = None


def _bailing_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Ling 2.0 (vLLM's BailingMoeV2): fused query_key_value, dense first layer, shared expert, biased router."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, hidden),
            f"{prefix}.up_proj.weight": (width, hidden),
            f"{prefix}.down_proj.weight": (hidden, width),
        }

    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.attention.query_key_value.weight": ((heads + 2 * kv_heads) * head, hidden),
            f"{layer}.attention.query_layernorm.weight": (head,),
            f"{layer}.attention.key_layernorm.weight": (head,),
            f"{layer}.attention.dense.weight": (hidden, heads * head),
        }
        if index < config["first_k_dense_replace"]:
            shapes |= mlp(f"{layer}.mlp", config["intermediate_size"])
            continue
        shapes |= {
            f"{layer}.mlp.gate.weight": (config["num_experts"], hidden),
            f"{layer}.mlp.gate.expert_bias": (config["num_experts"],),
        }
        width = config["moe_intermediate_size"]
        shapes |= mlp(f"{layer}.mlp.shared_experts", width * config["num_shared_experts"])
        for expert in range(config["num_experts"]):
            shapes |= mlp(f"{layer}.mlp.experts.{expert}", width)
    return shapes


_BAILING_CONFIG = """
from transformers import PreTrainedConfig


class BailingMoeV2Config(PreTrainedConfig):
    model_type = "bailing_moe"
"""
_BAILING_FILES = {"configuration_bailing_moe_v2.py": _BAILING_CONFIG}
_BAILING: dict[str, Any] = {
    **_EXPERTS,
    "model_type": "bailing_moe",
    "architectures": ["BailingMoeV2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "num_experts": 4,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_untied": Architecture("LlamaConfig"),
    "mistral": Architecture("MistralConfig", {"sliding_window": 16}),
    "qwen2": Architecture("Qwen2Config", {"num_attention_heads": 2, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3Config"),
    "gemma2": Architecture("Gemma2Config", {"tie_word_embeddings": True, "sliding_window": 16}),
    "gemma3": Architecture("Gemma3TextConfig", {"tie_word_embeddings": True, "sliding_window": 16}),
    "phi3": Architecture("Phi3Config"),
    "gpt_neox": Architecture("GPTNeoXConfig", {"num_attention_heads": 2}),
    "olmo2": Architecture("Olmo2Config", {"num_attention_heads": 2}),
    "mixtral": Architecture("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Architecture("Qwen3MoeConfig", {**_EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "deepseek_v2": Architecture(
        "DeepseekV2Config",
        {**_SHARED, **_LATENT, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        options=_REFERENCE_MLA,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3Config",
        {**_SHARED, **_LATENT, "q_lora_rank": 32, "topk_method": "noaux_tc"},
        options=_REFERENCE_MLA,
    ),
    "deepseek_v2_full_attention": Architecture(
        "DeepseekV2Config",
        {**_SHARED, **_SMALL_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
        environment={"VLLM_MLA_DISABLE": "1"},
    ),
    "deepseek_v2_small_latent": Architecture(
        "DeepseekV2Config",
        {**_SHARED, **_SMALL_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
        options=_REFERENCE_MLA,
        refused="Head dimension 64 is not supported by MLA",
    ),
    "glm4_moe": Architecture("Glm4MoeConfig", {**_SHARED, "use_qk_norm": True, "attention_bias": True}),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
    ),
    "bailing_moe_v2": Architecture(
        None, _BAILING, _bailing_tensors, _BAILING_FILES, {"trust_remote_code": True}
    ),
    # vLLM divides the rows of the output head by their norm while it loads them: no sum of experts gives that.
    "bailing_moe_norm_head": Architecture(
        None,
        {**_BAILING, "norm_head": True},
        _bailing_tensors,
        _BAILING_FILES,
        {"trust_remote_code": True},
        replayable=False,
    ),
}


def write_family(
    directory: Path, architecture: Architecture, experts: int = 3, seed: int = 0
) -> dict[str, Path]:
    """A base and `experts` checkpoints near it, below `directory`; keys "base" and EXPERT_NAMES, in order."""
    config = {**_SIZES, **architecture.sizes}
    if architecture.config is not None:
        model = _model(architecture.config, config)
        shapes = {name: tensor.shape for name, tensor in _own_tensors(model)}
    else:
        assert architecture.tensors is not None
        shapes = dict(architecture.tensors(config))
    paths = {}
    base = base_tensors(shapes, seed)
    for index, member in enumerate(("base", *EXPERT_NAMES[:experts])):
        paths[member] = directory / member
        tensors = expert_tensors(base, 1000 * (seed + 1) + index) if index else base
        if architecture.config is not None:
            with torch.no_grad():
                for key, tensor in _own_tensors(model):
                    tensor.copy_(tensors[key])
            disable_progress_bar()
            model.save_pretrained(paths[member])
        else:
            _write(paths[member], tensors, config)
        for file, text in architecture.files.items():
            (paths[member] / file).write_text(text)
        tiny_tokenizer(bos=False).save_pretrained(paths[member])
    return paths


def base_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights large enough for answers that vary: the usual std of 0.02 gives one token for ever."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            tensors[name] = 0.3 * noise
        elif len(shape) == 1:
            tensors[name] = 1 + 0.1 * noise
        elif "embed" in name:
            tensors[name] = 0.3 * noise
        else:
            # A decided router: a near tie of its second and third expert then matters little.
            tensors[name] = noise * (4.0 if name.endswith(ROUTERS) else 1.5) / shape[-1] ** 0.5
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def expert_tensors(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Every tensor of the base, moved."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            tensor.float() + SPREAD * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        ).bfloat16()
        for name, tensor in base.items()
    }


def _model(config_class: str, config: Mapping[str, Any]) -> PreTrainedModel:
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**config))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model


def _own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds: parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor


def _write(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
