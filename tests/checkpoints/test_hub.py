"""Downloads from a stand-in Hub on loopback, through the real huggingface_hub client.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so every download runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints.hub_stand_in import COMMIT, StandInHub, serve
from tests.tiny import random_tensors, write_checkpoint

DOWNLOAD = """
import json, sys
from mergemix.checkpoints.checkpoint import open_checkpoint
from mergemix.checkpoints.hub import download
from mergemix.errors import MergeMixError
try:
    checkpoint = open_checkpoint("math", sys.argv[1])
    root, commit = download(sys.argv[1])
    print(json.dumps({"root": str(root), "commit": commit, "tensors": sorted(checkpoint.tensors)}))
except MergeMixError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
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
    with serve(StandInHub("org/expert", root, {"main": COMMIT, "v1": COMMIT[::-1]})) as hub:
        yield hub


def download(source: str, hub: StandInHub, home: Path, **environment: str) -> dict[str, object]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", DOWNLOAD, source]
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
    revisions = {path.split("/")[4] for method, path, _ in hub.log if "/resolve/" in path}
    assert revisions == {"v1", COMMIT[::-1]}
    assert all("/v1/config.json" in path for _, path, _ in hub.log if "/v1/" in path)

    # A branch that moves on does not change what is there; and the cache is enough without a network.
    hub.log.clear()
    again = download("org/expert@v1", hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again == result
    assert hub.log == []


@pytest.mark.parametrize("shards", [1], indirect=True)
def test_a_dropped_connection_is_resumed(hub: StandInHub, tmp_path: Path) -> None:
    # The client keeps what arrived in whole pieces of 10 MB: the file must be longer than two.
    write_checkpoint(hub.root, {"a": torch.arange(6 << 20, dtype=torch.int32)})
    hub.drop = "model.safetensors"
    result = download("org/expert", hub, tmp_path / "home")
    ranges = [
        header for method, path, header in hub.log if (method, path[-18:]) == ("GET", "/model.safetensors")
    ]
    assert ranges[0] is None
    assert str(ranges[1]).startswith("bytes=1")
    assert len(ranges) == 2
    downloaded = Path(str(result["root"])) / "model.safetensors"
    assert downloaded.read_bytes() == (hub.root / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shards", [1], indirect=True)
class TestRefusals:
    def refused(self, source: str, hub: StandInHub, tmp_path: Path, *words: str, **environment: str) -> None:
        result = download(source, hub, tmp_path / "home", **environment)
        assert result.get("error") == "CheckpointError", result
        for word in (source, *words):
            assert word in str(result["message"])

    def test_unknown_repository(self, hub: StandInHub, tmp_path: Path) -> None:
        self.refused("org/absent", hub, tmp_path, "neither a local directory nor a repository", "HF_TOKEN")

    def test_unknown_revision(self, hub: StandInHub, tmp_path: Path) -> None:
        self.refused("org/expert@v9", hub, tmp_path, "no such branch, tag or commit")

    def test_gated(self, hub: StandInHub, tmp_path: Path) -> None:
        hub.gated = True
        self.refused("org/expert", hub, tmp_path, "access", "hf auth login")

    def test_no_network(self, hub: StandInHub, tmp_path: Path) -> None:
        hub.endpoint = "http://127.0.0.1:9"  # the discard port: nothing listens
        self.refused("org/expert", hub, tmp_path, "cannot be reached", "no such local directory")

    def test_offline_and_not_cached(self, hub: StandInHub, tmp_path: Path) -> None:
        self.refused("org/expert", hub, tmp_path, "HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")
        assert hub.log == []

    def test_no_config(self, hub: StandInHub, tmp_path: Path) -> None:
        (hub.root / "config.json").unlink()
        self.refused("org/expert", hub, tmp_path, "no config.json")

    def test_only_pickles(self, hub: StandInHub, tmp_path: Path) -> None:
        for path in hub.root.glob("*.safetensors"):
            path.unlink()
        self.refused("org/expert", hub, tmp_path, "no *.safetensors")

    def test_malformed_id(self, hub: StandInHub, tmp_path: Path) -> None:
        self.refused("org/na--me..x", hub, tmp_path)
