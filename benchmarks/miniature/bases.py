"""Models from scratch: random weights of a shape, then `mergemix train` on general data, phase by phase."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from benchmarks.miniature.corpora import ALPHABET
from benchmarks.miniature.protocol import SEQUENCE, Shape
from mergemix.demo.tokenizer import BOS, EOS, PAD, build_tokenizer, vocabulary


def write_random(path: Path, shape: Shape, seed: int) -> Path:
    """A checkpoint of random fp32 weights with its tokenizer, at `path`; kept when it is there."""
    if path.is_dir():
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.float32)
    aside = path.with_name(f".{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    build_tokenizer(2 * SEQUENCE, ALPHABET).save_pretrained(aside)
    aside.rename(path)
    return path


def _config(shape: Shape) -> PretrainedConfig:
    ids = vocabulary(ALPHABET)
    common = {
        "vocab_size": 64 * -(-len(ids) // 64),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads // 2,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": 2 * SEQUENCE,
        "tie_word_embeddings": True,
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[EOS],
        "pad_token_id": ids[PAD],
    }
    if not shape.experts:
        return LlamaConfig(**common)
    return Qwen3MoeConfig(
        **common,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.active,
        mlp_only_layers=[0],  # the first layer is dense, as in the paper's models
        norm_topk_prob=True,
        output_router_logits=True,  # with it the training balances the experts' load
        router_aux_loss_coef=0.01,
    )
