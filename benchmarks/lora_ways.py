"""How LoRA adapters are merged without us: dense experts written first, and PEFT's merge_and_unload.

Run in a process of its own:  python -m benchmarks.lora_ways dense|peft BASE ADAPTER OUT [ADAPTER OUT ...]
"""

import json
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def adapter_scale(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def dense(base: Path, adapter: Path, out: Path) -> None:
    """Write base + scale * B @ A as a whole checkpoint, shard by shard: products in fp32, rounded once."""
    out.mkdir()
    factors = load_file(adapter / "adapter_model.safetensors")
    scale = adapter_scale(adapter)
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            prefix = f"{PREFIX}{name.removesuffix('.weight')}"
            if f"{prefix}.lora_A.weight" in factors:
                delta = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
                tensors[name] = delta.mul_(scale).add_(tensor).to(tensor.dtype)
        save_file(tensors, out / path.name, metadata={"format": "pt"})


def peft(base: Path, adapter: Path, out: Path) -> None:
    """The same by PEFT's documented way. Prints the seconds of each step, imports not counted, as JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    moments = [time.perf_counter()]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter
    )
    moments.append(time.perf_counter())
    merged = model.merge_and_unload()
    moments.append(time.perf_counter())
    merged.save_pretrained(out)
    moments.append(time.perf_counter())
    steps = ("load_s", "merge_s", "save_s")
    print(json.dumps({step: b - a for step, a, b in zip(steps, moments, moments[1:], strict=False)}))


if __name__ == "__main__":
    way, base, *paths = sys.argv[1:]
    for adapter, out in zip(paths[::2], paths[1::2], strict=True):
        {"dense": dense, "peft": peft}[way](Path(base), Path(adapter), Path(out))
