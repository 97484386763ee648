"""A LoRA adapter as PEFT saves it: what it adds to which tensors of its base, and none of its bytes.

A directory (github.com/huggingface/peft, "PEFT checkpoint format"): adapter_config.json, and
adapter_model.safetensors with keys base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r]; for
an embedding .lora_embedding_A [r, tokens] and .lora_embedding_B [width, r]; all else are whole tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.adapter_config import ADAPTER_CONFIG_NAME, MERGE_FIRST, LoraSettings, read_settings
from mergemix.checkpoints.checkpoint import FLOATING, Checkpoint, Location
from mergemix.checkpoints.checkpoint import fingerprint as checkpoint_fingerprint
from mergemix.checkpoints.files import CONFIG_NAME
from mergemix.checkpoints.header import TensorInfo, read_header
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import CheckpointError

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
# Parameters of other methods, and of parts of LoRA that adapter_config.json did not tell.
FOREIGN = re.compile(r"(^|\.)(lora_|token_adapter(\.|$))")


@dataclass(frozen=True, slots=True)
class LowRankDelta:
    """What an adapter adds to one tensor: scale * up @ down, transposed where `transposed`.

    down: lora_A [r, in], or lora_embedding_A [r, tokens]. up: lora_B [out, r], or lora_embedding_B [width, r].
    scale: alpha / r, or alpha / sqrt(r). transposed: the tensor is stored as [in, out], as embeddings are, and
    linear layers with fan_in_fan_out.
    """

    down: TensorInfo
    up: TensorInfo
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that it changes."""
        rows, cols = self.up.shape[0], self.down.shape[1]
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def is_embedding(self) -> bool:
        return self.down.name.endswith("lora_embedding_A")


@dataclass(frozen=True)
class Adapter:
    """An expert that is given as the difference to the base. name, source, root, revision: as of a Checkpoint.

    deltas: by the name of the base's tensor, in file order. tensors: whole tensors that the adapter brings (trained
    biases, modules_to_save, embeddings), which replace the base's of that name; a delta may come on top.
    config: the contents of adapter_config.json.
    """

    name: str
    source: str
    root: Path
    config: Mapping[str, Any]
    revision: str | None
    deltas: Mapping[str, LowRankDelta]
    tensors: Mapping[str, TensorInfo]


def is_adapter(root: Path) -> bool:
    """Whether the directory holds an adapter, and no whole model beside it.

    Some trainers put the base's config.json beside the adapter: weights decide.
    """
    if not (root / ADAPTER_CONFIG_NAME).is_file():
        return False
    names = [path.name for path in root.iterdir() if path.suffix == ".safetensors"]
    return not (root / CONFIG_NAME).is_file() or names == [WEIGHTS_NAME]


def open_adapter(name: str, source: str, location: Location) -> Adapter:
    """Open the adapter at `location` that a user calls `name`, and has given as `source`.

    Reads adapter_config.json and the header of adapter_model.safetensors. Names are those that PEFT derived from
    the modules, and `transposed` is as adapter_config.json says: both still have to be fitted to a base.
    Raises CheckpointError when anything is missing, damaged, or more than base plus scaled product of two factors.
    """
    root = location.root
    try:
        config, settings = read_settings(root / ADAPTER_CONFIG_NAME)
        path = root / WEIGHTS_NAME
        if not path.is_file():
            raise CheckpointError(_missing(root))
        factors, tensors = _sorted_out(read_header(path))
        fan_in_fan_out = bool(config.get("fan_in_fan_out"))
        deltas = {
            f"{module}.weight": _delta(module, pair, settings, fan_in_fan_out)
            for module, pair in factors.items()
        }
    except OSError as error:
        raise CheckpointError(f"{name}: cannot read {error.filename or root}: {error.strerror}") from error
    if not deltas and not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Adapter(name, source, root, config, location.revision, deltas, tensors)


