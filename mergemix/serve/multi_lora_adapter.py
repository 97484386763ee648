"""A mixture of LoRA adapters, written as one LoRA adapter: ranks side by side, weights folded into B.

sum_k a_k s_k B_k @ A_k is [a_1 s_1 B_1, a_2 s_2 B_2, ...] @ [A_1; A_2; ...], so nothing is approximated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergemix.checkpoints.adapter import PREFIX, WEIGHTS_NAME, Adapter, LowRankDelta
from mergemix.checkpoints.adapter_config import ADAPTER_CONFIG_NAME
from mergemix.checkpoints.family import Family
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import read_range
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.mixture import Mixture
from mergemix.serve.dtypes import TORCH_DTYPES

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
COMPARED_BYTES = 16 << 20
INSTEAD = "fold the adapters into the served weights instead, which has no such limit"


@dataclass(frozen=True)
class WrittenAdapter:
    """nbytes: of its tensors. modules: how many the adapter changes."""

    directory: Path
    rank: int
    nbytes: int
    modules: int


def check_low_rank(family: Family) -> None:
    """Raise ConfigError unless every mixture of the family is the base plus an adapter that vLLM's LoRA can take."""
    for expert in family.experts:
        named = f"{expert.name} ({expert.source})"
        if not isinstance(expert, Adapter):
            raise ConfigError(
                f"mixtures are adapters only where every expert is one, but {named} is a whole checkpoint: {INSTEAD}"
            )
        whole = [name for name, tensor in expert.tensors.items() if not _is_copy(family, name, tensor)]
        if whole:
            raise ConfigError(
                f"an adapter that is served beside its base may hold low-rank factors only, but {named} brings "
                f"{_list(whole)} as a whole: {INSTEAD}"
            )
        for name, delta in expert.deltas.items():
            _check_module(expert, name, delta)
    rank = total_rank(family)
    if rank > RANKS[-1]:
        raise ConfigError(
            f"the ranks of all adapters that change one tensor add up to {rank}, and vLLM's LoRA takes at most "
            f"{RANKS[-1]}: {INSTEAD}"
        )


def _is_copy(family: Family, name: str, tensor: TensorInfo) -> bool:
    """Whether a whole tensor is the base's own: PEFT saves embeddings beside their factors."""
    base = family.template.tensors[name]
    if (tensor.dtype, tensor.shape) != (base.dtype, base.shape):
        return False
    steps = range(0, tensor.nbytes, COMPARED_BYTES)
    sizes = [(begin, min(COMPARED_BYTES, tensor.nbytes - begin)) for begin in steps]
    return all(read_range(tensor, *part) == read_range(base, *part) for part in sizes)


def _check_module(expert: Adapter, name: str, delta: LowRankDelta) -> None:
    """Refuse what vLLM's LoRA computes otherwise than the merged weights would.

    It knows a tied head by the embeddings' name only, and leaves it unchanged. At the output head it takes the rows
    of a prompt, whose log-probabilities are asked for, for requests (CPU: an error).
    """
    if delta.is_embedding and expert.config.get("ensure_weight_tying"):
        what = "the embeddings and the output head tied to them"
    elif "lm_head" in name:  # by this name vLLM knows it
        what = "the output head"
    else:
        return
    raise ConfigError(
        f"vLLM's LoRA does not give the right log-probabilities where an adapter changes {what}, and "
        f"{expert.name} ({expert.source}) changes {name!r}: {INSTEAD}"
    )


def total_rank(family: Family) -> int:
    """The largest rank that a mixture of the adapters can have."""
    ranks: dict[str, int] = {}
    for expert in family.experts:
        for name, delta in expert.deltas.items() if isinstance(expert, Adapter) else ():
            ranks[name] = ranks.get(name, 0) + delta.rank
    return max(ranks.values(), default=1)


def max_lora_rank(rank: int) -> int:
    """The least max_lora_rank of vLLM that holds `rank`, which `check_low_rank` has bounded."""
    return next(each for each in RANKS if each >= rank)


def target_modules(family: Family) -> list[str]:
    """The last parts of the names of all modules that an adapter changes: vLLM keeps room for LoRA in these alone."""
    return sorted({module.rpartition(".")[2] for module in _modules(family).values()})


