"""A checkpoint directory, opened: every tensor's place, type and shape, and none of its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    check_unambiguous,
    check_unchanged,
    is_prompt_file,
)
from mergemix.checkpoints.header import TensorInfo, read_header
from mergemix.checkpoints.strict_json import read_object, shown
from mergemix.errors import CheckpointError

SAMPLE_BYTES = 4096

FLOATING = frozenset({"BF16", "F16", "F32"})  # averaged
COPIED = frozenset(
    {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}
)  # taken from the first operand
QUANTISED = frozenset(
    {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
QUANTISED_KEYS = ("quantization_config", "compression_config")
QUANTISED_FILES = ("quantize_config.json", "hf_quant_config.json")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
NUMBERED_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """name: "base" or the expert's. source: what the user wrote. root: the local directory.

    tensors: by name, in file order (shard name, then offset). config: the contents of config.json.
    revision: the Hub commit (40 hex digits) that was downloaded; None for a local directory.
    """

    name: str
    source: str
    root: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    revision: str | None


def open_checkpoint(name: str, source: str) -> Checkpoint:
    """Open the checkpoint that a user calls `name`. source: a directory, or a Hub id `org/name[@revision]`.

    Reads config.json, the index and every shard's header, never a tensor byte. A Hub id is downloaded first.
    Raises CheckpointError when anything is missing, unreadable, damaged, or cannot be averaged (quantised, F64,
    complex).
    """
    root, revision = _locate(name, source)
    try:
        config, tensors = _read(root)
    except OSError as error:  # of the directory itself: files are opened where it is known what they are
        raise CheckpointError(f"{name}: cannot read {error.filename or root}: {error.strerror}") from error
    return Checkpoint(name, source, root, tensors, config, revision)


def _read(root: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """config.json and every tensor of the directory."""
    config_path = root / CONFIG_NAME
    if not config_path.is_file():
        adapter = (root / "adapter_config.json").is_file()
        hint = (
            "it is a LoRA adapter: merge it into its base first" if adapter else "is it a Hugging Face model?"
        )
        raise CheckpointError(f"{root} has no config.json; {hint}")
    config = read_object(config_path)
    _refuse_quantised(root, config)
    tensors = _read_tensors(root)
    if not tensors:
        raise CheckpointError(f"{root} holds no tensors: its safetensors files are empty")
    for tensor in tensors.values():
        _check_dtype(tensor)
    return config, tensors


def fingerprint(checkpoint: Checkpoint) -> str:
    """64 hex digits that identify a checkpoint's contents, whatever its path, times or division into shards.

    Covers config.json, the tokenizer's files, generation_config.json (which ends answers), every tensor's name,
    dtype and shape, and up to 4 KiB from the middle of each: it tells experts apart, and is no checksum of them.
    Raises CheckpointError when a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    try:
        for path in sorted(checkpoint.root.iterdir()):
            if is_prompt_file(path.name) and path.is_file():
                contents = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(json.dumps([path.name, contents]).encode())
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape, tensor.nbytes]).encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _locate(name: str, source: str) -> tuple[Path, str | None]:
    """The local directory of `source`, and the commit that was downloaded where it is a Hub id."""
    root = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    # os.path answers False, where Path raises, for a name that no file can have.
    if source and os.path.isdir(root):
        return root, None
    if source and os.path.exists(root):
        raise CheckpointError(
            f"{name}: {source} is a file; give the directory that holds config.json and *.safetensors"
        )
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{name}: no directory {source!r}; give an existing directory or a Hub id org/name[@revision]"
        )
    from mergemix.checkpoints.hub import download

    return download(source)


def _read_tensors(root: Path) -> dict[str, TensorInfo]:
    """All tensors of the directory by name, as its index says, or of its files where it has none."""
    index_path = root / INDEX_NAME
    if index_path.is_file():
        return _read_indexed(root, index_path)
    tensors: dict[str, TensorInfo] = {}
    for path in _unindexed_files(root):
        for tensor in read_header(path):
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{root} has no {INDEX_NAME}, and tensor {shown(tensor.name)} is in both "
                    f"{other.path.name} and {path.name}; remove the file that does not belong"
                )
    return tensors


