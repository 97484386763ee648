"""Tiny random checkpoints of one family, with a real tokenizer, saved as transformers saves them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

EXPERT_NAMES = ("math", "code", "web", "chat", "law", "art")
VOCAB_SIZE = 128
MAX_POSITIONS = 256

Arch = Literal["llama", "llama_untied", "qwen3_moe"]

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}


def tiny_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """BPE over printable ASCII with a few merges (some across a space); `bos` puts <s> before every text."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        (" ", "the"),
        ("i", "n"),
        (" ", "a"),
        ("e", "r"),
        ("1", "2"),
        ("a", "b"),
        ("ab", "c"),
    ]
    tokens = ["<s>", "</s>", "<pad>", "<unk>", *characters, *("".join(pair) for pair in merges)]
    # No text is encoded to these, but the model may say them: every id decodes to something.
    tokens += [f"q{letter}" for letter in string.ascii_lowercase[: VOCAB_SIZE - len(tokens)]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(directory: Path, seed: int, tied: bool = True) -> Path:
    """A random Llama of about 0.1 M parameters in `directory`, with its tokenizer; returns `directory`."""
    return _save(_random(LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=tied)), seed), directory)


def tiny_qwen3_moe(directory: Path, seed: int) -> Path:
    """A random Qwen3-MoE (4 experts, 2 a token) in `directory`, with its tokenizer; returns `directory`."""
    return _save(_random(_qwen3_moe(), seed), directory)


def make_family(directory: Path, arch: Arch, experts: int = 3, seed: int = 0) -> dict[str, Path]:
    """A base and `experts` checkpoints near it, below `directory`; keys "base" and EXPERT_NAMES, in order."""
    model = (
        _qwen3_moe()
        if arch == "qwen3_moe"
        else LlamaForCausalLM(LlamaConfig(**_SIZES, tie_word_embeddings=arch == "llama"))
    )
    _random(model, seed)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    paths = {"base": _save(model, directory / "base")}
    for index, name in enumerate(EXPERT_NAMES[:experts]):
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + index)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                spread = base[key].float().std() * 0.4
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(base[key].float() + spread * noise)
        paths[name] = _save(model, directory / name)
    return paths


def _qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
    )


def _random(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough for answers that vary: the usual std of 0.02 gives one token for ever."""
    generator = torch.Generator().manual_seed(seed)
    model.to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * noise)
            elif "embed" in name:
                parameter.copy_(0.3 * noise)
            else:
                # A decided router: a near tie of its second and third expert then matters little.
                scale = 4.0 if name.endswith("mlp.gate.weight") else 1.5
                parameter.copy_(noise * scale / parameter.shape[-1] ** 0.5)
    return model


def _save(model: PreTrainedModel, directory: Path) -> Path:
    disable_progress_bar()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(directory)
    tiny_tokenizer(bos=isinstance(model, LlamaForCausalLM)).save_pretrained(directory)
    return directory
