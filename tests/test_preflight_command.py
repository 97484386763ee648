"""The command `mergemix preflight` on a tiny family, with every kind of evidence, and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mergemix.preflight.texts import read_texts
from tests.command_line import Invoke, refused
from tests.serve.tiny_models import make_family
from tests.study_fixture import TinyStudy


def arguments(study: TinyStudy, *, base: bool = True) -> list[str]:
    experts = [f"--experts={name}={path}" for name, path in study.paths.items() if name != "base"]
    return ["preflight", *([f"--base={study.paths['base']}"] if base else []), *experts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "math.jsonl"
    lines = [{"text": "the cat in the hat"}, {"prompt": "1+1=", "answer": "2"}, {"text": "abc abc abcd"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_weights_alone(invoke: Invoke, tiny_study: TinyStudy) -> None:
    """Random experts are 0.4 of the base's norm away from it: measured, not trusted, and no failure."""
    code, out, err = invoke(*arguments(tiny_study), "--json", "--memory=64MiB")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    experts = [name for name in tiny_study.paths if name != "base"]
    assert result["verdict"] == "doubtful"
    assert {check["name"] for check in result["checks"]} >= {
        "tokenizer",
        "same base",
        "norms",
        "cosines",
        "layers",
    }
    for check in result["checks"]:
        assert set(check) == {"name", "verdict", "why", "value", "threshold"}
    assert list(result["norms"]) == list(result["moved"]) == list(result["cosine"]) == experts
    assert all(0.3 < norm < 0.5 for norm in result["norms"].values())
    assert all(abs(result["cosine"][a][b] - (a == b)) < 0.05 for a in experts for b in experts)
    assert [layer["layer"] for layer in result["layers"]][:2] == ["0", "1"]
    assert set(result["not_measured"]) == {"routing", "curvature", "paths"}


def test_all_evidence_as_a_table(invoke: Invoke, tiny_study: TinyStudy, corpus: Path) -> None:
    code, out, err = invoke(
        *arguments(tiny_study),
        f"--data=math={corpus}",
        f"--data=code={corpus}",
        *(f"--bench={path}" for path in tiny_study.bench),
        "--engine=hf",
    )
    assert code == 0, err
    for said in (
        "verdict: ",
        "barrier",
        "learned",
        "curvature",
        "norms by layer",
        "words",
        "copy",
        "uniform",
    ):
        assert said in out, out
    assert "paths: " in err, "what is being done is shown"


def test_a_mixture_of_experts_by_benchmark_prompts_alone(
    invoke: Invoke, tiny_study: TinyStudy, tmp_path: Path
) -> None:
    paths = make_family(tmp_path, "qwen3_moe", experts=2)
    experts = [f"--experts={name}={paths[name]}" for name in ("math", "code")]
    code, out, err = invoke(
        "preflight",
        f"--base={paths['base']}",
        *experts,
        f"--bench={tiny_study.bench[0]}",
        "--engine=hf",
        "--json",
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    routing = result["routing"]
    assert (routing["reference"], routing["experts"]) == ("base", 4)
    assert set(routing["agreement"]) == {"math", "code", "uniform"}
    assert all(routing["chance"] < share < 1 for share in routing["agreement"].values())
    assert len(routing["by_router"]["math"]) == 2
    paths_found = result["paths"]["score"]
    assert {barrier["name"] for barrier in paths_found["barriers"]} == {"words"}
    assert {(barrier["from"], barrier["to"]) for barrier in paths_found["barriers"]} == {
        ("math", "uniform"), ("code", "uniform"),
    }  # fmt: skip


def test_without_a_base(invoke: Invoke, tiny_study: TinyStudy, corpus: Path) -> None:
    code, out, err = invoke(
        *arguments(tiny_study, base=False), f"--data=math={corpus}", "--engine=hf", "--json"
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["reference"] == "mean of the experts"
    assert result["alignment"] is None
    assert set(result["moved"].values()) == {None}
    assert "give --base" in result["not_measured"]["curvature"]
    assert "base" not in result["paths"]["loss"]["ends"]


def test_an_expert_with_a_nan_is_a_verdict_and_no_error(
    invoke: Invoke, tiny_study: TinyStudy, corpus: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_study.paths["math"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    given = [
        f"--experts=code={tiny_study.paths['code']}",
        f"--experts=math={broken}",
        f"--data=math={corpus}",
    ]
    code, out, err = invoke(
        "preflight", f"--base={tiny_study.paths['base']}", *given, "--engine=hf", "--json"
    )
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    [why] = [check["why"] for check in result["checks"] if check["name"] == "finite"]
    assert result["verdict"] == "do not trust"
    assert why.startswith("math holds NaN or Inf, in model.norm.weight")
    assert result["norms"] == {"code": result["norms"]["code"], "math": None}
    assert set(result["not_measured"]) == {"routing", "curvature", "paths"}


def test_prompts_too_long_for_the_curvature_are_told(
    invoke: Invoke, tiny_study: TinyStudy, corpus: Path, tmp_path: Path
) -> None:
    """They are left out before documents are counted; a domain that has no others is named."""
    long = {"prompt": "the " * 300, "answer": "cat"}
    some, all_long = tmp_path / "some.jsonl", tmp_path / "long.jsonl"
    some.write_text(f"{json.dumps(long)}\n" * 10 + corpus.read_text())
    all_long.write_text(f"{json.dumps(long)}\n")
    code, out, err = invoke(
        *arguments(tiny_study), f"--data=math={corpus}", f"--data=code={some}", f"--data=web={all_long}",
        "--engine=hf", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert set(result["curvature"]["gamma"]) == {"math", "code"}
    assert "within 256 tokens" in result["not_measured"]["curvature of web"]


def test_bad_input_is_refused(invoke: Invoke, tiny_study: TinyStudy, tmp_path: Path) -> None:
    given = arguments(tiny_study)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"txt": "bad"}\n')
    refused(invoke("preflight"), 1, "no expert was given")
    refused(invoke(*given, f"--data=math={bad}"), 1, f"{bad}, line 2")
    refused(invoke(*given, f"--data=math={tmp_path / 'absent.jsonl'}"), 1, "absent.jsonl")
    refused(invoke(*given, f"--data=math={bad}", f"--data=math={bad}"), 2, "--data names 'math' twice")
    refused(invoke(*given, "--memory=1kB"), 1, "--memory")
    refused(invoke(*given, "--bench=absent.yaml"), 1, "absent.yaml")


def test_texts_are_cut_and_answers_scored(tiny_study: TinyStudy, corpus: Path) -> None:
    texts = read_texts({"math": corpus}, tiny_study.paths["base"], documents=2, tokens=8)["math"]
    assert [len(snippet.ids) for snippet in texts] == [8, 7]
    assert [snippet.num_read for snippet in texts] == [1, 5], "BOS, and the prompt"
    assert texts[1].num_scored == 2, "the answer and the end"
