"""Checkpoints and LoRA adapters to measure with: real shapes and real files, random contents, made quickly."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BLOCK_ELEMENTS = 8 << 20
HEAD_BYTES = 4096  # of every tensor that a sparse checkpoint stores; the rest is a hole, read as zeros
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A Llama. heads of head_dim elements; tied: the output layer is the embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = True

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name, in the order of the forward pass."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
        }
        mlp = {
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            named[f"{prefix}.input_layernorm.weight"] = (self.hidden,)
            named |= {f"{prefix}.self_attn.{name}.weight": shape for name, shape in attention.items()}
            named[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden,)
            named |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        named["model.norm.weight"] = (self.hidden,)
        return named if self.tied else {**named, "lm_head.weight": (self.vocabulary, self.hidden)}

    def linear(self) -> dict[str, tuple[int, int]]:
        """[outputs, inputs] of every linear layer that adapters change, by the name of its weight."""
        return {
            name: (shape[0], shape[1])
            for name, shape in self.tensors().items()
            if name.split(".")[-2] in ADAPTED
        }

    @property
    def nbytes(self) -> int:
        """Of all tensors in bf16."""
        return 2 * sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """config.json, which transformers, vLLM and mergekit load."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class MoeShape(Shape):
    """Qwen3-MoE's layers: `experts` of width `intermediate` in each, of which a token uses `active`."""

    experts: int = 64
    active: int = 8

    def tensors(self) -> dict[str, tuple[int, ...]]:
        named: dict[str, tuple[int, ...]] = {}
        for name, shape in super().tensors().items():
            layer, _, part = name.rpartition(".mlp.")
            if not layer:
                named[name] = shape
                if name.endswith("o_proj.weight"):
                    attention = name.removesuffix("o_proj.weight")
                    named |= {f"{attention}{each}_norm.weight": (self.head_dim,) for each in "qk"}
                continue
            if part.startswith("gate_proj"):
                named[f"{layer}.mlp.gate.weight"] = (self.experts, self.hidden)
            named |= {f"{layer}.mlp.experts.{number}.{part}": shape for number in range(self.experts)}
        return named

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": self.experts,
            "num_experts_per_tok": self.active,
            "moe_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


SHAPES = {
    "tiny": Shape(64, 160, 8, 2, 2, 32, 512),  # 0.9 MB; the smallest heads that vLLM serves on a CPU
    "test": Shape(64, 160, 2, 4, 2, 16, 512),  # 0.26 MB
    "small": Shape(1024, 4096, 8, 16, 4, 64, 32000),  # 0.3 GB
    "1gb": Shape(2048, 8192, 7, 32, 8, 64, 32000),  # Llama 3.2 1B's layers, fewer of them: 0.98 GB
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 32000),  # Llama 3.2 1B with a smaller vocabulary: 2.08 GB
    "4gb": Shape(2048, 8192, 32, 32, 8, 64, 32000),  # the same, twice the layers: 4.0 GB
    "16gb": Shape(4096, 14336, 32, 32, 8, 128, 128256, tied=False),  # Llama 3.1 8B: 16.1 GB
    "tiny-moe": MoeShape(64, 32, 2, 2, 2, 32, 512, experts=8, active=2),
    "moe-16b": MoeShape(2048, 1408, 27, 16, 4, 128, 126464, tied=False),  # 16.0B parameters, 32 GB
}


def write_model(directory: Path, shape: Shape, seed: int, *, shards: int = 3, sparse: bool = False) -> Path:
    """A checkpoint of `shape` in bf16 with random contents, in `shards` files with an index. Returns `directory`.

    sparse: only the first HEAD_BYTES of each tensor are stored, so that a model takes hardly any disk space.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    generator = np.random.Generator(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    parts = _split(shape.tensors(), shards)
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _write_file(directory / name, part, generator, sparse=sparse)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def weight_files(directories: Sequence[Path]) -> list[Path]:
    return [path for directory in directories for path in sorted(directory.glob("*.safetensors"))]


def _split(tensors: dict[str, tuple[int, ...]], shards: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors in order, cut into runs of about equal size."""
    total = sum(math.prod(shape) for shape in tensors.values())
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    done = 0
    for name, shape in tensors.items():
        parts[min(done * shards // total, shards - 1)][name] = shape
        done += math.prod(shape)
    return [part for part in parts if part]


def _write_file(
    path: Path, tensors: dict[str, tuple[int, ...]], generator: np.random.Generator, *, sparse: bool
) -> None:
    """One safetensors file, block by block: a shard need not fit into memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in tensors.items():
        end = begin + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            elements = math.prod(shape)
            stored = min(elements, HEAD_BYTES // 2) if sparse else elements
            for block in _random_bf16(stored, generator):
                file.write(block.data)
            file.seek(2 * (elements - stored), 1)
        file.truncate()


def _random_bf16(elements: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Bit patterns of bf16 numbers in blocks: random signs and mantissas, magnitudes from 2^-9 to 2^-1."""
    for begin in range(0, elements, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, elements - begin)
        words = generator.integers(0, 1 << 64, -(-count // 4), np.uint64)
        bits = words.view(np.uint16)[:count]
        bits &= 0x83FF  # the sign, three bits of the exponent, the mantissa
        bits += 118 << 7  # the least exponent: 2^(118 - 127)
        yield bits


def write_adapter(directory: Path, shape: Shape, seed: int, *, rank: int, alpha: int) -> Path:
    """A LoRA adapter for every linear layer, in fp32 as PEFT saves it. Returns `directory`."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, (outputs, inputs) in shape.linear().items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{prefix}.lora_A.weight"] = generator.standard_normal((rank, inputs), np.float32) * 0.02
        tensors[f"{prefix}.lora_B.weight"] = generator.standard_normal((outputs, rank), np.float32) * 0.02
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(ADAPTED),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return directory
