"""Checkpoints that can be averaged: one optional base and K experts that agree tensor by tensor.

An expert may be a LoRA adapter: then it stands for the base plus what the adapter adds to it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergemix.checkpoints.adapter import Adapter, LowRankDelta, is_adapter, open_adapter
from mergemix.checkpoints.adapter_fit import fit_adapter
from mergemix.checkpoints.checkpoint import Checkpoint, locate, open_checkpoint, read_checkpoint
from mergemix.checkpoints.files import FileIdentity, check_unchanged
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import CheckpointError, ConfigError, FamilyError
from mergemix.mixture import SUM_TOLERANCE, Mixture, tensor_groups

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


@dataclass(frozen=True, slots=True)
class Terms:
    """One tensor of a merge: the sum of coefficient * tensor over `dense`, plus scale * up @ down over `low_rank`.

    Each with the position of its owner in `Family.members`, in that order. Numbers are fp32 and not zero: what has no
    share is absent. dense holds at least one operand.
    """

    dense: tuple[tuple[int, TensorInfo, float], ...]
    low_rank: tuple[tuple[int, LowRankDelta, float], ...]


@dataclass(frozen=True)
class Family:
    """base: None when no mixture needs it. experts: K >= 1, in the user's order; adapters need a base."""

    base: Checkpoint | None
    experts: tuple[Checkpoint | Adapter, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @property
    def members(self) -> tuple[Checkpoint | Adapter, ...]:
        """Who is summed, in the order of summation: the base where there is one, then the experts."""
        return self.experts if self.base is None else (self.base, *self.experts)

    def terms(self, name: str, mixture: Mixture) -> Terms:
        """What tensor `name` of the mixture is the sum of.

        An adapter is the base plus a difference, so the weight of one that does not replace the whole tensor stays
        in the base: its coefficient is 1 - the sum of the others' weights (exactly 0, unless that is beyond
        rounding). Raises ConfigError as `coefficients`.
        """
        self.check_names(mixture)
        mixture = mixture.at(name)
        holders = self.holders(name)
        coefficients = self.coefficients(mixture, holders)
        dense = (
            (position, self.members[position].tensors[name], coefficients[position]) for position in holders
        )
        low_rank = (
            (position, delta, self.low_rank_scale(position, delta.scale, mixture))
            for position, delta in self.deltas(name)
        )
        return Terms(
            tuple(operand for operand in dense if operand[2] != 0.0),
            tuple(term for term in low_rank if term[2] != 0.0),
        )

    def holders(self, name: str) -> tuple[int, ...]:
        """Positions in `members` of those that have tensor `name` as a whole: all but adapters that do not bring it."""
        return tuple(position for position, member in enumerate(self.members) if name in member.tensors)

    def deltas(self, name: str) -> list[tuple[int, LowRankDelta]]:
        """What adapters add to tensor `name`, each with the position of its owner in `members`."""
        return [
            (position, member.deltas[name])
            for position, member in enumerate(self.members)
            if isinstance(member, Adapter) and name in member.deltas
        ]

    def coefficients(self, mixture: Mixture, holders: Sequence[int] | None = None) -> list[float]:
        """The coefficient of each of `members` as kernels use it, rounded to fp32; 0.0: it is not read.

        mixture: without groups. holders: of the tensor, who has it as a whole (see `holders`); by default all. Of the
        others the coefficient is 0.0, and the base has their weights.
        Raises ConfigError when the mixture is not over the experts, a coefficient is beyond fp32, or the weights
        need a base that is not there.
        """
        self.check_names(mixture)
        first = len(self.members) - len(self.experts)
        whole = [holders is None or position in holders for position in range(first, len(self.members))]
        weights = [weight * held for weight, held in zip(mixture.weights, whole, strict=True)]
        rounded = [_fp32(name, weight) for name, weight in zip(mixture.names, weights, strict=True)]
        rest = self._base_share(weights)
        return rounded if self.base is None else [rest, *rounded]

    def low_rank_scale(self, position: int, scale: float, mixture: Mixture) -> float:
        """What a factor product of the adapter at `position` in `members` is multiplied with, rounded to fp32.

        scale: of the delta. mixture: without groups. Raises ConfigError when it is beyond fp32.
        """
        expert = position - (len(self.members) - len(self.experts))
        return _fp32(self.names[expert], mixture.weights[expert] * scale)

    def check_unchanged(self) -> None:
        """Raise CheckpointError when a local file is not the one that was opened: scores would be of other weights."""
        for path, identity in {(t.path, t.file) for member in self.members for t in _stored(member)}:
            if not isinstance(identity, FileIdentity):
                continue
            try:
                with path.open("rb") as file:
                    check_unchanged(path, file.fileno(), identity)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def check_groups(self, mixture: Mixture) -> None:
        """Raise ConfigError for a layer group with a pattern that no tensor's name matches."""
        tensor_groups(mixture.patterns, tuple(self.template.tensors))

    def check_names(self, mixture: Mixture) -> None:
        """Raise ConfigError for a mixture that is not over the experts."""
        if mixture.names != self.names:
            raise ConfigError(
                f"the mixture is over {', '.join(mixture.names)}, but the experts are {', '.join(self.names)}"
            )

    def _base_share(self, weights: Sequence[float]) -> float:
        """The fp32 coefficient of the base beside whole experts of these weights."""
        rest = 1.0 - math.fsum(weights)
        if abs(rest) <= SUM_TOLERANCE:
            rest = 0.0
        if self.base is None and rest != 0.0:
            raise ConfigError(
                f"the weights sum to {1 - rest:.12g}, not 1, so the base has a share of {rest:g}: "
                "give --base, or weights that sum to 1"
            )
        return _fp32("the base", rest)

    @property
    def template(self) -> Checkpoint:
        """Whose config.json, tokenizer and shard layout are used: the base's, else the first expert's."""
        if self.base is not None:
            return self.base
        [first, *_] = self.experts
        assert isinstance(first, Checkpoint), "adapters need a base"
        return first


def open_family(base: str | None, experts: Mapping[str, str], *, download: bool = True) -> Family:
    """Open the base (None: no base) and the experts, and check that they can be averaged.

    base, experts' values: a directory or a Hub id `org/name[@revision]`; an expert's may hold a LoRA adapter.
    experts: by domain, in order. download: as for `open_checkpoint`.
    Raises ConfigError without experts, or where adapters have no base; CheckpointError on one that cannot be used;
    FamilyError where they disagree.
    """
    if not experts:
        raise ConfigError("no expert was given; give at least one as NAME=PATH")
    unnamed = [source for name, source in experts.items() if not name.strip()]
    if unnamed:
        raise ConfigError(f"the expert {unnamed[0]!r} has no name; give it as NAME=PATH")
    if base is not None and "base" in experts:
        raise ConfigError("an expert cannot be called 'base' beside --base; give it another name")
    family = Family(
        base=None if base is None else open_checkpoint("base", base, download=download),
        experts=tuple(_open_expert(name, source, download) for name, source in experts.items()),
    )
    check_family(family)
    return _fitted(family)


def is_adapter_source(name: str, source: str) -> bool:
    """Whether an expert, given as for `open_family`, is a LoRA adapter. Raises as it does, and downloads as it does."""
    return is_adapter(locate(name, source).root)


def _open_expert(name: str, source: str, download: bool) -> Checkpoint | Adapter:
    location = locate(name, source, download=download)
    if is_adapter(location.root):
        return open_adapter(name, source, location)
    return read_checkpoint(name, source, location)


def _fitted(family: Family) -> Family:
    """The family with its adapters fitted to its base. Raises ConfigError without one, FamilyError as fit_adapter."""
    adapters = [expert for expert in family.experts if isinstance(expert, Adapter)]
    if not adapters:
        return family
    base = family.base
    if base is None:
        raise ConfigError(
            f"{adapters[0].name} ({adapters[0].source}) is a LoRA adapter, which says only what it changes in its "
            "base: give the base, too (--base), the model that it was trained on"
        )
    experts = (fit_adapter(each, base) if isinstance(each, Adapter) else each for each in family.experts)
    return replace(family, experts=tuple(experts))


def check_family(family: Family) -> None:
    """Raise FamilyError unless all checkpoints have the same architecture, tensor names, dtypes and shapes.

    Of config.json, what both hold of the keys that change the forward pass must be equal. A key that only one
    holds is accepted: versions of transformers differ in which defaults they write down.
    The message names the first key or tensor that differs, both values and both checkpoints.
    """
    checkpoints = [member for member in family.members if isinstance(member, Checkpoint)]
    for first, other in ((checkpoints[0], other) for other in checkpoints[1:]):
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
    """The fp32 number nearest to `coefficient`."""
    try:
        return struct.unpack("<f", struct.pack("<f", coefficient))[0]
    except OverflowError:
        raise ConfigError(f"the weight of {name} is {coefficient}, beyond the range of fp32") from None


def _named(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name} ({checkpoint.source})"


def _stored(member: Checkpoint | Adapter) -> Iterator[TensorInfo]:
    """Every tensor of a member's files."""
    yield from member.tensors.values()
    if isinstance(member, Adapter):
        for delta in member.deltas.values():
            yield from (delta.down, delta.up)
