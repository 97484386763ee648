"""Checkpoints and adapters of a stand-in Hub on loopback, through the real huggingface_hub client.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so most downloads run in a process of their own.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from mergemix.checkpoints import header
from mergemix.checkpoints.checkpoint import Location, fingerprint, locate, open_checkpoint, read_checkpoint
from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.ranges import read_range
from mergemix.errors import CheckpointError
from tests.checkpoints.hub_stand_in import COMMIT, Fault, StandInHub, connect, serve
from tests.tiny import random_tensors, write_checkpoint

DOWNLOAD = """
import json, sys
from mergemix.checkpoints.checkpoint import open_checkpoint
from mergemix.errors import MergeMixError
results = {}
for source in sys.argv[1:]:
    try:
        checkpoint = open_checkpoint("math", source)
        commit = checkpoint.revision
        results[source] = {"root": str(checkpoint.root), "commit": commit, "tensors": sorted(checkpoint.tensors)}
    except MergeMixError as error:
        results[source] = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(results))
"""
SIDE = {"tokenizer.json": "{}", "tokenizer.model": "m", "merges.txt": "t", "chat_template.jinja": "j"}
UNNEEDED = {
    "pytorch_model.bin": "b",
    "model.gguf": "g",
    "consolidated.safetensors": "c",
    "README.md": "r",
    ".gitattributes": "a",
    "original/consolidated.00.pth": "p",
    "original/params.json": "{}",
    "onnx/model.safetensors": "o",
    "trainer_state.json": "{}",
}


@pytest.fixture(params=[1, 2], ids=["one file", "sharded"])
def shards(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def hub(tmp_path: Path, shards: int) -> Iterator[StandInHub]:
    root = write_checkpoint(tmp_path / "repo", random_tensors({"a": (300, 100), "b": (5,)}, 0), shards=shards)
    for name, content in (SIDE | UNNEEDED).items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    hub = StandInHub("org/expert", root, {"main": COMMIT, "v1": COMMIT[::-1]})
    with serve(hub):
        yield hub


def download(source: str, hub: StandInHub, home: Path, **environment: str) -> dict[str, object]:
    return download_all([source], hub, home, **environment)[source]


def download_all(
    sources: Sequence[str], hub: StandInHub, home: Path, **environment: str
) -> dict[str, dict[str, object]]:
    """What one process makes of each source."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", DOWNLOAD, *sources]
    done = subprocess.run(command, env=keep | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_revision_is_pinned_and_only_needed_files_are_fetched(
    hub: StandInHub, tmp_path: Path, shards: int
) -> None:
    weights = (
        {"model.safetensors"}
        if shards == 1
        else {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        }
    )
    result = download("org/expert@v1", hub, tmp_path / "home")
    assert result["commit"] == COMMIT[::-1]
    assert result["tensors"] == ["a", "b"]
    assert hub.fetched() == {"config.json", *SIDE, *weights}
    paths = [request.path for request in hub.log if request.file]
    assert {path.split("/")[4] for path in paths} == {"v1", COMMIT[::-1]}
    assert all("/v1/config.json" in path for path in paths if "/v1/" in path)

    # A branch that moves on does not change what is there; and the cache is enough without a network.
    hub.log.clear()
    again = download("org/expert@v1", hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again == result
    assert hub.log == []


@pytest.mark.parametrize("shards", [1], indirect=True)
def test_a_dropped_connection_is_resumed(hub: StandInHub, tmp_path: Path) -> None:
    # The client keeps what arrived in whole pieces of 10 MB: the file must be longer than two.
    write_checkpoint(hub.root, {"a": torch.arange(6 << 20, dtype=torch.int32)})
    hub.faults["model.safetensors"] = [Fault(drop_after=12 << 20)]
    result = download("org/expert", hub, tmp_path / "home")
    ranges = [request.range for request in hub.requests("GET", "model.safetensors")]
    assert ranges[0] is None
    assert str(ranges[1]).startswith("bytes=1")
    assert len(ranges) == 2
    downloaded = Path(str(result["root"])) / "model.safetensors"
    assert downloaded.read_bytes() == (hub.root / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shards", [1], indirect=True)
def test_config_weights_and_list_of_files_are_of_one_commit(hub: StandInHub, tmp_path: Path) -> None:
    def move_on() -> None:
        write_checkpoint(hub.root, random_tensors({"c": (5,)}, 1), config={"model_type": "newer"})
        (hub.root / "added_tokens.json").write_text(
            '{"<new>": 9}'
        )  # no other file's bytes: the cache would not fetch them twice
        hub.revisions["main"] = COMMIT[::-1]

    hub.after_info = move_on
    result = download("org/expert", hub, tmp_path / "home")
    assert result["commit"] == COMMIT[::-1]
    assert result["tensors"] == ["c"]
    assert "added_tokens.json" in hub.fetched()


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What one process says of each source that cannot be downloaded."""
    root = tmp_path_factory.mktemp("refusals")
    hubs = {}
    for name in ("good", "gated", "unconfigured", "pickled", "ambiguous"):
        repo = write_checkpoint(root / name, random_tensors({"a": (3,), "b": (5,)}, 0), shards=2)
        hubs[name] = StandInHub(f"org/{name}", repo, {"main": COMMIT})
    hubs["gated"].gated = True
    (root / "unconfigured" / "config.json").unlink()
    for path in (root / "pickled").glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(root / "ambiguous", {"a": torch.ones(3)})
    sources = [*(hub.repo for hub in hubs.values()), "org/good@v9", "org/absent", "org/na--me..x"]
    with serve(*hubs.values()):
        results = download_all(sources, hubs["good"], root / "home")
    assert results.pop("org/good")["commit"] == COMMIT
    return results


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/absent", ["neither a local directory nor a repository", "HF_TOKEN"]),
        ("org/good@v9", ["no such branch, tag or commit"]),
        ("org/gated", ["access", "hf auth login"]),
        ("org/unconfigured", ["no config.json"]),
        ("org/pickled", ["no *.safetensors"]),
        ("org/ambiguous", ["both model.safetensors.index.json and model.safetensors"]),
        ("org/na--me..x", []),
    ],
)
def test_what_cannot_be_downloaded_is_refused(
    refusals: dict[str, dict[str, object]], source: str, words: list[str]
) -> None:
    check_refusal(refusals[source], source, *words)


@pytest.mark.parametrize("shards", [1], indirect=True)
def test_without_a_network_a_checkpoint_must_be_in_the_cache(hub: StandInHub, tmp_path: Path) -> None:
    result = download("org/expert", hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    check_refusal(result, "org/expert", "HF_HUB_OFFLINE")
    assert hub.log == []
    hub.endpoint = "http://127.0.0.1:9"  # the discard port: nothing listens
    result = download("org/expert", hub, tmp_path / "home")
    check_refusal(result, "org/expert", "cannot be reached", "no such local directory")


def check_refusal(result: dict[str, object], source: str, *words: str) -> None:
    assert result.get("error") == "CheckpointError", result
    for word in (source, *words):
        assert word in str(result["message"])


@pytest.fixture
def connected(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """The stand-in, with this process as its client, and weights in a storage of their own."""
    hub.storage = True
    connect(hub, tmp_path / "cache", monkeypatch)
    return hub


def test_weights_can_stay_on_the_hub(connected: StandInHub, shards: int) -> None:
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
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (300, 100), "b": (5,)}
    for tensor in checkpoint.tensors.values():
        ranges = [request.range for request in connected.requests("GET", tensor.path.name)]
        assert ranges[0] == "bytes=0-63"
        assert str(ranges[1]).startswith("bytes=64-")


def test_a_checkpoint_has_one_fingerprint_wherever_it_is(connected: StandInHub) -> None:
    places = [
        open_checkpoint("m", str(connected.root)),
        open_checkpoint("m", "org/expert", download=False),
        open_checkpoint("m", "org/expert"),
    ]
    assert [isinstance(place.tensors["a"].file, HubFile) for place in places] == [False, True, False]
    assert len({fingerprint(place) for place in places}) == 1
    write_checkpoint(connected.root, random_tensors({"a": (300, 100), "b": (5,)}, 1), shards=1)
    (connected.root / "model.safetensors.index.json").unlink(missing_ok=True)
    connected.revisions["main"] = "f" * 40
    assert fingerprint(open_checkpoint("m", "org/expert", download=False)) != fingerprint(places[0])


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
    for number, (change, damaged, words) in enumerate(
        [
            ({"b": "model-00001-of-00002.safetensors"}, content, "holds tensor 'b', but"),
            ({"c": "model-00001-of-00002.safetensors"}, content, "'c' is in .*does not hold it"),
            (
                {"c": "model-00003-of-00002.safetensors"},
                content,
                "'model-00003-of-00002.safetensors' is missing",
            ),
            ({}, content[:-1], rf"org/expert@{number_of(3)[:12]}/{shard.name} is truncated"),
            ({}, content[:7], "is no safetensors file: it has 7 bytes"),
        ]
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        shard.write_bytes(damaged)
        connected.revisions["main"] = number_of(number)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint("math", "org/expert", download=False)


def number_of(number: int) -> str:
    """A commit."""
    return f"{number:040x}"


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
