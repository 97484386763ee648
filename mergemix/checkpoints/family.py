"""Checkpoints that can be averaged: one optional base and K experts that agree tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import ConfigError, FamilyError
from mergemix.mixture import Mixture

REQUIRED_KEYS = ("model_type", "architectures")
# Keys of config.json that do not change the forward pass: where a model came from, how it was trained and loaded,
# and the tokens that begin and end texts, which the template decides for every mixture.
IGNORED_KEYS = frozenset(
    {
        "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache",
        "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
        "output_router_logits", "router_aux_loss_coef",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """base: None when no mixture needs it. experts: K >= 1, in the user's order."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @property
    def members(self) -> tuple[Checkpoint, ...]:
        """Who is summed, in the order of summation: the base where there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def coefficients(self, mixture: Mixture) -> list[float]:
        """The coefficient of each of `members` as kernels use it, rounded to fp32; 0.0: it is not read.

        Raises ConfigError when the mixture is not over the experts, a coefficient is beyond fp32, or the weights
        need a base that is not there.
        """
        if mixture.names != self.names:
            raise ConfigError(
                f"the mixture is over {', '.join(mixture.names)}, but the experts are {', '.join(self.names)}"
            )
        weights = [_fp32(name, weight) for name, weight in mixture.as_dict().items()]
        rest = mixture.base_weight
        if self.base is not None:
            return [_fp32("the base", rest), *weights]
        if rest != 0.0:
            raise ConfigError(
                f"the weights sum to {1 - rest:.12g}, not 1, so the base has a share of {rest:g}: "
                "give --base, or weights that sum to 1"
            )
        return weights

    @property
    def template(self) -> Checkpoint:
        """Whose config.json, tokenizer and shard layout are used: the base's, else the first expert's."""
        return self.base or self.experts[0]


def open_family(base: str | None, experts: Mapping[str, str]) -> Family:
    """Open the base (None: no base) and the experts, and check that they can be averaged.

    base, experts' values: a directory or a Hub id `org/name[@revision]`. experts: by domain, in order.
    Raises ConfigError without experts, CheckpointError on one that cannot be used, FamilyError where they
    disagree.
    """
    if not experts:
        raise ConfigError("no expert was given; give at least one as NAME=PATH")
    unnamed = [source for name, source in experts.items() if not name.strip()]
    if unnamed:
        raise ConfigError(f"the expert {unnamed[0]!r} has no name; give it as NAME=PATH")
    family = Family(
        base=None if base is None else open_checkpoint("base", base),
        experts=tuple(open_checkpoint(name, source) for name, source in experts.items()),
    )
    check_family(family)
    return family


def check_family(family: Family) -> None:
    """Raise FamilyError unless all members have the same architecture, tensor names, dtypes and shapes.

    Of config.json, what both hold of the keys that change the forward pass must be equal. A key that only one
    holds is accepted: versions of transformers differ in which defaults they write down.
    The message names the first key or tensor that differs, both values and both checkpoints.
    """
    first, *others = family.members
    for other in others:
        _check_configs(first, other)
        _check_tensors(first, other)


def _check_configs(one: Checkpoint, other: Checkpoint) -> None:
    required = ((key, one.config.get(key), other.config.get(key)) for key in REQUIRED_KEYS)
    for key, a, b in (*required, *_common_values(_with_rope(one.config), _with_rope(other.config))):
        if a != b:
            raise FamilyError(
                f"config.json differs in {key}: {_named(one)} has {shown(a)}, {_named(other)} has {shown(b)}; "
                "experts must come from one base model and compute alike"
            )


def _common_values(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, one's value, the other's) of every key that both hold and that matters, "." between levels."""
    for key in sorted((one.keys() & other.keys()) - IGNORED_KEYS):
        a, b = one[key], other[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _common_values(a, b, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", a, b


def _with_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`config` with its rotary embedding under rope_parameters, as transformers 5 writes it.

    transformers 4 wrote rope_theta and rope_scaling, which is absent or null where nothing is scaled.
    """
    given = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
    rope = {key: value for part in given if isinstance(part, dict) for key, value in part.items()}
    if "rope_theta" in config:
        rope["rope_theta"] = config["rope_theta"]
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rest = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    return {**rest, "rope_parameters": rope}


def _check_tensors(one: Checkpoint, other: Checkpoint) -> None:
    for holder, lacking in ((one, other), (other, one)):
        missing = [name for name in holder.tensors if name not in lacking.tensors]
        if missing:
            rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise FamilyError(
                f"tensor {shown(missing[0])}{rest} is in {_named(holder)}, but not in {_named(lacking)}; "
                "experts must have the same tensors"
            )
    for name, tensor in one.tensors.items():
        match = other.tensors[name]
        for what, a, b in (
            ("shape", list(tensor.shape), list(match.shape)),
            ("dtype", tensor.dtype, match.dtype),
        ):
            if a != b:
                raise FamilyError(
                    f"tensor {shown(name)} differs in {what}: {a} in {_named(one)}, {b} in {_named(other)}"
                )


def _fp32(name: str, coefficient: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(coefficient))
    if not np.isfinite(rounded):
        raise ConfigError(f"the weight of {name} is {coefficient}, beyond the range of fp32")
    return rounded


def _named(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name} ({checkpoint.source})"