def _unindexed_files(root: Path) -> list[Path]:
    files = sorted(
        path for path in root.iterdir() if path.suffix == ".safetensors" and not path.name.startswith(".")
    )
    if not files:
        pickled = sorted(path.name for path in root.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        found = (
            f"only {pickled[0]}, which can run code when loaded: convert it"
            if pickled
            else "convert the model"
        )
        raise CheckpointError(
            f"{root} holds no *.safetensors file, {found} with save_pretrained(safe_serialization=True)"
        )
    if (root / SINGLE_NAME) in files:
        return [root / SINGLE_NAME]
    names = {path.name for path in files}
    for name in sorted(names):
        if match := NUMBERED_SHARD.fullmatch(name):
            stem, _, count = match.groups()
            for number in range(1, int(count) + 1):
                shard = f"{stem}-{number:05d}-of-{count}.safetensors"
                if shard not in names:
                    raise CheckpointError(f"{root}: shard {shard!r} is missing; copy or download it again")
    return files


def _read_indexed(root: Path, index_path: Path) -> dict[str, TensorInfo]:
    """The tensors of the shards that the index names; index and shards must agree exactly."""
    weight_map = read_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map must map tensor names to files, but is {shown(weight_map)}"
        )
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not re.search(r"[/\\\0]", file)
        if not plain:
            raise CheckpointError(
                f"{index_path}: tensor {shown(name)} must be mapped to the name of a .safetensors file "
                f"in the same directory, but is mapped to {shown(file)}"
            )
    files = sorted(set(weight_map.values()))
    check_unambiguous(str(root), files, (root / SINGLE_NAME).is_file())
    absent = next((file for file in files if not os.path.isfile(root / file)), None)
    if absent is not None:
        raise CheckpointError(
            f"{root}: shard {shown(absent)} is missing, though {INDEX_NAME} names it; download it again"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for tensor in read_header(root / file):
            if weight_map.get(tensor.name) != file:
                raise CheckpointError(
                    f"{root}: {file} holds tensor {shown(tensor.name)}, but {INDEX_NAME} "
                    f"maps it to {shown(weight_map.get(tensor.name))}"
                )
            tensors[tensor.name] = tensor
    missing = next((name for name in weight_map if name not in tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"{root}: {INDEX_NAME} says that tensor {shown(missing)} is in {weight_map[missing]}, "
            "but that file does not hold it"
        )
    return tensors


def _refuse_quantised(root: Path, config: Mapping[str, Any]) -> None:
    # Multimodal models keep the language model's part under a key of its own (text_config ...).
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in QUANTISED_KEYS:
            if part.get(key):
                raise CheckpointError(_quantised(str(root), f"its config.json has {key} {shown(part[key])}"))
    for file in QUANTISED_FILES:
        if (root / file).exists():
            raise CheckpointError(_quantised(str(root), f"it has {file}"))


def _check_dtype(tensor: TensorInfo) -> None:
    if tensor.dtype in FLOATING or tensor.dtype in COPIED:
        return
    where = f"{tensor.path}: tensor {shown(tensor.name)}"
    if tensor.dtype in QUANTISED:
        raise CheckpointError(_quantised(where, f"its dtype is {tensor.dtype}"))
    raise CheckpointError(
        f"{where} is {tensor.dtype}; merges are computed in fp32, so only {', '.join(sorted(FLOATING))} "
        "are averaged and integers copied: convert the checkpoint first"
    )


def _quantised(where: str, evidence: str) -> str:
    return (
        f"{where} is quantised ({evidence}); codes and scales of different checkpoints cannot be averaged: "
        "give the original bf16, fp16 or fp32 weights"
    )


def _sample(tensor: TensorInfo) -> bytes:
    """Up to SAMPLE_BYTES from the middle of a tensor."""
    size = min(tensor.nbytes, SAMPLE_BYTES)
    try:
        with tensor.path.open("rb") as file:
            check_unchanged(tensor.path, file.fileno(), tensor.file)
            file.seek(tensor.offset + (tensor.nbytes - size) // 2)
            sample = file.read(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {tensor.path}: {error.strerror}") from error
    if len(sample) < size:
        raise CheckpointError(
            f"{tensor.path} was truncated while it was read: tensor {shown(tensor.name)} is not whole"
        )
    return sample
