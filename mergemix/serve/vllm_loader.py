"""The vLLM model loader that merges while it loads, and remembers how.

    vllm serve BASE --load-format mergemix --model-loader-extra-config \
        '{"experts": {"math": PATH, "code": PATH}, "base": PATH or null, "weights": {"math": 0.3, "code": 0.7}}'

serves a merge that is never written. Experts may be LoRA adapters, which are folded into the weights. `base` is BASE
itself when absent, and read only when there are adapters or the weights do not sum to one; `weights` are used as
given, uniform when absent. `groups`, a list of {"tensors": [PATTERN, ...], "weights": {NAME: WEIGHT, ...}}, gives
tensors weights of their own. `device_cache` and `host_cache` are bytes, of all ranks together, in which operands are
kept for later swaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from mergemix.checkpoints.family import Family, is_adapter_source, open_family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.merge.mixtures_file import parse_mixture
from mergemix.mixture import Mixture
from mergemix.serve.engine import check_cache_bytes
from mergemix.serve.lazy import LazyMerge
from mergemix.serve.transforms import Raw, Transformed, Transforms

if TYPE_CHECKING:
    from mergemix.serve.recording import Recording
    from mergemix.serve.swap_plan import SwapPlan

KEYS = ("experts", "base", "weights", "groups", "device_cache", "host_cache")


@dataclass
class Loaded:
    """What a swap needs of a loaded model, on this rank; kept as its attribute `mergemix`.

    uncovered: bytes of parameters that came from no checkpoint tensor, by name (vocabulary padding, for example).
    problems: why swaps of this model would be wrong; empty when they are right. read_by: the addresses of the
    storages that processing a transformed module reads, in the order of transforms.modules. mixture: what is live;
    None where that is not known. mixed: a swap has begun and not ended, so that the weights are of two mixtures.
    swaps: how many have begun.
    """

    plan: SwapPlan
    transforms: Transforms
    uncovered: Mapping[str, int]
    problems: list[str]
    mixture: Mixture | None
    read_by: list[tuple[Transformed, frozenset[int]]] = field(default_factory=list)
    mixed: bool = False
    swaps: int = 0

    def settle(self, act_dtype: torch.dtype) -> None:
        """See what vLLM's processing made of the weights that were loaded; to be called after it."""
        transforms = self.transforms
        self.problems += transforms.settle(self.plan.bytes_by_storage(), act_dtype)
        for entry in transforms.modules:
            read = frozenset(map(_storage, transforms._read_by(entry.module)))
            self.read_by.append((entry, read))
            self.plan.write_together(read, {_storage(raw) for raw in entry.raw if not raw.is_unchanged()})

    def stale(self, written: Set[int]) -> list[Transformed]:
        """The modules to process again after storages at these addresses were written."""
        return [entry for entry, read in self.read_by if not read.isdisjoint(written)]


class MergeLoader(BaseModelLoader):
    """Feeds vLLM's own `model.load_weights` with lazy merged tensors."""

    _ranks = 1  # that share the budgets of the cache

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do ahead: `open_family` downloads what is not local."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Merge into the parameters of `model`.

        The memory of the cache is taken here: vLLM measures what is left when the model is loaded.
        Raises ConfigError for a bad model_loader_extra_config, CheckpointError for checkpoints that cannot be
        merged or do not hold all parameters, NonFiniteError naming tensor and operand.
        """
        # Not above: llvmlite, if imported before a worker starts up, breaks vLLM's search through all modules.
        from mergemix.serve.operand_cache import CacheSizes
        from mergemix.serve.recording import Recording

        config = parse_config(self.load_config.model_loader_extra_config, model_config.model)
        recording = Recording(config.family, config.mixture)
        loaded = model.load_weights(recording.lazy_weights())
        transforms = Transforms(model)
        uncovered = _uncovered(model, recording)
        _check_complete(model, loaded, uncovered)
        sizes = CacheSizes(config.device_cache // self._ranks, config.host_cache // self._ranks)
        plan = recording.finish(transforms.tensors(), sizes)
        model.mergemix = Loaded(plan, transforms, uncovered, plan.unreplayable, config.mixture)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, **kwargs: Any) -> nn.Module:
        """Load as every loader does, then see which modules vLLM transformed."""
        # An output head that happens to equal the embedding in this mixture may differ in the next one: keep both.
        if hasattr(model_config, "word_embeddings_untied_by_checkpoint"):
            model_config.word_embeddings_untied_by_checkpoint = False
        self._ranks = vllm_config.parallel_config.world_size
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, **kwargs)
        loaded: Loaded = model.mergemix  # type: ignore[assignment]
        loaded.settle(model_config.dtype)
        return model


@dataclass(frozen=True)
class LoaderConfig:
    """What to serve at first. device_cache, host_cache: bytes, of all ranks of an engine together."""

    family: Family
    mixture: Mixture
    device_cache: int
    host_cache: int


def parse_config(extra: Any, model: str) -> LoaderConfig:
    """What model_loader_extra_config says; `model`: what vLLM was told to serve.

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
    names = tuple(experts)
    weights = extra.get("weights")
    given = {
        "weights": Mixture.uniform(names).as_dict() if weights is None else weights,
        "groups": extra.get("groups") or [],
    }
    mixture = parse_mixture(given, names, "model_loader_extra_config", normalize=False)
    parts = [mixture.weights, *(group.weights for group in mixture.groups)]
    needs_base = any(Mixture(names, weights).base_weight != 0.0 for weights in parts)
    if "base" not in extra and not needs_base:
        needs_base = any(is_adapter_source(name, path) for name, path in experts.items())
    base = extra.get("base", model if needs_base else None)
    caches = {key: check_cache_bytes(key, extra.get(key, 0)) for key in ("device_cache", "host_cache")}
    return LoaderConfig(open_family(base, experts), mixture, **caches)


def _storage(raw: Raw) -> int:
    return raw.data.untyped_storage().data_ptr()


def _uncovered(model: nn.Module, recording: Recording) -> dict[str, int]:
    """Bytes of each parameter that no checkpoint tensor was copied into."""
    covered = recording.bytes_by_storage()
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
