"""bench_kernel from its command line to its last line, at sizes that prove nothing about speed."""

import json
from itertools import pairwise

import pytest
import torch

from benchmarks import bench_kernel, kernel_cases, kernel_gpu


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernel, "correctness_gate", lambda device: [])
    monkeypatch.setattr(bench_kernel, "LARGE_COPY_BYTES", 1 << 16)
    out = tmp_path / "rows.json"
    options = ["--sources", "2,3", "--outputs", "1,2", "--elements", "10,1000", "--dtypes", "BF16,F32"]
    assert bench_kernel.main([*options, "--repeats", "1", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["conditions"]["measured"] is True
    rows = [row for row in written["rows"] if row["provider"] == "numba"]
    cases = {(row["dtype"], row["sources"], row["outputs"], row["elements"]) for row in rows}
    assert len(cases) == len(rows) == 16
    for row in rows:
        itemsize = 2 if row["dtype"] == "BF16" else 4
        assert row["bytes_moved"] == (row["sources"] + row["outputs"]) * row["elements"] * itemsize
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["median_ms"] / 1e6)
        roofline = written["conditions"]["roofline_gb_per_s"]["cpu"]
        assert row["share_of_roofline"] == pytest.approx(row["gb_per_s"] / roofline)
    largest = [row for row in last_line(capsys)["largest"] if row["provider"] == "numba"]
    assert len(largest) == 8
    assert {row["elements"] for row in largest} == {1000}


def test_nothing_is_timed_when_the_gate_is_red(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernel, "correctness_gate", lambda device: ["numba on cpu"])
    monkeypatch.setattr(bench_kernel, "LARGE_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(bench_kernel, "measure", pytest.fail)
    assert bench_kernel.main(["--out", str(tmp_path / "rows.json")]) == 1
    assert not (tmp_path / "rows.json").exists()
    assert "numba on cpu" in capsys.readouterr().err


def test_the_gate_is_green_and_sees_one_wrong_bit(monkeypatch):
    monkeypatch.setattr(kernel_cases, "DTYPES", {"BF16": torch.bfloat16})
    monkeypatch.setattr(kernel_cases, "CHUNK_ELEMENTS", 500)
    assert kernel_cases.correctness_gate("cpu") == []
    right = kernel_cases.ours

    def wrong(sources, weights, outs):
        def call():
            right(sources, weights, outs)()
            outs[-1].view(torch.int16)[-1] ^= 1

        return call

    monkeypatch.setattr(kernel_cases, "ours", wrong)
    assert any(
        "numba on cpu, BF16, 1 of 2 x 4097" in failure for failure in kernel_cases.correctness_gate("cpu")
    )


def test_without_a_gpu_the_results_say_that_nothing_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_gpu.ahead_of_time, "CAPABILITIES", ((9, 0),))
    monkeypatch.setattr(kernel_gpu, "MAX_OUTPUTS", 1)
    out = tmp_path / "gpu.json"
    assert bench_kernel.main(["--device", "cuda", "--ahead-of-time", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["conditions"]["measured"] is False
    assert "no GPU" in written["conditions"]["reason"]
    [row] = written["rows"]
    assert row["capability"] == "sm_90"
    assert row["loads_of_16_bytes"] > 0
    assert row["fused_multiply_adds"] == row["spilled_bytes_per_thread"] == 0
    assert last_line(capsys)["measured"] is False


def test_a_gpu_that_is_not_there_is_said_to_be_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernel.main(["--device", "cuda", "--tune"]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "whole"), [(1 << 30, True), (1 << 20, False)])
def test_the_tensor_list_of_a_model_fits_and_shares_no_memory_within_a_sum(monkeypatch, free, whole):
    monkeypatch.setattr(kernel_gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(
        kernel_gpu, "MODEL", kernel_gpu.replace(kernel_gpu.MODEL, hidden=64, intermediate=96, vocabulary=999)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    groups, layers = kernel_gpu.model_groups(3, 2, "BF16", 32)
    assert (layers == 32) is whole
    assert len(groups) == 9 * layers + 3
    assert len({tensor.untyped_storage().data_ptr() for _, outs in groups for tensor in outs}) <= 2
    for sources, outs in groups:
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in (*sources, *outs))
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
