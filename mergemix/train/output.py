"""The trained checkpoint: the base's files with other weights, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergemix.checkpoints.checkpoint import FLOATING, Checkpoint, open_checkpoint
from mergemix.checkpoints.files import INDEX_NAME
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import read_range
from mergemix.checkpoints.writer import DirectoryWriter, index_json, shard_layout, side_files
from mergemix.errors import OutputError, TrainingError
from mergemix.serve.dtypes import TORCH_DTYPES

RECORD = "training.json"


def write_output(
    model: Any, state: Mapping[str, torch.Tensor], base: Checkpoint, out: Path, scratch: Path, record: Any
) -> None:
    """Write the weights `state` of `model` to the new directory `out`, as the base has them: names, types, shards.

    Configuration and tokenizer are the base's own files; `record` becomes training.json. Tensors that transformers does
    not load (layers for predicting several tokens) are copied from the base. scratch: a directory that is made
    and removed. Raises OutputError when it cannot be written, TrainingError when a weight is no number.
    """
    with _saved(model, state, base, scratch) as trained:
        sources = _sources(model, trained, base)
        shards = shard_layout(base)
        writer = DirectoryWriter(out)
        try:
            sides = {str(path.relative_to(base.root)): path.read_bytes() for path in side_files(base.root)}
            sides[RECORD] = json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"
            if len(shards) > 1:
                sides[INDEX_NAME] = index_json(shards, sum(tensor.nbytes for tensor in base.tensors.values()))
            writer.open(sum(map(len, sides.values())) + sum(shard.nbytes for shard in shards))
            for shard in shards:
                writer.allocate(shard.file, shard.nbytes, shard.nbytes - len(shard.header))
                for name, offset in shard.offsets.items():
                    writer.write(shard.file, offset, _converted(sources[name], base.tensors[name]))
                writer.write(shard.file, 0, shard.header)
                writer.finish(shard.file)
            for name, content in sides.items():
                writer.write(name, 0, content)
                writer.finish(name)
            writer.commit()
        finally:
            writer.discard()


@contextmanager
def _saved(
    model: Any, state: Mapping[str, torch.Tensor], base: Checkpoint, scratch: Path
) -> Iterator[Checkpoint]:
    """The weights as transformers saves them, which undoes what it converted when it loaded them."""
    shutil.rmtree(scratch, ignore_errors=True)
    widest = max((t.dtype for t in base.tensors.values() if t.dtype in FLOATING), key=_width)
    tied = _tied(model)
    try:
        cast = {
            name: value.to(TORCH_DTYPES[widest]) if value.is_floating_point() else value
            for name, value in state.items()
            if tied.get(name) not in state  # it is saved under the other name
        }
        try:
            model.save_pretrained(scratch, state_dict=cast)
        except Exception as error:  # safetensors has errors of its own, and the disk is what can go wrong
            raise OutputError(f"cannot write the trained weights to {scratch}: {error}") from error
        del cast
        yield open_checkpoint("trained", str(scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sources(model: Any, trained: Checkpoint, base: Checkpoint) -> dict[str, TensorInfo]:
    """For every tensor of the base the tensor that has its values now."""
    tied = _tied(model)
    unknown = sorted(set(trained.tensors) - set(base.tensors))
    if unknown:
        raise TrainingError(
            f"transformers saves a tensor {unknown[0]!r} that the base does not have, so the trained model could not "
            "be merged with it; use a base that was saved by transformers"
        )
    return {
        name: trained.tensors.get(name) or trained.tensors.get(tied.get(name, "")) or tensor
        for name, tensor in base.tensors.items()
    }


def _tied(model: Any) -> dict[str, str]:
    """Name of a weight -> name of the one that it is the same as."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def _converted(source: TensorInfo, target: TensorInfo) -> memoryview:
    """The bytes of `source` in the type of `target`."""
    raw = bytearray(read_range(source, 0, source.nbytes))
    if not raw or source.dtype not in FLOATING:
        return memoryview(raw)
    values = torch.frombuffer(raw, dtype=TORCH_DTYPES[source.dtype]).to(TORCH_DTYPES[target.dtype])
    if not bool(values.isfinite().all()):
        raise TrainingError(f"the trained tensor {target.name} holds NaN or Inf; lower the learning rate")
    data: memoryview = values.view(torch.uint8).numpy().data
    return data


def _width(dtype: str) -> int:
    return {"BF16": 0, "F16": 1, "F32": 2}[dtype]
