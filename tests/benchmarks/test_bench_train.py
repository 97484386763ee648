"""The training benchmark from its command line to its last line; nothing is timed where losses differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_train
from benchmarks.bench_train import BARE, OURS, WHOLE


def test_both_ways_are_timed_on_the_same_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.json"
    arguments = ["--sizes", "test", "--repeats", "2", "--scratch", str(tmp_path), "--out", str(out)]
    assert bench_train.main(arguments) == 0
    found = json.loads(out.read_text())
    rows = {row["provider"]: row for row in found["rows"] if "provider" in row}
    assert {OURS, WHOLE, BARE} < rows.keys()
    assert all(
        rows[way]["tokens_per_s"] == rows[way]["tokens"] / rows[way]["median_s"] for way in (OURS, BARE)
    )
    assert rows[WHOLE]["median_s"] > rows[OURS]["median_s"]
    assert 0 <= rows[OURS]["loss_difference"] < 1e-4
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["shown"]
    [(measured, met)] = shown.values()
    assert met == (measured >= 0.8)
    assert found["conditions"]["torch_threads"] == torch.get_num_threads()


def test_nothing_is_timed_when_the_losses_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_train, "bare", lambda *_: ([9.0] * 4, 1.0, 1.0))
    out = tmp_path / "train.json"
    assert bench_train.main(["--sizes", "test", "--scratch", str(tmp_path), "--out", str(out)]) == 1
    assert "so nothing was timed" in capsys.readouterr().err
    assert not out.exists()
