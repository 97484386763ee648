"""Tiny real models, and adapters for them as PEFT itself writes them, with weights as if they had been trained."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
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

from mergemix.checkpoints.adapter import Adapter, LowRankDelta
from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import read_range

VOCAB_SIZE = 40
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
    base: Path, directory: Path, *, seed: int = 1, save: dict[str, Any] | None = None, **settings: Any
) -> PeftModel:
    """Wrap the model at `base` with LoRA of these settings, disturb what is trained, save it; the model as saved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        peft = get_peft_model(model, LoraConfig(**settings))
        _disturb(peft, 0.2)
        peft.save_pretrained(directory, **(save or {}))
    return peft.eval()


def _disturb(model: torch.nn.Module, size: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape).to(parameter.dtype)


def adapted(base: Checkpoint, adapter: Adapter) -> dict[str, torch.Tensor]:
    """What the adapter stands for: every tensor of the adapted model, in fp64."""
    weights = {}
    for name, tensor in base.tensors.items():
        weights[name] = stored(adapter.tensors.get(name, tensor)).double()
        if name in adapter.deltas:
            weights[name] = weights[name] + product(adapter.deltas[name])
    return weights


def product(delta: LowRankDelta) -> torch.Tensor:
    """scale * up @ down in fp64, as it is added to the base's tensor."""
    matrix = delta.scale * (stored(delta.up).double() @ stored(delta.down).double())
    return matrix.T if delta.transposed else matrix


def stored(tensor: TensorInfo) -> torch.Tensor:
    """The tensor's own values."""
    raw = np.frombuffer(read_range(tensor, 0, tensor.nbytes), np.uint8).copy()
    return torch.from_numpy(raw).view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)
