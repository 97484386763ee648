"""Fitting an adapter to the base that a user gave: every name, shape and dtype must agree, or it is another base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.checkpoints.adapter import Adapter, LowRankDelta
from mergemix.checkpoints.adapter_config import ADAPTER_CONFIG_NAME, MERGE_FIRST
from mergemix.checkpoints.checkpoint import FLOATING, HUB_ID, SAMPLE_BYTES, Checkpoint, open_checkpoint
from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.header import DTYPE_BITS, TensorInfo
from mergemix.checkpoints.ranges import read_range
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import CheckpointError, FamilyError


def fit_adapter(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter with the names of the base's tensors, and `transposed` as they are stored.

    Raises FamilyError naming tensor and both shapes (or dtypes) when the adapter was not trained on this base, names
    another one in its configuration, or cannot be expressed in the base's tensors.
    """
    _check_base_named(adapter, base)
    names = _names(adapter, base)
    deltas = {names[name]: delta for name, delta in adapter.deltas.items() if name in names}
    tensors = {names[name]: tensor for name, tensor in adapter.tensors.items() if name in names}
    if len(set(names.values())) < len(names):
        raise FamilyError(
            f"{_named(adapter)} changes one tensor of {_named(base)} under two names: {MERGE_FIRST}"
        )
    for name in {**deltas, **tensors}:
        _check_untied(adapter, base, base.tensors[name])
    for name, tensor in tensors.items():
        _check_whole(adapter, base, tensor, base.tensors[name])
    return replace(adapter, deltas=_oriented(adapter, base, deltas), tensors=tensors)


def _names(adapter: Adapter, base: Checkpoint) -> dict[str, str]:
    """From the names that PEFT derives from modules to those of the base's tensors.

    transformers leaves out, or puts before all names, the part that a model with a head has and the one without
    has not ("model.", "transformer."): so may the base.
    """
    longer: dict[str, str] = {}
    for name in base.tensors:
        inner = name.partition(".")[2]
        longer[inner] = "" if inner in longer else name
    names = {}
    for name in {**adapter.deltas, **adapter.tensors}:
        candidates = (name, name.partition(".")[2], longer.get(name))
        found = next((each for each in candidates if each and each in base.tensors), None)
        if found is not None:
            names[name] = found
        elif not _is_tied_copy(adapter, base, name):
            raise FamilyError(_absent(adapter, base, name))
    return names


def _is_tied_copy(adapter: Adapter, base: Checkpoint, name: str) -> bool:
    """Whether `name` is a tied output head, of which PEFT stores the change of the embeddings a second time."""
    if not adapter.config.get("ensure_weight_tying") or not _is_tied(base):
        return False
    delta, tensor = adapter.deltas.get(name), adapter.tensors.get(name)
    others = [each for key, each in adapter.tensors.items() if key != name]
    return (
        delta is None
        or any(_same_product(delta, each) for each in adapter.deltas.values() if each.is_embedding)
    ) and (tensor is None or any(_same_tensor(tensor, each) for each in others))


def _same_product(head: LowRankDelta, embedding: LowRankDelta) -> bool:
    """Whether two deltas are one: the head's up is the embedding's down, transposed, and the other way round."""
    if head.scale != embedding.scale:
        return False
    for one, other in ((head.up, embedding.down), (head.down, embedding.up)):
        if one.dtype != other.dtype or one.shape != other.shape[::-1]:
            return False
        bits = f"u{DTYPE_BITS[one.dtype] // 8}"
        a, b = (np.frombuffer(read_range(each, 0, each.nbytes), bits) for each in (one, other))
        if not np.array_equal(a.reshape(one.shape), b.reshape(other.shape).T):
            return False
    return True


def _absent(adapter: Adapter, base: Checkpoint, name: str) -> str:
    told = f"{_named(adapter)} changes tensor {shown(name)}, which {_named(base)} does not hold"
    delta = adapter.deltas.get(name)
    shape = adapter.tensors[name].shape if delta is None else delta.shape
    if _is_tied(base) and _vocabulary(base) in shape:
        return (
            f"{told}: its output head is tied to its embeddings, and the adapter trained a head of its own; untie a "
            "copy of the base (its head a copy of its embeddings, tie_word_embeddings false) and give that"
        )
    return f"{told}: the adapter was trained on another base, or under other names; give its own base"


def _check_untied(adapter: Adapter, base: Checkpoint, tensor: TensorInfo) -> None:
    """Refuse a change of embeddings that are the output head too, since PEFT applies it to one of the two only."""
    is_embedding = any(tensor.name == each.name for each in _embeddings(base))
    if is_embedding and _is_tied(base) and not adapter.config.get("ensure_weight_tying"):
        raise FamilyError(
            f"{_named(adapter)} changes tensor {shown(tensor.name)}, which in {_named(base)} is input embeddings and "
            "output head at once, while the adapter was trained with ensure_weight_tying false, as one of them: "
            "untie a copy of the base (its head a copy of its embeddings, tie_word_embeddings false) and give that"
        )


def _is_tied(base: Checkpoint) -> bool:
    """Whether the output head is the input embeddings: as config.json says, else as there is one such tensor or two.

    transformers 4 does not write down what is the default of an architecture.
    """
    told = base.config.get("tie_word_embeddings", _text_config(base).get("tie_word_embeddings"))
    if told is not None:
        return bool(told)
    return len(_embeddings(base)) == 1


def _embeddings(base: Checkpoint) -> list[TensorInfo]:
    """Matrices of one row per token: embeddings and output head. A layer's may have as many rows by chance."""
    rows = _vocabulary(base)
    found = [each for each in base.tensors.values() if len(each.shape) == 2 and each.shape[0] == rows]
    unnumbered = [each for each in found if not any(part.isdigit() for part in each.name.split("."))]
    return unnumbered or found


