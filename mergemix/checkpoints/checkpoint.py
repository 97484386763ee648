"""A checkpoint directory, opened: every tensor's place, type and shape, and none of its bytes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.adapter_config import ADAPTER_CONFIG_NAME
from mergemix.checkpoints.files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    HubFile,
    check_unambiguous,
    is_prompt_file,
)
from mergemix.checkpoints.header import TensorInfo, read_header, read_hub_header
from mergemix.checkpoints.ranges import OpenFiles
from mergemix.checkpoints.strict_json import read_object, shown
from mergemix.errors import CheckpointError

SAMPLE_BYTES = 4096
HUB_REQUESTS = 16  # at the same time

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
    revision: the Hub commit (40 hex digits); None for a local directory.
    """

    name: str
    source: str
    root: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    revision: str | None


@dataclass(frozen=True)
class Location:
    """Where a checkpoint or an adapter is. root: the local directory; for a Hub id, of one commit's files.

    revision: the Hub commit (40 hex digits); None for a local directory. remote: the weight files that stay on
    the Hub and are read there; empty where `root` holds the weights.
    """

    root: Path
    revision: str | None
    remote: tuple[HubFile, ...] = ()


def open_checkpoint(name: str, source: str, *, download: bool = True) -> Checkpoint:
    """Open the checkpoint that a user calls `name`. source: a directory, or a Hub id `org/name[@revision]`.

    Reads config.json, the index and every shard's header, never a tensor byte. A Hub id is downloaded first;
    with `download` false its weights stay on the Hub, and the tensors' `file` says so.
    Raises CheckpointError when anything is missing, unreadable, damaged, or cannot be averaged (quantised, F64,
    complex).
    """
    return read_checkpoint(name, source, locate(name, source, download=download))


def locate(name: str, source: str, *, download: bool = True) -> Location:
    """The place of what a user calls `name`: the directory `source`, or the Hub id `source` after its download.

    Of a Hub id, weights are downloaded too, unless `download` is false; an adapter is downloaded always.
    Raises CheckpointError when there is no such directory or repository.
    """
    root = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    # os.path answers False, where Path raises, for a name that no file can have.
    if source and os.path.isdir(root):
        return Location(root, None)
    if source and os.path.exists(root):
        raise CheckpointError(
            f"{name}: {source} is a file; give the directory that holds config.json and *.safetensors"
        )
    if not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{name}: no directory {source!r}; give an existing directory or a Hub id org/name[@revision]"
        )
    from mergemix.checkpoints.hub import fetch

    return Location(*fetch(source, weights=download))


def read_checkpoint(name: str, source: str, location: Location) -> Checkpoint:
    """The checkpoint at `location`. Raises CheckpointError as `open_checkpoint`."""
    root = location.root
    try:
        config, tensors = _read(location)
    except OSError as error:  # of the directory itself: files are opened where it is known what they are
        raise CheckpointError(f"{name}: cannot read {error.filename or root}: {error.strerror}") from error
    return Checkpoint(name, source, root, tensors, config, location.revision)


def _read(location: Location) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """config.json and every tensor."""
    root = location.root
    config_path = root / CONFIG_NAME
    if not config_path.is_file():
        adapter = (root / ADAPTER_CONFIG_NAME).is_file()
        hint = (
            "it is a LoRA adapter: give it as an expert, and its base as the base"
            if adapter
            else "is it a Hugging Face model?"
        )
        raise CheckpointError(f"{root} has no config.json; {hint}")
    config = read_object(config_path)
    _refuse_quantised(root, config)
    tensors = _read_tensors(location)
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
    tensors = [tensor for _, tensor in sorted(checkpoint.tensors.items())]
    with closing(OpenFiles()) as files:
        for tensor, sample in zip(tensors, _samples(files, tensors), strict=True):
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape, tensor.nbytes]).encode())
            digest.update(sample)
    return digest.hexdigest()