def write_mixture(family: Family, mixture: Mixture, directory: Path) -> WrittenAdapter:
    """Write the adapter that `mixture` is to the new `directory`, as PEFT would save it, with scale 1.

    Every module has the same rank: that of the module with the most, the others' being filled up with zeros. Adapters
    of weight zero are left out. Without any the adapter is one module of zeros: vLLM's CPU build gives a request that
    has no adapter the one in its last slot, when others in the batch have one. Products of scale, weight and B are
    taken in fp32 and rounded once to the widest type of the adapters that change the module.
    Raises ConfigError for a mixture that is not over the family's experts or is beyond the range of that type,
    CheckpointError when an adapter cannot be read, NonFiniteError for NaN or Inf in one.
    """
    modules = _modules(family)
    terms = {name: family.terms(name, mixture).low_rank for name in modules}
    terms = {name: parts for name, parts in terms.items() if parts}
    rank = max((sum(delta.rank for _, delta, _ in parts) for parts in terms.values()), default=1)
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in terms.items():
        is_embedding = parts[0][1].is_embedding
        down, up = _concatenated(name, [(delta, scale) for _, delta, scale in parts], rank)
        a, b = _keys(modules[name], is_embedding)
        tensors |= {a: down, b: up}
    if not tensors:
        tensors = _zeros(family, modules)
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    changed = [modules[name] for name in terms]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "target_modules": changed or target_modules(family)[:1],
    }  # fmt: skip
    (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return WrittenAdapter(directory, rank, nbytes, len(tensors) // 2)


def _modules(family: Family) -> dict[str, str]:
    """The name of the module of every tensor that an adapter changes, as vLLM knows it.

    PEFT's names and the base's may lack the part that a model without head has not ("model."): vLLM's never does.
    """
    found: dict[str, str] = {}
    for expert in family.experts:
        for name, delta in expert.deltas.items() if isinstance(expert, Adapter) else ():
            stored = delta.down.name.removeprefix(PREFIX)
            module = stored.removesuffix(".weight").rpartition(".")[0]
            found[name] = max(found.get(name, name.removesuffix(".weight")), module, key=len)
    return found


def _concatenated(
    name: str, parts: list[tuple[LowRankDelta, float]], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] of one module."""
    factors = [(_read(delta.down), _read(delta.up), scale) for delta, scale in parts]
    dtype = factors[0][0].dtype
    for down, up, _ in factors:
        dtype = torch.promote_types(torch.promote_types(dtype, down.dtype), up.dtype)
    a = torch.zeros(rank, factors[0][0].shape[1], dtype=dtype)
    b = torch.zeros(factors[0][1].shape[0], rank, dtype=dtype)
    begin = 0
    for (down, up, scale), (delta, _) in zip(factors, parts, strict=True):
        for factor, info in ((down, delta.down), (up, delta.up)):
            if not torch.isfinite(factor).all():
                raise NonFiniteError(f"tensor {info.name!r} of {info.path} holds NaN or Inf")
        rows = slice(begin, begin + delta.rank)
        a[rows] = down.to(dtype)
        b[:, rows] = (up.float() * scale).to(dtype)
        begin = rows.stop
    if not torch.isfinite(b).all():
        raise ConfigError(
            f"a weight times lora_B of {name!r} is beyond the range of {dtype}; use smaller weights"
        )
    return a, b


def _zeros(family: Family, modules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """An adapter that changes nothing."""
    name, module = next(iter(modules.items()))
    deltas = (expert.deltas.get(name) for expert in family.experts if isinstance(expert, Adapter))
    delta = next(each for each in deltas if each is not None)
    dtype = TORCH_DTYPES[delta.up.dtype]
    a, b = _keys(module, delta.is_embedding)
    return {
        a: torch.zeros(1, delta.down.shape[1], dtype=dtype),
        b: torch.zeros(delta.up.shape[0], 1, dtype=dtype),
    }


def _keys(module: str, is_embedding: bool) -> tuple[str, str]:
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{module}.{names[0]}", f"{PREFIX}{module}.{names[1]}"


def _read(info: TensorInfo) -> torch.Tensor:
    data = bytearray(read_range(info, 0, info.nbytes))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def _list(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{rest}"
