"""Downloads from a stand-in Hub on loopback, through the real huggingface_hub client.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so downloads run in a process of their own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.checkpoints.hub_stand_in import COMMIT, Fault, StandInHub, serve
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