def _vocabulary(base: Checkpoint) -> object:
    """How many tokens the model has, None where config.json does not say."""
    return base.config.get("vocab_size", _text_config(base).get("vocab_size"))


def _text_config(base: Checkpoint) -> Mapping[str, Any]:
    part = base.config.get("text_config")
    return part if isinstance(part, dict) else {}


def _check_whole(adapter: Adapter, base: Checkpoint, tensor: TensorInfo, replaced: TensorInfo) -> None:
    """A tensor that replaces one of the base's has its shape, and is floating point or not as that is.

    Training in mixed precision leaves whole tensors in fp32 beside a bf16 base: the merge rounds them first.
    """
    where = f"tensor {shown(replaced.name)}"
    if tensor.shape != replaced.shape:
        raise FamilyError(
            f"{where} differs in shape: {list(tensor.shape)} in {_named(adapter)}, {list(replaced.shape)} in "
            f"{_named(base)}; the adapter was trained on another base, or with a resized vocabulary"
        )
    if tensor.dtype != replaced.dtype and not {tensor.dtype, replaced.dtype} <= FLOATING:
        raise FamilyError(
            f"{where} differs in dtype: {_named(adapter)} holds all of it as {tensor.dtype}, {_named(base)} as "
            f"{replaced.dtype}; convert this tensor of {tensor.path.name} to the base's dtype, or give a base in "
            f"{tensor.dtype}"
        )


def _oriented(
    adapter: Adapter, base: Checkpoint, deltas: Mapping[str, LowRankDelta]
) -> dict[str, LowRankDelta]:
    """The deltas as they are to be added to the base's tensors: transposed where these are stored as [in, out].

    Shapes decide. Square ones are taken to be stored as the others are, and where all are square as fan_in_fan_out
    says, which PEFT sets to what holds for the last module.
    """
    for name, delta in deltas.items():
        _check_matrix(adapter, base, delta, base.tensors[name])
    linear = {name: delta for name, delta in deltas.items() if not delta.is_embedding}
    flips = {name: _plain_shape(delta) != base.tensors[name].shape for name, delta in linear.items()}
    square = [name for name, delta in linear.items() if len(set(_plain_shape(delta))) == 1]
    told = {flips[name] for name in linear if name not in square}
    if square and len(told) > 1:
        raise FamilyError(
            f"{_named(adapter)} changes linear layers that {_named(base)} stores as [in, out] and others that it "
            f"stores as [out, in], and of the square {shown(square[0])} it cannot be told: {MERGE_FIRST}"
        )
    flips |= dict.fromkeys(square, told.pop() if told else bool(adapter.config.get("fan_in_fan_out")))
    return {name: replace(delta, transposed=flips.get(name, True)) for name, delta in deltas.items()}


def _check_matrix(adapter: Adapter, base: Checkpoint, delta: LowRankDelta, tensor: TensorInfo) -> None:
    """The product of the factors fits the base's tensor, one way or the other."""
    if tensor.dtype not in FLOATING:
        raise FamilyError(
            f"{_named(adapter)} changes tensor {shown(tensor.name)}, which is {tensor.dtype} in {_named(base)} and "
            "cannot be averaged; the adapter was trained on another base"
        )
    plain = _plain_shape(delta)
    fits = [plain[::-1]] if delta.is_embedding else [plain, plain[::-1]]
    if tensor.shape not in fits:
        raise FamilyError(
            f"{_named(adapter)} changes tensor {shown(tensor.name)} by a matrix of shape {list(fits[0])}, but in "
            f"{_named(base)} it has shape {list(tensor.shape)}; the adapter was trained on another base"
        )


def _plain_shape(delta: LowRankDelta) -> tuple[int, int]:
    """[out, in], of up @ down."""
    return delta.up.shape[0], delta.down.shape[1]


def _check_base_named(adapter: Adapter, base: Checkpoint) -> None:
    """The base that the adapter's configuration names must not be known to be another one than `base`."""
    named = adapter.config.get("base_model_name_or_path")
    if not named or not _is_other(named, base):
        return
    raise FamilyError(
        f"{_named(adapter)} was trained on {shown(named)}, as its {ADAPTER_CONFIG_NAME} says, but the base given is "
        f"{base.source}; give the base that it was trained on, or, where yours holds the same weights, change "
        f"base_model_name_or_path in a copy of the adapter"
    )


def _is_other(named: str, base: Checkpoint) -> bool:
    """Whether `named` is known to be another model than `base`: another repository, or a directory of other weights.

    Nothing is known of a directory that is gone, unreadable or quantised.
    """
    root = Path(os.path.expanduser(named))
    if os.path.isdir(root):
        if os.path.samefile(root, base.root) or any(
            isinstance(t.file, HubFile) for t in base.tensors.values()
        ):
            return False
        try:
            return not _same_weights(open_checkpoint("base", named), base)
        except CheckpointError:
            return False
    is_local = os.path.isdir(os.path.expanduser(base.source))
    repositories = [each.partition("@")[0].lower() for each in (named, base.source)]
    return not is_local and HUB_ID.fullmatch(named) is not None and repositories[0] != repositories[1]


def _same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether names, shapes, dtypes and a sample of every tensor are the same."""
    return one.tensors.keys() == other.tensors.keys() and all(
        _same_tensor(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


def _same_tensor(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and _sample(one) == _sample(other)


def _sample(tensor: TensorInfo) -> bytes:
    """Up to SAMPLE_BYTES from the middle of a tensor."""
    size = min(tensor.nbytes, SAMPLE_BYTES)
    return read_range(tensor, (tensor.nbytes - size) // 2, size)


def _named(member: Adapter | Checkpoint) -> str:
    return f"{member.name} ({member.source})"
