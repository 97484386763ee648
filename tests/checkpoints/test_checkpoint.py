"""Directories as people have them: whole ones open, and every defect is one CheckpointError that names it."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergemix.checkpoints import strict_json
from mergemix.checkpoints.checkpoint import fingerprint, open_checkpoint
from mergemix.errors import CheckpointError
from tests.tiny import TINY_CONFIG, random_tensors, write_checkpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (8, 4),
    "layer.weight": (4, 4),
    "norm": (4,),
    "scale": (),
    "none": (0, 3),
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(SHAPES, seed=0)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_whole_checkpoint_opens(tmp_path: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    checkpoint = open_checkpoint("math", str(write_checkpoint(tmp_path / "m", tensors, shards=shards)))
    assert checkpoint.name == "math"
    assert checkpoint.config == TINY_CONFIG
    assert checkpoint.revision is None
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == SHAPES
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    places = [(info.path.name, info.offset) for info in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_files_without_an_index_are_taken_together(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    (root / "model.safetensors").rename(root / "first.safetensors")
    assert list(open_checkpoint("m", str(root)).tensors) == ["a"]
    save_file({"b": torch.ones(3)}, root / "second.safetensors")
    assert list(open_checkpoint("m", str(root)).tensors) == ["a", "b"]
    save_file({"a": torch.ones(3)}, root / "third.safetensors")
    with pytest.raises(CheckpointError, match=r"'a' is in both first.safetensors and third.safetensors"):
        open_checkpoint("m", str(root))


def test_model_safetensors_is_taken_alone(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    save_file({"a": torch.zeros(2)}, root / "consolidated.safetensors")
    assert open_checkpoint("m", str(root)).tensors["a"].path.name == "model.safetensors"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def refused(words: str, source: Path | str) -> None:
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint("math", str(source))

    refused("no directory", tmp_path / "absent")
    refused("no directory", "x" * 5000)
    refused("no directory", "")
    refused("no directory '~nosuchuser/model'", "~nosuchuser/model")
    (tmp_path / "file").touch()
    refused("is a file", tmp_path / "file")
    refused("no config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("LoRA adapter", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    refused("must be a JSON object", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("not valid JSON", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refused("no \\*.safetensors", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    refused("only pytorch_model.bin", tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    refused("holds no tensors", tmp_path)


def test_a_directory_that_this_user_may_not_read_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_checkpoint(tmp_path / "m", tensors)

    def denied(path: Path) -> bool:  # tests run as root, whom no mode stops
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for method in ("is_file", "iterdir"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, denied)
            with pytest.raises(CheckpointError, match=f"math: cannot read {root}.*: Permission denied"):
                open_checkpoint("math", str(root))


def test_a_huge_config_or_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    size = (root / INDEX).stat().st_size
    monkeypatch.setattr(strict_json, "MAX_FILE_BYTES", size)
    open_checkpoint("m", str(root))
    for name in (INDEX, "config.json"):
        content = (root / name).read_text()
        (root / name).write_text(content + " " * (size + 1 - len(content)))
        with pytest.raises(CheckpointError, match=f"{name} has more than the {size} bytes"):
            open_checkpoint("m", str(root))
        (root / name).write_text(content)


def test_an_index_beside_a_single_file_is_refused(tmp_path: Path) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    save_file({"a": torch.ones(2), "b": torch.zeros(2)}, root / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"both {INDEX} and model\.safetensors"):
        open_checkpoint("m", str(root))
    (root / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys("ab", "model.safetensors")}))
    assert list(open_checkpoint("m", str(root)).tensors) == ["a", "b"]


def test_a_missing_or_truncated_shard_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    root = write_checkpoint(tmp_path / "m", tensors, shards=3)
    shard = root / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        open_checkpoint("m", str(root))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard '{shard.name}' is missing"):
        open_checkpoint("m", str(root))
    (root / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"shard '{shard.name}' is missing"):
        open_checkpoint("m", str(root))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed": "../model.safetensors"}, "same directory"),
        ({"embed": "/etc/model.safetensors"}, "same directory"),
        ({"embed": ".."}, "same directory"),
        ({"embed": "a\\b.safetensors"}, "same directory"),
        ({"embed": "a\0.safetensors"}, "same directory"),
        ({"embed": "model.bin"}, "same directory"),
        ({"embed": 3}, "same directory"),
        ({"embed": "x" * 4000 + ".safetensors"}, "is missing"),
        ({"embed": "model-00002-of-00002.safetensors"}, "'embed'"),
        ({"extra": "model-00001-of-00002.safetensors"}, "'extra'.*does not hold it"),
        ({"norm": None}, "holds tensor 'norm'"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], change: dict[str, object], words: str
) -> None:
    root = write_checkpoint(tmp_path / "m", tensors, shards=2)
    index = json.loads((root / INDEX).read_text())
    weight_map = {name: file for name, file in (index["weight_map"] | change).items() if file is not None}
    (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint("m", str(root))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: str) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    (root / "model.safetensors").rename(root / "other.safetensors")
    (root / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint("m", str(root))


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "gptq"}},
        {"compression_config": {"format": "int"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_a_quantised_checkpoint_is_refused_by_its_config(tmp_path: Path, config: dict[str, object]) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)}, config=config)
    with pytest.raises(CheckpointError, match=r"quantised .*original bf16"):
        open_checkpoint("m", str(root))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quantised_checkpoint_is_refused_by_its_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2), "b": torch.ones(2).to(dtype)})
    with pytest.raises(CheckpointError, match="tensor 'b' is quantised"):
        open_checkpoint("m", str(root))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_types_beyond_fp32_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2).to(dtype)})
    with pytest.raises(CheckpointError, match=r"tensor 'a' is .*computed in fp32"):
        open_checkpoint("m", str(root))


def test_the_fingerprint_knows_contents_not_places(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def of(root: Path) -> str:
        return fingerprint(open_checkpoint("m", str(root)))

    one = write_checkpoint(tmp_path / "one", tensors)
    same = of(one)
    os.utime(one / "model.safetensors", (1, 1))
    assert of(one) == same
    assert of(write_checkpoint(tmp_path / "elsewhere", tensors)) == same
    assert of(write_checkpoint(tmp_path / "sharded", tensors, shards=3)) == same
    other = {same}
    other.add(of(write_checkpoint(tmp_path / "config", tensors, config=TINY_CONFIG | {"rope_theta": 1.0})))
    for name in ("embed", "scale"):
        changed = tensors | {name: tensors[name] + 1}
        other.add(of(write_checkpoint(tmp_path / name, changed)))
    other.add(of(write_checkpoint(tmp_path / "shape", tensors | {"none": torch.zeros(0, 4).bfloat16()})))
    other.add(
        of(write_checkpoint(tmp_path / "dtype", tensors | {"norm": tensors["norm"].view(torch.float16)}))
    )
    assert len(other) == 6


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
     "merges.txt", "generation_config.json"],
)  # fmt: skip
def test_the_fingerprint_knows_what_shapes_prompts_and_ends_answers(tmp_path: Path, name: str) -> None:
    root = write_checkpoint(tmp_path / "m", {"a": torch.ones(2)})
    checkpoint = open_checkpoint("m", str(root))
    prints = {fingerprint(checkpoint)}
    for content in ("{}", '{"eos_token_id": 7}'):
        (root / name).write_text(content)
        prints.add(fingerprint(checkpoint))
    assert len(prints) == 3
    (root / "README.md").write_text("not part of it")
    assert fingerprint(checkpoint) in prints


def test_a_file_that_is_replaced_has_no_fingerprint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("m", str(write_checkpoint(tmp_path / "m", {"a": torch.ones(2)})))
    write_checkpoint(tmp_path / "m", {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="changed after it was opened"):
        fingerprint(checkpoint)
