"""`mergemix train` from its command line to the checkpoint it leaves."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from mergemix.train.states import States
from tests.command_line import Invoke, refused
from tests.serve.tiny_models import tiny_llama
from tests.train.files import write_corpora


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """--base and --data, and small sizes."""
    root = tmp_path_factory.mktemp("train-command")
    data = write_corpora(root)
    return [
        "--base", tiny_llama(root / "base", seed=3), "--data", f"sums={data['sums']}", "--data",
        f"texts={data['texts']}", "--tokens", "5e2", "--sequence-length", 32, "--batch", 4,
    ]  # fmt: skip


def test_one_model_on_a_mixture(tmp_path: Path, given: list[object], invoke: Invoke) -> None:
    out = tmp_path / "out"
    code, said, progress = invoke("train", *given, "--mixture", "sums=1,texts=3", "--out", out, "--json")
    assert code == 0, progress
    record = json.loads(said)
    assert record["tokens"] == 512
    assert {name: part["share"] for name, part in record["domains"].items()} == {"sums": 0.25, "texts": 0.75}
    assert json.loads((out / "training.json").read_text()) == record
    for text in ("reading the corpora", "step 4 of 4: loss ", "tokens/s", "writing"):
        assert text in progress
    code, said, _ = invoke("train", *given, "--mixture", "sums=1,texts=3", "--out", out)
    assert code == 0
    for text in (
        "25.00%",
        "75.00%",
        "500 tokens were asked for, and rounded up to 4 whole steps",
        "finished before",
    ):
        assert text in " ".join(said.split())


def test_a_family(tmp_path: Path, given: list[object], invoke: Invoke) -> None:
    general = ("--general", "sums=1,texts=1", "--general-share", 0.5)
    code, said, progress = invoke("train", *given, "--all", *general, "--out", tmp_path / "experts", "--json")
    assert code == 0, progress
    found = json.loads(said)
    assert found["experts"] == {name: str(tmp_path / "experts" / name) for name in ("sums", "texts")}
    assert found["trainings"]["sums"]["domains"]["sums"]["share"] == 0.75
    assert all((Path(path) / "model.safetensors").is_file() for path in found["experts"].values())
    code, said, _ = invoke(
        "train", *given, "--all", "--domain", "texts", "--out", tmp_path / "some", "--json"
    )
    assert list(json.loads(said)["experts"]) == ["texts"]


def test_an_interrupt_can_be_resumed(
    tmp_path: Path, given: list[object], invoke: Invoke, monkeypatch: Any
) -> None:
    command = ("train", *given, "--mixture", "sums=1", "--out", tmp_path / "out", "--save-every", 2)
    save = States.save
    with monkeypatch.context() as patch:
        patch.setattr(States, "save", lambda *given: (save(*given), os.kill(os.getpid(), signal.SIGTERM)))
        refused(invoke(*command), 3, "Interrupted.", "the same command again goes on there")
    code, said, _ = invoke(*command)
    assert code == 0
    assert "resumed at step 3" in said


def test_of_several_processes_only_the_first_one_speaks(
    tmp_path: Path, given: list[object], invoke: Invoke, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert invoke("train", *given, "--mixture", "sums=1", "--out", tmp_path / "out", "--json") == (0, "", "")
    assert (tmp_path / "out" / "training.json").is_file()
    assert invoke("train", *given, "--mixture", "law=1", "--out", tmp_path / "other") == (1, "", "")


@pytest.mark.parametrize(
    ("changed", "code", "said"),
    [
        (["--mixture", "sums=1", "--all"], 2, "Give one of '--mixture'"),
        ([], 2, "Give one of '--mixture'"),
        (["--mixture", "sums=1", "--domain", "sums"], 2, "'--domain' restricts '--all'"),
        (["--mixture", "sums=1", "--data", "sums=other.jsonl"], 2, "--data names 'sums' twice"),
        (["--mixture", "sums=1,sums=2"], 2, "--mixture names 'sums' twice"),
        (["--mixture", "sums=1", "--tokens", "1.5"], 2, "'1.5' is no whole number"),
        (["--mixture", "law=1"], 1, "there is no data of 'law'; the domains are sums, texts"),
        (["--all", "--domain", "law"], 1, "there is no data of 'law'"),
        (["--mixture", "sums=1", "--tokens", "1e6"], 1, "may be repeated 4 times"),
        (["--mixture", "more=1", "--data", "more=absent.jsonl"], 1, "cannot read the corpus absent.jsonl"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, given: list[object], invoke: Invoke, changed: list[object], code: int, said: str
) -> None:
    refused(invoke("train", *given, *changed, "--out", tmp_path / "out"), code, said)
    assert not (tmp_path / "out").exists()
