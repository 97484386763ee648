"""Tiny real models, and adapters for them as PEFT itself writes them, with weights as if they had been trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

VOCAB_SIZE = 40


def write_base(directory: Path, arch: str = "llama", dtype: str = "float32", seed: int = 0) -> Path:
    """A random model of two layers: "llama" (with biases), "llama_tied" or "gpt2" (tied, layers as [in, out])."""
    disable_progress_bar()
    torch.manual_seed(seed)
    model: PreTrainedModel
    if arch == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0,
                       eos_token_id=1)
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, attention_bias=True,
                tie_word_embeddings=arch == "llama_tied",
            )
        )  # fmt: skip
    _disturb(model, 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def write_adapter(
    base: Path,
    directory: Path,
    *,
    autocast: bool = True,
    size: float = 0.2,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> PeftModel:
    """Wrap the model at `base` with LoRA of these settings, disturb what is trained, save it; the model as saved.

    autocast: PEFT widens half-precision factors to fp32. size: of the disturbance. save: for save_pretrained.
    """
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        peft = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=autocast)
        _disturb(peft, size)
        peft.save_pretrained(directory, **(save or {}))
    return peft.eval()


def _disturb(model: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape).to(parameter.dtype)