def _read_tensors(location: Location) -> dict[str, TensorInfo]:
    """All tensors by name, as the index says, or of all files where there is none."""
    root = location.root
    files: dict[str, Path | HubFile] = {file.name: file for file in location.remote}
    if not files:
        files = {path.name: path for path in root.iterdir() if path.suffix == ".safetensors"}
    index_path = root / INDEX_NAME
    if index_path.is_file():
        return _read_indexed(root, index_path, files)
    tensors: dict[str, TensorInfo] = {}
    chosen = _unindexed_files(root, files)
    for file, header in zip(chosen, _read_headers([files[name] for name in chosen]), strict=True):
        for tensor in header:
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise CheckpointError(
                    f"{root} has no {INDEX_NAME}, and tensor {shown(tensor.name)} is in both "
                    f"{other.path.name} and {file}; remove the file that does not belong"
                )
    return tensors


def _read_headers(files: Sequence[Path | HubFile]) -> Iterator[list[TensorInfo]]:
    """The tensors of each file, in turn; files on the Hub are asked at the same time."""
    remote = [file for file in files if isinstance(file, HubFile)]
    if not remote:
        yield from (read_header(file) for file in files if isinstance(file, Path))
        return
    with ThreadPoolExecutor(HUB_REQUESTS) as pool:
        yield from pool.map(read_hub_header, remote)


def _unindexed_files(root: Path, files: Iterable[str]) -> list[str]:
    """The names of the files that hold the tensors, where no index says so."""
    names = sorted(name for name in files if not name.startswith("."))
    if not names:
        pickled = sorted(path.name for path in root.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        found = (
            f"only {pickled[0]}, which can run code when loaded: convert it"
            if pickled
            else "convert the model"
        )
        raise CheckpointError(
            f"{root} holds no *.safetensors file, {found} with save_pretrained(safe_serialization=True)"
        )
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    for name in names:
        if match := NUMBERED_SHARD.fullmatch(name):
            stem, _, count = match.groups()
            for number in range(1, int(count) + 1):
                shard = f"{stem}-{number:05d}-of-{count}.safetensors"
                if shard not in names:
                    raise CheckpointError(f"{root}: shard {shard!r} is missing; copy or download it again")
    return names


def _read_indexed(root: Path, index_path: Path, files: Mapping[str, Path | HubFile]) -> dict[str, TensorInfo]:
    """The tensors of the shards that the index names; index and shards must agree exactly."""
    weight_map = _read_weight_map(index_path)
    shards = sorted(set(weight_map.values()))
    present = {name for name, file in files.items() if isinstance(file, HubFile) or file.is_file()}
    check_unambiguous(str(root), shards, SINGLE_NAME in present)
    absent = next((shard for shard in shards if shard not in present), None)
    if absent is not None:
        raise CheckpointError(
            f"{root}: shard {shown(absent)} is missing, though {INDEX_NAME} names it; download it again"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard, header in zip(shards, _read_headers([files[shard] for shard in shards]), strict=True):
        for tensor in header:
            if weight_map.get(tensor.name) != shard:
                raise CheckpointError(
                    f"{root}: {shard} holds tensor {shown(tensor.name)}, but {INDEX_NAME} "
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


def _read_weight_map(index_path: Path) -> dict[str, str]:
    """The index's map from tensors to files of the same directory."""
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
    return weight_map


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


def _samples(files: OpenFiles, tensors: Sequence[TensorInfo]) -> Iterator[bytes]:
    """A part of each tensor, in turn; the Hub is asked for many at the same time."""

    def sample(tensor: TensorInfo) -> bytes:
        data = bytearray(min(tensor.nbytes, SAMPLE_BYTES))
        files.read_into(tensor, (tensor.nbytes - len(data)) // 2, memoryview(data))
        return bytes(data)

    if not any(isinstance(tensor.file, HubFile) for tensor in tensors):
        yield from map(sample, tensors)
        return
    with ThreadPoolExecutor(HUB_REQUESTS) as pool:
        yield from pool.map(sample, tensors)
