"""The vLLM model loader that merges while it loads, and remembers how.

    vllm serve BASE --load-format mergemix --model-loader-extra-config \
        '{"experts": {"math": PATH, "code": PATH}, "base": PATH or null, "weights": {"math": 0.3, "code": 0.7}}'

serves a merge that is never written. `base` is BASE itself when absent, and read only when the weights do not sum
to one; `weights` are used as given, uniform when absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import coefficients, operands
from mergemix.serve.lazy import LazyMerge
from mergemix.serve.swap_plan import SwapPlan
from mergemix.serve.transforms import Transforms

KEYS = ("experts", "base", "weights")


@dataclass
class Loaded:
    """What a swap needs of a loaded model, on this rank; kept as its attribute `mergemix`.

    uncovered: bytes of parameters that came from no checkpoint tensor, by name (vocabulary padding, for example).
    problems: why swaps of this model would be wrong; empty when they are right.
    """

    plan: SwapPlan
    transforms: Transforms
    uncovered: Mapping[str, int]
    problems: list[str]


class MergeLoader(BaseModelLoader):
    """Feeds vLLM's own `model.load_weights` with lazy merged tensors."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do ahead: `open_family` downloads what is not local."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Merge into the parameters of `model`.

        Raises ConfigError for a bad model_loader_extra_config, CheckpointError for checkpoints that cannot be
        merged or do not hold all parameters, NonFiniteError naming tensor and operand.
        """
        # Not above: llvmlite, if imported before a worker starts up, breaks vLLM's search through all modules.
        from mergemix.serve.operands import lazy_weights

        family, mixture = parse_config(self.load_config.model_loader_extra_config, model_config.model)
        plan = SwapPlan([operand.name for operand in operands(family)], coefficients(family, mixture))
        loaded = model.load_weights(lazy_weights(family, plan))
        transforms = Transforms(model)
        plan.seal(transforms.tensors())
        uncovered = _uncovered(model, plan)
        _check_complete(model, loaded, uncovered)
        model.mergemix = Loaded(plan, transforms, uncovered, plan.unreplayable)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, **kwargs: Any) -> nn.Module:
        """Load as every loader does, then see which modules vLLM transformed."""
        # An output head that happens to equal the embedding in this mixture may differ in the next one: keep both.
        if hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
            model_config.word_embeddings_untied_by_checkpoint = False
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, **kwargs)
        loaded: Loaded = model.mergemix  # type: ignore[assignment]
        loaded.problems += loaded.transforms.settle(loaded.plan.bytes_by_storage(), model_config.dtype)
        return model


def parse_config(extra: Any, model: str) -> tuple[Family, Mixture]:
    """The family and mixture that model_loader_extra_config describes; `model`: what vLLM was told to serve.

    Raises ConfigError on an unknown key or a value of the wrong kind, and what `open_family` raises.
    """
    if not isinstance(extra, Mapping) or not isinstance(extra.get("experts"), Mapping):
        raise ConfigError(
            "load format mergemix needs model_loader_extra_config '{\"experts\": {NAME: PATH, ...}}', "
            f"but got {extra!r}"
        )
    if unknown := sorted(set(extra) - set(KEYS)):
        raise ConfigError(f"model_loader_extra_config has no key {unknown[0]!r}; it takes {', '.join(KEYS)}")
    experts = {str(name): str(path) for name, path in extra["experts"].items()}
    weights = extra.get("weights")
    if weights is None:
        mixture = Mixture.uniform(tuple(experts))
    elif isinstance(weights, Mapping):
        mixture = Mixture.of(tuple(experts), weights, normalize=False)
    else:
        raise ConfigError(f"weights must map expert names to numbers, but is {weights!r}")
    base = extra.get("base", model if mixture.base_weight != 0.0 else None)
    return open_family(base, experts), mixture


def _uncovered(model: nn.Module, plan: SwapPlan) -> dict[str, int]:
    """Bytes of each parameter that no checkpoint tensor was copied into."""
    covered = plan.bytes_by_storage(static=True)
    missing = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, LazyMerge):
            raise CheckpointError(
                f"vLLM keeps {name} as the loader gave it: this architecture cannot be merged live"
            )
        nbytes = parameter.numel() * parameter.element_size()
        rest = nbytes - covered.get(parameter.untyped_storage().data_ptr(), 0)
        if rest > 0:
            missing[name] = rest
    return missing


def _check_complete(model: nn.Module, loaded: set[str] | None, uncovered: Mapping[str, int]) -> None:
    """As vLLM's default loader: a parameter that the checkpoint lacks would hold whatever was in memory."""
    if loaded is None:
        return
    empty = [
        name
        for name, parameter in model.named_parameters()
        if name not in loaded and uncovered.get(name) == parameter.numel() * parameter.element_size()
    ]
    if empty:
        raise CheckpointError(f"the checkpoints lack the model's weights {', '.join(sorted(empty))}")


def default_dtype(dtype: torch.dtype) -> Any:
    """vLLM's context for building and processing a model of `dtype`."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    return set_default_torch_dtype(dtype)
