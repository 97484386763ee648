"""adapter_config.json of a LoRA adapter: what it says about the factors, and whether they are all there is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.strict_json import read_object, shown
from mergemix.errors import CheckpointError

ADAPTER_CONFIG_NAME = "adapter_config.json"
MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload, then save_pretrained) and give the result"

# How training began or was done, what it wrote down for tools: the same factors mean the same weights.
HARMLESS = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
        "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    }
)  # fmt: skip
UNDERSTOOD = frozenset(
    {
        "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
        "fan_in_fan_out", "bias", "init_lora_weights", "ensure_weight_tying",
    }
)  # fmt: skip
# Whatever else is set makes of the factors something other than W + s * B @ A.
REASONS = {
    "use_dora": "DoRA also scales every row of the merged weight",
    "use_qalora": "QALoRA pools the inputs of its factors",
    "use_bdlora": "its factors are block-diagonal",
    "lora_bias": "a bias was trained beside the factors",
    "target_parameters": "its factors belong to fused parameters, not to modules",
    "trainable_token_indices": "single rows of the embeddings were trained",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it acts on some tokens only, so no weights are equal to it",
    "arrow_config": "it routes tokens between adapters, so no weights are equal to it",
    "megatron_config": "its factors are of Megatron's parallel layers",
}
# Initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take their start out of it.
INITIAL = ("gaussian", "eva", "orthogonal", "mica")

Holds = Callable[[Any], bool]


@dataclass(frozen=True)
class LoraSettings:
    """The numbers of adapter_config.json. rank, alpha: for modules that no pattern matches."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, tuple[re.Pattern[str], int]]
    alpha_pattern: Mapping[str, tuple[re.Pattern[str], float]]
    is_rank_stabilised: bool

    def rank_of(self, module: str) -> int:
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What the product of the factors is multiplied with. Source: PEFT, LoraLayer.update_layer."""
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rank_stabilised else alpha / rank


def read_settings(path: Path) -> tuple[dict[str, Any], LoraSettings]:
    """The contents of adapter_config.json, and the settings in it.

    Raises CheckpointError when it is damaged, of another method than LoRA, or sets anything that makes the adapted
    weights something else than base plus scaled product of the factors.
    """
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: only LoRA adapters can be mixed, but its peft_type is {shown(config.get('peft_type'))}: "
            f"{MERGE_FIRST}"
        )
    for key in config.keys() - HARMLESS - UNDERSTOOD:
        _check_neutral(path, key, config[key])
    _check_start(path, config.get("init_lora_weights", True))
    _check(
        path, config, "bias", "none", "none, all or lora_only", lambda v: v in ("none", "all", "lora_only")
    )
    _check(path, config, "base_model_name_or_path", None, "a string", lambda v: isinstance(v, str | None))
    for key in ("fan_in_fan_out", "ensure_weight_tying"):
        _check(path, config, key, False, "true or false", lambda v: isinstance(v, bool | None))
    return config, LoraSettings(
        rank=_check(path, config, "r", 8, "a positive integer", _is_rank),
        alpha=float(_check(path, config, "lora_alpha", 8, "a finite number", _is_number)),
        rank_pattern=_patterns(path, config, "rank_pattern", "positive integers", _is_rank),
        alpha_pattern=_patterns(path, config, "alpha_pattern", "finite numbers", _is_number),
        is_rank_stabilised=bool(
            _check(path, config, "use_rslora", False, "true or false", lambda v: isinstance(v, bool | None))
        ),
    )


def _check_neutral(path: Path, key: str, value: Any) -> None:
    if value is None or value is False or value in ("", [], {}):
        return
    if reason := REASONS.get(key):
        raise CheckpointError(f"{path}: {key} is {shown(value)}: {reason}; {MERGE_FIRST}")
    raise CheckpointError(
        f"{path}: {shown(key)} is {shown(value)}, and what that does to the weights is not known here: "
        f"{MERGE_FIRST}, or remove it from the file if it does nothing"
    )


def _check_start(path: Path, start: Any) -> None:
    known = start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in INITIAL)
    if not known:
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(start)}, which changes the base before training, so that the "
            "factors do not belong to the base as it was: save the adapter again with save_pretrained("
            f"path_initial_model_for_weight_conversion=...), or {MERGE_FIRST}"
        )


def _check(path: Path, config: Mapping[str, Any], key: str, default: Any, rule: str, holds: Holds) -> Any:
    value = config.get(key, default)
    if not holds(value):
        raise CheckpointError(f"{path}: {key} must be {rule}, but is {shown(value)}")
    return value


def _patterns(path: Path, config: Mapping[str, Any], key: str, rule: str, holds: Holds) -> dict[str, Any]:
    """The regular expressions of `key`, compiled as PEFT matches them: up to the end, after any "."."""
    given = config.get(key) or {}
    if not isinstance(given, dict) or not all(holds(value) for value in given.values()):
        raise CheckpointError(f"{path}: {key} must map names to {rule}, but is {shown(given)}")
    compiled = {}
    for pattern, value in given.items():
        try:
            compiled[pattern] = re.compile(rf"(.*\.)?({pattern})$"), value
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: {key}: {shown(pattern)} is no regular expression: {error}"
            ) from None
    return compiled


def _matching(patterns: Mapping[str, tuple[re.Pattern[str], Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that matches. Source: PEFT, get_pattern_key."""
    for pattern, value in patterns.values():
        if pattern.match(module):
            return value
    return patterns[module][1] if module in patterns else default


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # not isinstance: True is no number
