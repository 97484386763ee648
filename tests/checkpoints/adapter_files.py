"""Adapter directories with any tensors and settings, right or wrong, and what they stand for in fp64.

peft_adapters.py has adapters of real models, written by PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.adapter import Adapter, LowRankDelta
from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import open_family
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import read_range

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PREFIX = "base_model.model."


def write_adapter_files(
    directory: Path, tensors: Mapping[str, torch.Tensor], *, alpha: float = 8, rank: int = 2, **config: Any
) -> Path:
    """adapter_config.json, and adapter_model.safetensors with `tensors` under PEFT's prefix; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "init_lora_weights": True, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    stored = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def factors(
    module: str, shape: tuple[int, int], *, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Random lora_A and lora_B of a linear layer whose weight has this shape [out, in]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, shape[1], generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn(shape[0], rank, generator=generator).to(dtype),
    }


def change_config(directory: Path, **changes: Any) -> None:
    """Set keys of adapter_config.json; None is written as null."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Set tensors of adapter_model.safetensors, by their names without prefix; None removes one."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path) | {f"{PREFIX}{name}": tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


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


def fitted(base: Path, adapter: Path) -> tuple[Checkpoint, Adapter]:
    """Both opened, as one family."""
    family = open_family(str(base), {"math": str(adapter)})
    [expert] = family.experts
    assert family.base is not None
    assert isinstance(expert, Adapter)
    return family.base, expert
