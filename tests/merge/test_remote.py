"""Merging what stays on the Hub (a stand-in): the same bytes as from local copies, or nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergemix.checkpoints import hub_ranges
from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from tests.checkpoints.hub_stand_in import COMMIT, Fault, StandInHub, connect, serve
from tests.merge.test_outputs import contents
from tests.tiny import random_tensors, write_checkpoint

SHAPES = {"embed": (900, 200), "layer": (300, 200), "norm": (200,)}
NAMES = ("math", "code")


@pytest.fixture
def hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, StandInHub]]:
    """Two expert repositories, sharded differently, with this process as their client."""
    hubs = {
        name: StandInHub(f"org/{name}", root, {"main": COMMIT}, storage=True)
        for seed, name in enumerate(NAMES)
        for root in [write_checkpoint(tmp_path / name, random_tensors(SHAPES, seed), shards=1 + seed)]
    }
    monkeypatch.setattr(hub_ranges, "BACKOFF_SECONDS", 0.0)
    with serve(*hubs.values()):
        connect(hubs["math"], tmp_path / "cache", monkeypatch)
        yield hubs


def remote_family() -> Family:
    return open_family(None, {name: f"org/{name}" for name in NAMES}, download=False)


def test_a_remote_merge_is_the_local_one(tmp_path: Path, hubs: dict[str, StandInHub]) -> None:
    mixture = Mixture.of(NAMES, {"math": 3, "code": 1})
    local = open_family(None, {name: str(tmp_path / name) for name in NAMES})
    merge_to_directory(local, mixture, tmp_path / "local")
    merge_to_directory(remote_family(), mixture, tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    mixed = open_family(None, {"math": str(tmp_path / "math"), "code": "org/code"}, download=False)
    merge_to_directory(mixed, mixture, tmp_path / "mixed", memory_bytes=3 * 4096)
    assert contents(tmp_path / "mixed") == contents(tmp_path / "local")


def test_dropped_connections_are_taken_up_again(tmp_path: Path, hubs: dict[str, StandInHub]) -> None:
    mixture = Mixture.uniform(NAMES)
    merge_to_directory(remote_family(), mixture, tmp_path / "whole")
    family = remote_family()
    faults = [Fault(drop_after=1000), Fault(status=503), Fault(drop_after=0), Fault(drop_after=70_000)]
    hubs["math"].faults["model.safetensors"] = list(faults)
    merge_to_directory(family, mixture, tmp_path / "interrupted")
    assert hubs["math"].faults["model.safetensors"] == []
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(headers={"Content-Range": "bytes 0-9/10"}), "has the range"),
        (Fault(body=lambda body: body[:-5], headers={"Content-Length": None}), "ended|length|attempts"),
        (Fault(status=200), "does not give byte ranges"),
    ],
)
def test_a_hub_that_serves_something_else_leaves_nothing(
    tmp_path: Path, hubs: dict[str, StandInHub], fault: Fault, message: str
) -> None:
    family = remote_family()
    hubs["code"].faults = {path.name: [fault] * 20 for path in hubs["code"].root.glob("*.safetensors")}
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match=message):
        merge_to_directory(family, Mixture.uniform(NAMES), tmp_path / "outputs" / "out")
    assert os.listdir(tmp_path / "outputs") == []


def test_a_repository_that_changes_meanwhile_is_told(tmp_path: Path, hubs: dict[str, StandInHub]) -> None:
    family = remote_family()
    changed = Fault(headers={"X-Linked-ETag": '"another"'})
    hubs["math"].link_faults = {"model.safetensors": [changed] * 20}
    with pytest.raises(CheckpointError, match=r"org/math@.*was changed on the Hub"):
        merge_to_directory(family, Mixture.uniform(NAMES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_does_not_wait_for_the_next_attempt(
    tmp_path: Path, hubs: dict[str, StandInHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_ranges, "BACKOFF_SECONDS", 300.0)
    family = remote_family()
    hubs["code"].faults = {
        path.name: [Fault(status=503)] * 50 for path in hubs["code"].root.glob("*.safetensors")
    }
    hubs["math"].faults["model.safetensors"] = [Fault(status=200)] * 50  # its error ends the merge
    with pytest.raises(CheckpointError, match="does not give byte ranges"):
        merge_to_directory(family, Mixture.uniform(NAMES), tmp_path / "out", memory_bytes=64 * 4096)
