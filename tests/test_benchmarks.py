"""Every benchmark of merges runs from its command line to its last line, at sizes that prove nothing about speed."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from benchmarks import bench_lora, bench_memory, bench_merge_disk, bench_swap, swap_disk, swap_live
from benchmarks.children import BenchmarkError, added, in_turn, run_child
from benchmarks.merges import BF16_ROUNDOFF, differing_tensors, uneven_weights, verdict
from benchmarks.models import HEAD_BYTES, SHAPES, Shape, weight_files, write_adapter, write_model
from benchmarks.storage import (
    cached_share,
    make_cold,
    make_warm,
    read_rate,
    scratch_directory,
    storage_conditions,
)
from benchmarks.swap_live import Timed
from mergemix.checkpoints.checkpoint import open_checkpoint
from mergemix_kernels import reference

ROOT = Path(__file__).resolve().parent.parent
TINY = Shape(32, 48, 2, 4, 2, 8, 100, tied=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on a disk: a temporary place may be in memory, where nothing is ever cold."""
    in_memory = storage_conditions(tmp_path).get("file_system") == "tmpfs"
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=ROOT if in_memory else tmp_path) as directory:
        yield Path(directory)


def results(capsys: pytest.CaptureFixture[str], out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the JSON object on the last line, the rows of the results file, which has conditions)."""
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads(out.read_text())
    conditions = written["conditions"]
    assert {"cpu", "cores", "commit", "versions", "taken_at", "memory_bytes", "disk"} <= conditions.keys()
    shown = {
        row["what"]: [row["measured"], row["met"]] for row in written["rows"] if row["case"] == "verdict"
    }
    assert last["shown"] == shown
    return last, written["rows"]


def by_provider(rows: list[dict[str, Any]], case: str) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in rows if row["case"] == case}


def test_merge_on_disk(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shape", "test", "--experts", "3", "--mixtures", "1", "--scratch", str(disk)]
    arguments += ["--repeats", "1", "--many-repeats", "1"]
    out = tmp_path / "results" / "disk.json"
    assert bench_merge_disk.main([*arguments, "--out", str(out)]) == 0
    last, rows = results(capsys, out)
    assert last["bench"] == "merge_disk"
    assert last["floor_s"].keys() == {"warm", "cold"}
    assert last["shown"]["warm: seconds, mergekit linear / mergemix merge"] == [None, None]
    roofline = by_provider(rows, "roofline")
    assert {
        "disk read, cold",
        "page-cache read",
        "disk write, direct, fsync",
        "memory copy",
    } <= roofline.keys()
    for case in ("start", "warm", "cold"):
        row = by_provider(rows, case)["mergemix merge"]
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["peak_rss_mb"] > 10
    assert by_provider(rows, "1 mixtures, cold").keys() == {
        "one pass",
        "a pass each",
        "seconds, one pass / a pass each",
    }
    assert not list(disk.iterdir())


def test_memory(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "STARTED_REPEATS", 1)
    arguments = ["--sizes", "test", "--experts", "3", "--memory", "8MiB", "--repeats", "1"]
    out = tmp_path / "memory.json"
    assert bench_memory.main([*arguments, "--scratch", str(disk), "--out", str(out)]) == 0
    last, rows = results(capsys, out)
    assert last["bench"] == "memory"
    measured = [row for row in rows if row["case"] == "peak"]
    assert [(row["shape"], row["experts"]) for row in measured] == [("test", 3)]
    assert all(row["peak_rss_mb"] > row["median_mb"] for row in measured)
    assert last["shown"]["--memory 8MiB: largest peak MB above start"][1] is True
    assert not list(disk.iterdir())


def test_nothing_is_measured_when_results_are_wrong(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_memory, "differing_tensors", lambda *_: ["model.norm.weight"])
    arguments = ["--sizes", "test", "--experts", "2", "--memory", "8MiB", "--scratch", str(disk)]
    assert bench_memory.main([*arguments, "--out", str(tmp_path / "memory.json")]) == 1
    said = capsys.readouterr()
    assert "wrong results, so nothing was measured" in said.err
    assert "verdict" not in said.out
    assert not (tmp_path / "memory.json").exists()


def test_lora(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "lora.json"
    arguments = ["--shape", "test", "--experts", "2", "--rank", "4", "--repeats", "1", "--scratch", str(disk)]
    assert bench_lora.main([*arguments, "--out", str(out)]) == 0
    last, rows = results(capsys, out)
    assert last["bench"] == "lora"
    assert last["shown"]["warm: seconds, peft for one adapter / all adapters"] == [None, None]
    gate = by_provider(rows, "gate")
    assert gate[bench_lora.OURS]["share_of_bound"] <= 1
    assert gate[bench_lora.OURS]["rms_in_roundings"] < gate[bench_lora.DENSE]["rms_in_roundings"]
    assert {bench_lora.OURS, bench_lora.DENSE} < by_provider(rows, "warm").keys()
    assert not list(disk.iterdir())


@settings(max_examples=8, deadline=None)
@given(shards=st.integers(1, 9), seed=st.integers(0, 2**32), sparse=st.booleans())
def test_models_are_checkpoints(
    shards: int, seed: int, sparse: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("models") / "model"
    write_model(root, TINY, seed, shards=shards, sparse=sparse)
    opened = open_checkpoint("model", str(root))
    assert {name: tensor.shape for name, tensor in opened.tensors.items()} == TINY.tensors()
    assert sum(tensor.nbytes for tensor in opened.tensors.values()) == TINY.nbytes
    assert len(weight_files([root])) <= shards
    for path in weight_files([root]):
        for tensor in load_file(path).values():
            values = tensor.flatten().double().abs()
            stored = values[: HEAD_BYTES // 2] if sparse else values
            assert stored.min() >= 2**-9
            assert values.max() < 0.5
            assert not sparse or not values[HEAD_BYTES // 2 :].any()


def test_models_differ_by_seed_alone_and_sparse_ones_take_no_space(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_model(tmp_path / name, SHAPES["16gb"], seed, sparse=True)
    one, same, other = (weight_files([tmp_path / name]) for name in ("one", "same", "other"))
    assert sum(path.stat().st_size for path in one) > 16e9
    assert sum(path.stat().st_blocks * 512 for path in one) < 16e6

    def beginnings(paths: list[Path]) -> list[bytes]:
        found = []
        for path in paths:
            with path.open("rb") as file:
                found.append(file.read(1 << 16))
        return found

    assert beginnings(one) == beginnings(same) != beginnings(other)


def test_adapters_cover_every_linear_layer(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", TINY, 0, rank=3, alpha=6)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    linear = TINY.linear()
    assert len(linear) == 7 * TINY.layers
    assert len(factors) == 2 * len(linear)
    for name, (outputs, inputs) in linear.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        assert factors[f"{prefix}.lora_A.weight"].shape == (3, inputs)
        assert factors[f"{prefix}.lora_B.weight"].shape == (outputs, 3)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_gate_sees_a_single_bit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("gate")
    experts = [write_model(root / f"e{k}", TINY, k, shards=k + 1) for k in range(3)]
    weights = [0.2, 0.3, 0.5]
    opened = [
        {n: t for path in weight_files([expert]) for n, t in load_file(path).items()} for expert in experts
    ]
    merged = {
        name: reference.weighted_sum([tensors[name] for tensors in opened], weights) for name in opened[0]
    }
    (root / "merged").mkdir()
    save_file(merged, root / "merged" / "model.safetensors")
    assert differing_tensors(root / "merged", experts, weights) == []

    name = data.draw(st.sampled_from(sorted(merged)))
    words = merged[name].view(torch.int16).flatten()
    position = data.draw(st.integers(0, words.numel() - 1))
    words[position] ^= 1
    save_file(merged, root / "merged" / "model.safetensors")
    assert differing_tensors(root / "merged", experts, weights) == [name]
    assert differing_tensors(root / "merged", experts, weights, bound=7 * BF16_ROUNDOFF) == []
    words[position] = 0x3F80  # 1.0, twice as large as any value can be
    save_file(merged, root / "merged" / "model.safetensors")
    assert differing_tensors(root / "merged", experts, weights, bound=7 * BF16_ROUNDOFF) == [name]

    del merged[name]
    save_file(merged, root / "merged" / "model.safetensors")
    assert differing_tensors(root / "merged", experts, weights) == [name]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.25])
def test_the_gate_of_adapters_sees_a_wrong_element(wrong: float, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TINY, 0)
    adapters = {f"e{k}": write_adapter(tmp_path / f"a{k}", TINY, k, rank=2, alpha=4) for k in range(2)}
    job = bench_lora.Job(tmp_path, TINY, 2, base, adapters, uneven_weights(list(adapters)), "8MiB")
    (tmp_path / "merged").mkdir()
    merged = {
        name: bench_lora.truth(job, name)[0].to(torch.bfloat16) for name in bench_lora.sampled_tensors(TINY)
    }
    save_file(merged, tmp_path / "merged" / "model.safetensors")
    share, relative = bench_lora.errors(job, tmp_path / "merged")
    assert 0.5 < share <= 1
    assert relative == pytest.approx(1)

    merged["model.layers.1.mlp.up_proj.weight"][3, 5] += wrong
    save_file(merged, tmp_path / "merged" / "model.safetensors")
    assert not bench_lora.errors(job, tmp_path / "merged")[0] <= 1


def test_pages_are_dropped_and_read_back(disk: Path) -> None:
    paths = [disk / "one", disk / "two"]
    for path in paths:
        path.write_bytes(b"x" * 3_000_001)
    make_cold(paths)
    assert cached_share(paths) < 0.01
    for direct in (False, True):
        assert read_rate(paths, readers=3, direct=direct) > 0
    make_warm(paths)
    assert cached_share(paths) == 1


def test_scratch_needs_room_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchmarkError, match="GB free, but this benchmark needs"),
        scratch_directory(tmp_path, 1 << 60),
    ):
        raise AssertionError("there is no such disk")
    with scratch_directory(tmp_path, 1) as scratch:
        (scratch / "file").touch()
    assert not list(tmp_path.iterdir())


def test_scratch_is_removed_when_a_benchmark_is_terminated(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from benchmarks.storage import scratch_directory\n"
        "with scratch_directory(pathlib.Path(sys.argv[1]), 1): print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(30) != 0
    assert not list(tmp_path.iterdir())


def test_a_childs_peak_is_its_own() -> None:
    held = np.ones(50_000_000)  # 400 MB, which Linux would count for what this process starts itself
    small = run_child([sys.executable, "-c", "pass"])
    large = run_child(
        [sys.executable, "-c", "b = bytearray(200 << 20); b[::4096] = b[::4096].replace(b'\\0', b'x')"]
    )
    assert held.nbytes > small.peak_rss_bytes
    assert small.peak_rss_bytes < 100e6
    assert (200 << 20) < large.peak_rss_bytes < held.nbytes


def test_children_report_and_fail() -> None:
    run = run_child(
        [sys.executable, "-c", "import json; print('text'); print(json.dumps({'bytes_read': 3, 'out': 'x'}))"]
    )
    assert run.reported == {"bytes_read": 3, "out": "x"}
    both = added([run, run])
    assert both.reported == {"bytes_read": 6}
    assert both.seconds == pytest.approx(2 * run.seconds)
    assert both.peak_rss_bytes == run.peak_rss_bytes
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 3 .*what went wrong"):
        run_child(
            [sys.executable, "-c", "import sys; print('what went wrong', file=sys.stderr); sys.exit(3)"]
        )


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    assert in_turn(calls, 3) == {"a": [None] * 3, "b": [None] * 3}
    assert order == ["a", "b", "b", "a", "a", "b"]


@pytest.mark.parametrize("count", range(1, 34))
def test_uneven_weights_sum_to_one(count: int) -> None:
    weights = uneven_weights([f"e{k}" for k in range(count)])
    assert math.isclose(math.fsum(weights.values()), 1)
    assert len(set(weights.values())) == count


def test_verdicts() -> None:
    assert verdict("x", 10.0, 10, at_least=True)["met"] is True
    assert verdict("x", 9.9, 10, at_least=True)["met"] is False
    assert verdict("x", 600.1, 600, at_least=False)["met"] is False
    assert verdict("x", None, 600, at_least=False)["met"] is None


def timed(seconds: float, *, answers: tuple[float, ...] = (-1.0,), nbytes: int = 0) -> Timed:
    return Timed(
        seconds, answers, swap_s=seconds, process_s=seconds / 2, bytes_read=4 * nbytes, bytes_written=nbytes
    )


def test_bars_of_a_swap_are_for_models_whose_bytes_count() -> None:
    found = {
        swap_disk.PEER: [timed(40.0), timed(60.0)],
        swap_disk.RELOAD: [timed(9.0), timed(9.0)],
        swap_live.WARM: [timed(2.0, nbytes=10**9), timed(3.0, nbytes=10**9)],
        swap_live.ONE_GROUP: [timed(0.5, nbytes=10**8), timed(0.5, nbytes=10**8)],
    }
    rows, verdicts = bench_swap.verdicts_of("1b", found, rate=10e9)
    assert [(row["measured"], row["met"]) for row in verdicts] == [(20.0, True), (2.5, False), (0.1, True)]
    assert [row["median"] for row in rows] == [20.0, 3.75, 2.5]
    assert bench_swap.verdicts_of("tiny", found, rate=10e9) == (
        [{**row, "case": "tiny"} for row in rows],
        [],
    )
    del found[swap_disk.PEER]
    _, verdicts = bench_swap.verdicts_of("1b", found, rate=10e9)
    assert verdicts[0]["measured"] is verdicts[0]["met"] is None


def test_one_layer_group_changes_at_a_time(tmp_path: Path) -> None:
    family = swap_live.prepare(tmp_path, SHAPES["tiny"], 2, sparse=True)
    job = swap_live.Job(tmp_path, SHAPES["tiny"], family, None, 3, 0, 0)
    start, *changed = swap_live.one_group(job, job.mixtures(1)[0], 3)
    assert len(start.groups) == len(changed[0].groups) == swap_live.LAYER_GROUPS
    for mixture in changed:
        assert [a != b for a, b in zip(start.groups, mixture.groups, strict=True)] == [
            number == swap_live.LAYER_GROUPS // 2 for number in range(swap_live.LAYER_GROUPS)
        ]
    assert len(set(changed)) == 3


def test_live_answers_that_differ_end_the_swap_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_disk, "truths", lambda job, mixtures: [(-1.0, -2.0)])
    family = swap_live.prepare(tmp_path, SHAPES["tiny"], 2, sparse=True)
    job = swap_live.Job(tmp_path, SHAPES["tiny"], family, None, 1, 0, 0)
    ways = (swap_live.COLD, swap_live.CACHED_FILES, swap_live.WARM)
    found = {way: [timed(1.0, answers=(-1.0, -2.0))] for way in ways}
    swap_disk.check_answers(job, found)
    found[swap_live.WARM] = [timed(1.0, answers=(-1.0, -2.5))]
    with pytest.raises(BenchmarkError, match="delta cache: answers"):
        swap_disk.check_answers(job, found)


def test_without_a_gpu_the_swap_benchmark_says_that_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "swap.json"
    assert bench_swap.main(["--device", "cuda", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["conditions"]["measured"] is False
    assert "nothing was measured" in capsys.readouterr().err
