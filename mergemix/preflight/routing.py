"""Do the routers of mixture-of-experts models still send tokens where the base sends them?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mergemix.preflight.texts import Snippet

# What architectures call it in config.json.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

Choices = Mapping[str, np.ndarray]  # router's module name -> int64 [tokens, experts a token]


def router_choices(model: Any, snippets: Sequence[Snippet]) -> Choices:
    """Which experts each router chose for each token of the text; empty for a model without routers.

    A router is a module that gives integers beside floating-point numbers: the experts it chose, as transformers'
    routers do. Where none does, the choices are the largest of the router logits that the model itself gives out.
    """
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad(), _recorded(model, found):
        for snippet in snippets:
            _read(model, snippet)
    # What a router chose, the block around it may hand on.
    inner = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    if inner:
        return {name: np.concatenate(found[name]) for name in found if name in inner}
    return _from_logits(model, snippets)


def agreement(one: Choices, other: Choices) -> dict[str, float]:
    """Of each router: |both chose| / |either chose|, the mean over tokens of the Jaccard index. 1: the same choices."""
    return {name: float(np.mean(_jaccard(chosen, other[name]))) for name, chosen in one.items()}


def chance_agreement(num_experts: int, chosen: int) -> float:
    """About what two routers that know nothing of each other agree: `chosen` of `num_experts` each, by chance."""
    common = chosen * chosen / num_experts
    return common / (2 * chosen - common)


def num_experts(config: Mapping[str, Any]) -> int | None:
    """How many experts each router chooses from, as config.json says; None of a dense model."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in EXPERT_KEYS:
            if isinstance(value := part.get(key), int) and value > 1:
                return value
    return None


def _jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [tokens]. one, other: int64 [tokens, chosen], without repetitions in a row."""
    common = (one[:, :, None] == other[:, None, :]).sum(axis=(1, 2))
    return common / (one.shape[1] + other.shape[1] - common)


@contextmanager
def _recorded(model: Any, found: dict[str, list[np.ndarray]]) -> Iterator[None]:
    """Add to `found` what every module of integers and floats gives, while this lasts."""

    def record(name: str, output: Any) -> None:
        if not isinstance(output, tuple) or not all(isinstance(part, torch.Tensor) for part in output):
            return
        chosen = [part for part in output if part.dtype in (torch.int32, torch.int64)]
        if len(chosen) == 1 and len(output) > 1 and chosen[0].ndim >= 2:
            found.setdefault(name, []).append(chosen[0].reshape(-1, chosen[0].shape[-1]).cpu().numpy())

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _from_logits(model: Any, snippets: Sequence[Snippet]) -> Choices:
    """The largest router logits, of models that give them out."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return {}
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for snippet in snippets:
            logits = getattr(_read(model, snippet, output_router_logits=True), "router_logits", None) or ()
            for layer, each in enumerate(each for each in logits if each is not None):
                flat = each.reshape(-1, each.shape[-1])
                found.setdefault(str(layer), []).append(flat.topk(chosen, dim=-1).indices.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _read(model: Any, snippet: Snippet, **options: bool) -> Any:
    ids = torch.tensor([snippet.ids], device=next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False, **options)
