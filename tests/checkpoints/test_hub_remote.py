"""Checkpoints whose weights stay on a stand-in Hub, and adapters, which do not: as if they were local."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from mergemix.checkpoints import header
from mergemix.checkpoints.checkpoint import Location, fingerprint, locate, open_checkpoint, read_checkpoint
from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.ranges import read_range
from mergemix.errors import CheckpointError
from tests.checkpoints.hub_stand_in import COMMIT, StandInHub, connect, serve
from tests.tiny import random_tensors, write_checkpoint

SHAPES = {"a": (300, 100), "b": (5,)}
SIDE = {"tokenizer.json": "{}", "merges.txt": "t", "chat_template.jinja": "j"}
UNNEEDED = ("pytorch_model.bin", "README.md", "trainer_state.json")


@pytest.fixture(params=[1, 2], ids=["one file", "sharded"])
def shards(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def connected(tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """The stand-in, with this process as its client, and weights in a storage of their own."""
    root = write_checkpoint(tmp_path / "repo", random_tensors(SHAPES, 0), shards=shards)
    for name in (*SIDE, *UNNEEDED):
        (root / name).write_text(SIDE.get(name, name))
    hub = StandInHub("org/expert", root, {"main": COMMIT, "v1": COMMIT[::-1]}, storage=True)
    with serve(hub):
        connect(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_weights_can_stay_on_the_hub(connected: StandInHub, shards: int) -> None:
    (connected.root / "adapter_config.json").write_text("{}")  # of its training; it is no adapter
    checkpoint = open_checkpoint("math", "org/expert@v1", download=False)
    assert checkpoint.revision == COMMIT[::-1]
    local = open_checkpoint("math", str(connected.root))
    assert checkpoint.config == local.config
    assert list(checkpoint.tensors) == list(local.tensors)
    for name, tensor in checkpoint.tensors.items():
        content = local.tensors[name].path.read_bytes()
        file = local.tensors[name].path.name
        etag = hashlib.sha256(content).hexdigest()
        assert tensor.file == HubFile("org/expert", COMMIT[::-1], file, len(content), etag)
        assert tensor.path == Path(f"org/expert@{COMMIT[::-1][:12]}/{file}")
        assert (
            replace(tensor, path=local.tensors[name].path, file=local.tensors[name].file)
            == local.tensors[name]
        )
    # Of the weights no file is in the cache; each was asked for its link and its header, in one request each.
    files = {tensor.path.name for tensor in checkpoint.tensors.values()}
    assert len(files) == shards
    index = {"model.safetensors.index.json"} if shards > 1 else set()
    assert {path.name for path in checkpoint.root.iterdir()} == {"config.json", *SIDE, *index}
    for file in files:
        assert [request.range for request in connected.requests("GET", file)] == [
            f"bytes=0-{(connected.root / file).stat().st_size - 1}"
        ]
        assert len(connected.requests("HEAD", file)) == 1


def test_a_long_header_takes_a_second_request(connected: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "FIRST_BYTES", 64)
    checkpoint = open_checkpoint("math", "org/expert", download=False)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == SHAPES
    for tensor in checkpoint.tensors.values():
        ranges = [request.range for request in connected.requests("GET", tensor.path.name)]
        assert ranges[0] == "bytes=0-63"
        assert str(ranges[1]).startswith("bytes=64-")


def test_a_checkpoint_has_one_fingerprint_wherever_it_is(connected: StandInHub, shards: int) -> None:
    places = [
        open_checkpoint("m", str(connected.root)),
        open_checkpoint("m", "org/expert", download=False),
        open_checkpoint("m", "org/expert"),
    ]
    assert [isinstance(place.tensors["a"].file, HubFile) for place in places] == [False, True, False]
    same = {fingerprint(place) for place in places}
    assert len(same) == 1
    write_checkpoint(connected.root, random_tensors(SHAPES, 1), shards=shards)
    connected.revisions["main"] = COMMIT[::-1]
    assert fingerprint(open_checkpoint("m", "org/expert", download=False)) not in same


def test_bytes_on_the_hub_are_the_tensors(connected: StandInHub) -> None:
    for tensor in open_checkpoint("math", "org/expert", download=False).tensors.values():
        content = (connected.root / tensor.path.name).read_bytes()
        expected = content[tensor.offset + 1 : tensor.offset + tensor.nbytes]
        assert read_range(tensor, 1, tensor.nbytes - 1) == expected


@pytest.mark.parametrize("shards", [2], indirect=True)
def test_a_remote_checkpoint_is_refused_as_a_local_one(connected: StandInHub) -> None:
    """Index and shards that disagree, a damaged shard, and one that is not there."""
    index = connected.root / "model.safetensors.index.json"
    shard = connected.root / "model-00002-of-00002.safetensors"
    weight_map, content = json.loads(index.read_text())["weight_map"], shard.read_bytes()
    first, third = "model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors"
    cases: list[tuple[dict[str, str], bytes, str]] = [
        ({"a": shard.name, "b": first}, content, "holds tensor 'a', but .* maps it to"),
        (weight_map | {"c": first}, content, "'c' is in .*does not hold it"),
        (weight_map | {"c": third}, content, f"'{third}' is missing"),
        (weight_map, content[:-1], rf"^org/expert@\w{{12}}/{shard.name} is truncated"),
        (weight_map, content[:7], "is no safetensors file: it has 7 bytes"),
    ]
    for number, (changed, damaged, words) in enumerate(cases):
        index.write_text(json.dumps({"weight_map": changed}))
        shard.write_bytes(damaged)
        connected.revisions["main"] = f"{number:040x}"
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint("math", "org/expert", download=False)


@pytest.mark.parametrize("shards", [1], indirect=True)
def test_what_cannot_be_downloaded_cannot_be_read_remotely(
    connected: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same_refusal(source: str, *words: str) -> None:
        messages = []
        for download in (True, False):
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint("math", source, download=download)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        for word in words:
            assert word in messages[0]

    same_refusal("org/absent", "neither a local directory nor a repository")
    same_refusal("org/expert@v9", "no such branch, tag or commit")
    connected.gated = True
    same_refusal("org/expert", "hf auth login")
    connected.gated = False
    (connected.root / "model.safetensors").unlink()
    connected.revisions["main"] = COMMIT[::-1]
    same_refusal("org/expert", "no *.safetensors")
    (connected.root / "config.json").unlink()
    same_refusal("org/expert", "no config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"org/expert: --no-download .*HF_HUB_OFFLINE"):
        open_checkpoint("math", "org/expert", download=False)


@pytest.mark.parametrize("shards", [1], indirect=True)
@pytest.mark.parametrize("download", [True, False])
def test_an_adapter_is_downloaded_without_code_or_pickles(
    connected: StandInHub, download: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (connected.root / "model.safetensors").rename(connected.root / "adapter_model.safetensors")
    (connected.root / "config.json").rename(connected.root / "adapter_config.json")
    for name in ("adapter_model.bin", "modeling.py"):
        (connected.root / name).write_text("code")
    location = locate("math", "org/expert@v1", download=download)
    assert location == Location(location.root, COMMIT[::-1])
    assert {path.name for path in location.root.iterdir()} == {"adapter_config.json", weights.name}
    assert (location.root / weights.name).read_bytes() == weights.read_bytes()
    assert connected.fetched() == {"adapter_config.json", weights.name}
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        read_checkpoint("math", "org/expert@v1", location)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert locate("math", "org/expert@v1") == location
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"adapter without adapter_model\.safetensors"):
        locate("math", "org/expert", download=download)
