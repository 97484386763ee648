"""mergemix merge --mixtures, average and plan as users and scripts meet them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergemix.checkpoints.ranges import LocalFile
from mergemix.merge import estimate
from mergemix_kernels.reference import weighted_sum
from tests.checkpoints.hub_stand_in import COMMIT, StandInHub, connect, serve
from tests.command_line import Invoke, refused
from tests.tiny import random_tensors, write_checkpoint

SHAPES = {"embed": (40, 16), "layer.weight": (16, 33), "norm": (16,)}
NAMES = ("math", "code", "web")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three experts, and the current one."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        write_checkpoint(tmp_path / name, random_tensors(SHAPES, seed))
    return tmp_path


def experts(*names: str) -> list[str]:
    return [f"--experts={name}={name}" for name in names or NAMES]


def check(directory: Path, sources: dict[str, float]) -> None:
    """The checkpoint in `directory` is the weighted sum of `sources`, by the torch reference, bit for bit."""
    loaded = [load_file(Path(source) / "model.safetensors") for source in sources]
    merged = load_file(directory / "model.safetensors")
    assert merged.keys() == loaded[0].keys()
    for name, tensor in merged.items():
        wanted = weighted_sum([each[name] for each in loaded], list(sources.values()))
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name


MIXTURES = """\ufeff{"name": "mostly-math", "weights": {"math": 3, "web": 1}}\r
\r
{"code": 1, "math": 1}\r
"""


def test_many_mixtures_from_one_read(models: Path, invoke: Invoke) -> None:
    Path("m.jsonl").write_text(MIXTURES)
    code, out, err = invoke("merge", *experts(), "--mixtures=m.jsonl", "--out=out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["out"] == "out"
    assert [(each["name"], each["out"]) for each in result["outputs"]] == [
        ("mostly-math", "out/mostly-math"),
        ("mixture-0002", "out/mixture-0002"),
    ]
    assert result["outputs"][0]["given"] == {"math": 3, "web": 1}
    assert result["outputs"][1]["mixture"] == {"math": 0.5, "code": 0.5, "web": 0.0}
    check(models / "out" / "mostly-math", {"math": 0.75, "web": 0.25})
    check(models / "out" / "mixture-0002", {"math": 0.5, "code": 0.5})
    size = sum(t.nbytes for t in random_tensors(SHAPES, 0).values())
    assert (result["bytes_read"], result["bytes_written"]) == (3 * size, 2 * size)
    assert set(result) == {
        "out", "outputs", "tensors", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes"
    }  # fmt: skip
    assert sorted(path.name for path in models.iterdir()) == ["code", "m.jsonl", "math", "out", "web"]
    code, out, err = invoke("merge", *experts(), "--mixtures=m.jsonl", "--out=people")
    assert code == 0, err
    assert "mostly-math" in out
    assert "people/mixture-0002" in out


def test_one_mixture_of_a_file_still_gets_its_directory(models: Path, invoke: Invoke) -> None:
    Path("m.jsonl").write_text('{"math": 1, "code": 1}')
    code, _, err = invoke("merge", *experts(), "--mixtures=m.jsonl", "--out=out")
    assert code == 0, err
    assert [path.name for path in (models / "out").iterdir()] == ["mixture-0001"]


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "'--weights'"),
        (["--weights=math=1", "--mixtures=m.jsonl"], 2, "'--mixtures'"),
        (["--mixtures=nowhere"], 1, "nowhere"),
        (["--mixtures=m.jsonl"], 1, "m.jsonl:2: no expert is called 'physics'"),
        (["--weights=math=-1"], 1, "math=-1"),
        (["--weights=math=1,code=1", "--no-normalize"], 1, "--base"),
        (["--weights=math=1,code=1", "--base=nowhere"], 1, "'nowhere'"),
        (["--weights=math=1,code=1", "--memory=lots"], 2, "lots"),
    ],
)
def test_options_that_make_no_sense(
    models: Path, invoke: Invoke, command: str, options: list[str], code: int, said: str
) -> None:
    Path("m.jsonl").write_text('{"math": 1}\n{"physics": 1}\n')
    before = sorted(models.iterdir())
    refused(invoke(command, *experts(), "--out=out", *options), code, said)
    assert sorted(models.iterdir()) == before


def test_a_bad_mixture_is_told_before_any_checkpoint_is_opened(models: Path, invoke: Invoke) -> None:
    Path("m.jsonl").write_text("{}")
    refused(invoke("merge", "--experts=a=gone,b=gone", "--mixtures=m.jsonl", "--out=o"), 1, "m.jsonl:1")


def test_a_plan_that_fits(models: Path, invoke: Invoke) -> None:
    Path("m.jsonl").write_text(MIXTURES)
    before = sorted(models.iterdir())
    code, out, err = invoke("plan", *experts(), "--mixtures=m.jsonl", "--out=out", "--json")
    assert code == 0, err
    foretold = json.loads(out)
    assert foretold["fits"] is True
    assert [each["name"] for each in foretold["outputs"]] == ["mostly-math", "mixture-0002"]
    code, out, err = invoke("plan", *experts(), "--weights=math=1,code=1", "--out=out")
    assert code == 0, err
    for text in ("read math", "page cache", "host memory", "device memory", "disk", "time", "swap", "fits"):
        assert text in out
    assert "web" not in out
    assert sorted(models.iterdir()) == before


def test_merge_refuses_what_plan_says_cannot_fit(
    models: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("m.jsonl").write_text(MIXTURES)
    monkeypatch.setattr(estimate, "free_disk", lambda out: 8000)
    arguments = [*experts(), "--mixtures=m.jsonl", "--out=out", "--memory=1kB"]
    code, out, err = invoke("plan", *arguments, "--json")
    assert code == 1
    foretold = json.loads(out)
    assert foretold["fits"] is False
    assert "Traceback" not in err
    assert len(foretold["reasons"]) == 2
    assert "at most 1 of the 2 mixtures fit" in foretold["reasons"][1]
    code, out, _ = invoke("plan", *arguments)
    assert code == 1
    assert "does NOT fit" in out
    monkeypatch.setattr(LocalFile, "read_into", lambda *_: pytest.fail("a tensor byte was read"))
    refused(invoke("merge", *arguments), 1, *foretold["reasons"])
    assert sorted(path.name for path in models.iterdir()) == ["code", "m.jsonl", "math", "web"]


def test_average_is_the_mean_bit_for_bit(models: Path, invoke: Invoke) -> None:
    code, out, err = invoke("average", *NAMES, "--out=out", "--json")
    assert code == 0, err
    result = json.loads(out)
    check(models / "out", dict.fromkeys(NAMES, 1 / 3))
    assert [(each["name"], each["source"]) for each in result["checkpoints"]] == [(n, n) for n in NAMES]
    assert {each["score"] for each in result["checkpoints"]} == {None}
    assert set(result) >= {"out", "tensors", "bytes_read", "bytes_written", "seconds", "peak_rss_bytes"}
    code, out, err = invoke("average", *NAMES, "--weights=1,0, 3", "--out=weighted", "--json")
    assert code == 0, err
    check(models / "weighted", {"math": 0.25, "web": 0.75})
    assert [each["weight"] for each in json.loads(out)["checkpoints"]] == [0.25, 0, 0.75]


def test_average_of_many_checkpoints_of_runs(tmp_path: Path, invoke: Invoke) -> None:
    """More than a merge of experts could take at first; basenames that are equal."""
    sources = [tmp_path / f"run{number % 2}" / f"checkpoint-{number // 2}" for number in range(80)]
    for seed, source in enumerate(sources):
        write_checkpoint(source, random_tensors({"w": (7, 5)}, seed))
    code, out, err = invoke("average", *sources, f"--out={tmp_path / 'out'}", "--json")
    assert code == 0, err
    assert json.loads(out)["checkpoints"][3]["name"] == "run1/checkpoint-1"
    check(tmp_path / "out", {str(source): 1 / 80 for source in sources})


def test_the_best_of_a_run(models: Path, invoke: Invoke) -> None:
    Path("scores.csv").write_text("checkpoint,score\nmath,0.5\ncode,0.25\nweb,0.25\n")
    code, out, err = invoke("average", *NAMES, "--top=2", "--scores=scores.csv", "--out=out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [(each["name"], each["score"]) for each in result["checkpoints"]] == [
        ("math", 0.5),
        ("code", 0.25),
    ]
    assert result["left_out"] == [{"name": "web", "source": "web", "score": 0.25}]
    assert result["ties"] == ["code", "web"]
    check(models / "out", {"math": 0.5, "code": 0.5})
    code, out, err = invoke("average", *NAMES, "--top=2", "--scores=scores.csv", "--minimize", "--out=low")
    assert code == 0, err
    assert "left out" in out
    check(models / "low", {"code": 0.5, "web": 0.5})
    code, out, err = invoke("average", *NAMES, "--top=1", "--scores=scores.csv", "--out=one")
    assert code == 0, err
    merged, expert = (load_file(Path(root) / "model.safetensors") for root in ("one", "math"))
    assert all(torch.equal(merged[name], expert[name]) for name in expert)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["math"], 1, "takes 2 to 1024 checkpoints, but got 1"),
        ([], 2, "CHECKPOINT"),
        (["math", "./math/"], 1, "same checkpoint as math"),
        (["math", "gone"], 1, "'gone'"),
        (["math", "code", "--weights=1"], 1, "2 checkpoints, 1 weights"),
        (["math", "code", "--weights=1,x"], 2, "'x' is no number"),
        (["math", "code", "--weights=1,-1"], 1, "code=-1"),
        (["math", "code", "--top=1"], 2, "'--scores'"),
        (["math", "code", "--scores=s.csv"], 2, "'--top'"),
        (["math", "code", "--minimize"], 2, "'--minimize'"),
        (["math", "code", "--top=3", "--scores=s.csv"], 1, "from 1 to 2"),
        (["math", "code", "--top=1", "--scores=s.csv"], 1, "no score of code"),
        (["math", "other"], 1, "norm"),
        (["math", "code", "--memory=1"], 1, "--memory"),
    ],
)
def test_an_average_that_makes_no_sense(
    models: Path, invoke: Invoke, options: list[str], code: int, said: str
) -> None:
    Path("s.csv").write_text("checkpoint,score\nmath,1\n")
    write_checkpoint(models / "other", random_tensors({**SHAPES, "norm": (15,)}, 0))
    before = sorted(models.iterdir())
    refused(invoke("average", *options, "--out=out"), code, said)
    assert sorted(models.iterdir()) == before


def test_nothing_imports_torch(models: Path) -> None:
    """A merge on the CPU, all three commands in one process, needs numpy and numba only."""
    Path("m.jsonl").write_text(MIXTURES)
    script = "import sys\nfrom mergemix.cli import main\n"
    for arguments in (
        ["merge", *experts(), "--weights=math=1,code=1", "--out=one"],
        ["merge", *experts(), "--mixtures=m.jsonl", "--out=many"],
        ["plan", *experts(), "--mixtures=m.jsonl", "--out=more"],
        ["average", *NAMES, "--out=mean"],
    ):
        script += f"sys.argv = ['mergemix', *{arguments!r}]\nmain()\n"
    script += (
        "loaded = {'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)\nassert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    hub = StandInHub("org/expert", models / "math", {"main": COMMIT}, storage=True)
    with serve(hub):
        connect(hub, models / "cache", monkeypatch)
        yield hub


def test_a_hub_id_without_a_local_copy(models: Path, invoke: Invoke, hub: StandInHub) -> None:
    mixed = ["--experts=math=org/expert", "--experts=code=code"]
    code, out, err = invoke("plan", *mixed, "--weights=math=1,code=3", "--out=out", "--no-download", "--json")
    assert code == 0, err
    foretold = json.loads(out)
    assert [(each["name"], each["from"]) for each in foretold["reads"]] == [("math", "hub"), ("code", "disk")]
    assert foretold["bandwidths"]["hub_read_bytes_per_s"] > 0
    assert "hub_read" in foretold["stages"]
    code, _, err = invoke("merge", *mixed, "--weights=math=1,code=3", "--out=out", "--no-download")
    assert code == 0, err
    check(models / "out", {"math": 0.25, "code": 0.75})
    code, _, err = invoke("average", "org/expert", "code", "--out=mean", "--no-download")
    assert code == 0, err
    check(models / "mean", {"math": 0.5, "code": 0.5})
    weights = [Path(folder) / file for folder, _, files in os.walk(models / "cache") for file in files]
    assert not [path for path in weights if path.suffix == ".safetensors"]