def fingerprint(member: Checkpoint | Adapter) -> str:
    """64 hex digits that identify the contents of a checkpoint (as its own fingerprint) or an adapter.

    Of an adapter: adapter_config.json but for the place of the base, and every tensor's name, dtype, shape and
    sample. Raises CheckpointError when a file cannot be read.
    """
    if isinstance(member, Checkpoint):
        return checkpoint_fingerprint(member)
    stored = [tensor for delta in member.deltas.values() for tensor in (delta.down, delta.up)]
    stored += member.tensors.values()
    config = {key: value for key, value in member.config.items() if key != "base_model_name_or_path"}
    tensors = {tensor.name: tensor for tensor in stored}
    return checkpoint_fingerprint(
        Checkpoint(member.name, member.source, member.root, tensors, config, member.revision)
    )


def _missing(root: Path) -> str:
    pickled = (root / PICKLED_NAME).is_file()
    found = f"only {PICKLED_NAME}, which can run code when loaded" if pickled else "no other weights either"
    return (
        f"{root} holds no {WEIGHTS_NAME}, {found}: load the adapter where it was made and save it again with "
        "save_pretrained(safe_serialization=True)"
    )


def _sorted_out(
    stored: Iterable[TensorInfo],
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """The factors by module and then by "A" or "B", and the whole tensors by name."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for tensor in stored:
        key = tensor.name.removeprefix(PREFIX)
        match = FACTOR.fullmatch(key)
        inner = match[1] if match else key
        if key == tensor.name or FOREIGN.search(inner) or (match and ".base_layer" in inner):
            raise CheckpointError(
                f"{tensor.path}: tensor {shown(tensor.name)} is neither a factor of LoRA ({PREFIX}<module>."
                f"lora_A.weight ...) nor a tensor of the base: {MERGE_FIRST}"
            )
        if tensor.dtype not in FLOATING:
            raise CheckpointError(
                f"{tensor.path}: tensor {shown(tensor.name)} is {tensor.dtype}; only "
                f"{', '.join(sorted(FLOATING))} can be averaged"
            )
        # The layer that PEFT wraps is called base_layer inside the wrapper.
        group, name = (
            (factors.setdefault(inner, {}), match[2] or match[3])
            if match
            else (tensors, inner.replace(".base_layer.", "."))
        )
        other = group.setdefault(name, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"{tensor.path}: {shown(other.name)} and {shown(tensor.name)} are the same part of one module; "
                "save the adapter again"
            )
    return factors, tensors


def _delta(
    module: str, factors: Mapping[str, TensorInfo], settings: LoraSettings, fan_in_fan_out: bool
) -> LowRankDelta:
    """The factors of one module, which must be a pair and have the rank that the settings say."""
    first = next(iter(factors.values()))
    where = f"{first.path}: module {shown(module)}"
    if len(factors) < 2:
        lacking = "B" if "A" in factors else "A"
        raise CheckpointError(
            f"{where} has {shown(first.name)}, but no lora_{lacking}; save the adapter again"
        )
    down, up = factors["A"], factors["B"]
    for factor in (down, up):
        if len(factor.shape) != 2 or 0 in factor.shape:
            kind = (
                f"it belongs to a convolution or a fused parameter: {MERGE_FIRST}"
                if len(factor.shape) > 2
                else "it was saved before DeepSpeed or FSDP gathered its shards: save the adapter again"
            )
            raise CheckpointError(
                f"{where}: {shown(factor.name)} must be a matrix, but has shape {list(factor.shape)}; {kind}"
            )
    rank = settings.rank_of(module)
    if not down.shape[0] == up.shape[1] == rank:
        raise CheckpointError(
            f"{where}: {ADAPTER_CONFIG_NAME} says that its rank is {rank}, but lora_A has shape {list(down.shape)} "
            f"[rank, in] and lora_B {list(up.shape)} [out, rank]"
        )
    is_embedding = not down.name.endswith(".weight")
    if is_embedding == up.name.endswith(".weight"):
        raise CheckpointError(f"{where}: {shown(down.name)} and {shown(up.name)} are not a pair")
    return LowRankDelta(down, up, settings.scale_of(module, rank), transposed=is_embedding or fan_in_fan_out)
