"""Verification on real studies: trained checkpoints scored live, measured scores, resuming, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import open_family
from mergemix.config import RunConfig
from mergemix.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    MergeMixError,
    NonFiniteError,
    StudyError,
)
from mergemix.identity import stored_config
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.rank_stats import agreement, bootstrap, correlations
from mergemix.run import run
from mergemix.serve.engine import Swap
from mergemix.serve.hf_engine import HfEngine
from mergemix.study import VERIFICATION, Estimate, ItemRecord, Study
from mergemix.verify import measure, verify
from tests.checkpoints.peft_adapters import write_adapter
from tests.command_line import Invoke, refused
from tests.study_fixture import TinyStudy

NAMES = ("math", "code", "web")
SHARES = (
    (0.5, 0.5, 0.0),
    (0.2, 0.3, 0.5),
    (0.1, 0.8, 0.1),
    (0.7, 0.1, 0.2),
    (0.25, 0.25, 0.5),
    (0.0, 0.4, 0.6),
)
MIXTURES = [Mixture(NAMES, shares) for shares in SHARES]
NOISE = 0.002  # of weights: another seed


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """What is told does not hang on how many draws an interval has."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bootstrap, agreement):
            patch.setattr(module, "RESAMPLES", 200)
        patch.setattr(correlations, "PERMUTATIONS", 200)
        yield


@pytest.fixture(scope="module")
def searched(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with the transformers engine."""
    experts = {name: str(path) for name, path in tiny_study.paths.items() if name != "base"}
    directory = tmp_path_factory.mktemp("searched") / "study"
    bench = tuple(map(str, tiny_study.bench))
    run(RunConfig(experts=experts, bench=bench, study=directory, budget=5, engine="hf", search="random"))
    return directory


@pytest.fixture(scope="module")
def trained(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """References that are their own proxies: merges on disk as seed 1, those and a little noise as seed 2."""
    directory = tmp_path_factory.mktemp("trained")
    family = open_family(None, {name: str(tiny_study.paths[name]) for name in NAMES})
    lines = []
    for number, mixture in enumerate(MIXTURES):
        exact, noisy = (directory / f"{number}-{seed}" for seed in (1, 2))
        merge_to_directory(family, mixture, exact, memory_bytes=1 << 24)
        shutil.copytree(exact, noisy)
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: (tensor.float() + NOISE * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
            for name, tensor in load_file(exact / "model.safetensors").items()
        }
        save_file(tensors, noisy / "model.safetensors", metadata={"format": "pt"})
        lines += [
            {"mixture": mixture.as_dict(), "checkpoint": p.name, "seed": int(p.name[-1])}
            for p in (exact, noisy)
        ]
    return write(directory / "references.jsonl", lines)


@pytest.fixture
def study(searched: Path, tmp_path: Path) -> Path:
    """A copy of the study, to be changed."""
    return Path(shutil.copytree(searched, tmp_path / "study"))


@pytest.fixture(scope="module")
def done(
    searched: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A study with its verification."""
    directory = Path(shutil.copytree(searched, tmp_path_factory.mktemp("done") / "study"))
    return directory, verify(directory, trained)


def write(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at(path: Path, lines: Sequence[Mapping[str, Any]], checkpoints: Path) -> Path:
    """Lines in another directory than their checkpoints."""
    return write(path, [{**line, "checkpoint": str(checkpoints / line["checkpoint"])} for line in lines])


def lasting(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("study", "trained", "evaluated")}


def no_engine(*_: object) -> Any:
    pytest.fail("paid for a score twice")


def test_a_reference_that_is_its_proxy_scores_the_same(done: tuple[Path, dict[str, Any]]) -> None:
    directory, result = done
    assert result["references"] == len(MIXTURES)
    assert result["runs"] == 2 * len(MIXTURES)
    assert result["evaluated"] == {"proxies": len(MIXTURES), "checkpoints": 2 * len(MIXTURES)}
    for mixture, point in zip(MIXTURES, result["calibration"], strict=True):
        assert point["mixture"] == mixture.as_dict()
        assert point["seeds"] == [1, 2]
        assert point["sources"] == ["checkpoint"] * 2
        assert point["trained"]["overall"][0] == point["proxy"]["overall"], "the same weights, bit for bit"
        assert point["trained"]["overall"][1] != point["proxy"]["overall"]
    with Study.read(directory) as study:
        assert [record.origin for record in study.candidates()].count("verify") == len(MIXTURES)
    with Study.read(directory / "trained") as scored:
        assert all(record.done and record.proven for record in scored.candidates())
    assert "line 1" in str(scored_sources(directory))


def scored_sources(directory: Path) -> dict[str, Any]:
    with Study.read(directory / "trained") as study:
        return dict(study.info["checkpoints"])


def test_what_is_told_follows_from_the_scores(done: tuple[Path, dict[str, Any]]) -> None:
    _, result = done
    assert set(result["capabilities"]) == {"language", "copying"}
    for found, name in ((result["overall"], None), *((f, n) for n, f in result["capabilities"].items())):

        def pick(scores: Mapping[str, Any], name: str | None = name) -> Any:
            return scores["overall"] if name is None else scores["capabilities"][name]

        proxy = np.array([pick(point["proxy"]) for point in result["calibration"]])
        runs = np.array([pick(point["trained"]) for point in result["calibration"]])
        mean = runs.mean(axis=1)
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(proxy, mean).statistic)
        assert found["kendall"] == pytest.approx(scipy.stats.kendalltau(proxy, mean).statistic)
        assert found["interval"][0] <= found["spearman"] <= found["interval"][1]
        assert found["regret"] == pytest.approx(mean.max() - mean[proxy == proxy.max()].mean())
        assert found["offset"]["mean"] == pytest.approx((proxy - mean).mean())
        seeds = scipy.stats.spearmanr(runs[:, 0], runs[:, 1]).statistic
        assert found["ceiling"]["seed_to_seed"] == pytest.approx(seeds)
        assert found["ceiling"]["ceiling"] == pytest.approx(math.sqrt(2 * seeds / (1 + seeds)))
        assert found["corrected"]["spearman"] == pytest.approx(
            found["spearman"] / found["ceiling"]["ceiling"]
        )
        assert found["seeds"] == 2
        assert found["top"]["size"] == 2
    assert result["intervals_over"] == ["references", "items"]
    assert result["warnings"] == []


def test_nothing_is_paid_for_twice(
    done: tuple[Path, dict[str, Any]], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "open_engine", no_engine)
    directory, result = done
    again = verify(directory, trained)
    assert again["evaluated"] == {"proxies": 0, "checkpoints": 0}
    assert lasting(again) == lasting(result)


def test_references_may_follow_later_under_other_paths(
    done: tuple[Path, dict[str, Any]], trained: Path, study: Path, tmp_path: Path
) -> None:
    lines = read(trained)
    moved = Path(shutil.copytree(trained.parent, tmp_path / "moved"))
    first = verify(study, at(tmp_path / "first.jsonl", lines[4:8], trained.parent))
    assert first["evaluated"] == {"proxies": 2, "checkpoints": 4}
    both = verify(study, at(tmp_path / "both.jsonl", lines, moved))
    assert both["evaluated"] == {"proxies": len(MIXTURES) - 2, "checkpoints": 2 * len(MIXTURES) - 4}
    assert lasting(both) == lasting(done[1])


def test_killed_while_it_scores_checkpoints_it_goes_on_there(
    done: tuple[Path, dict[str, Any]], trained: Path, study: Path
) -> None:
    """SIGKILL after the third checkpoint was stored: nothing is lost but the one in flight."""
    command = [sys.executable, "-m", "mergemix", "verify", f"--study={study}", f"--trained={trained}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(candidates(study / "trained")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    proxies, checkpoints = candidates(study), candidates(study / "trained")
    assert 3 <= len(checkpoints) < 2 * len(MIXTURES), "it was killed in between"
    result = verify(study, trained)
    assert result["evaluated"] == {"proxies": 0, "checkpoints": 2 * len(MIXTURES) - len(checkpoints)}
    assert lasting(result) == lasting(done[1])
    assert candidates(study) == proxies
    assert candidates(study / "trained")[: len(checkpoints)] == checkpoints


def candidates(directory: Path) -> list[Any]:
    """All that is stored of candidates, also while it is written."""
    try:
        with sqlite3.connect(f"file:{directory / 'study.sqlite'}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT * FROM candidate ORDER BY id").fetchall()
    except sqlite3.OperationalError:
        return []


def test_a_proxy_that_was_stopped_early_is_asked_everything_beside_it(
    study: Path, trained: Path, tmp_path: Path
) -> None:
    with Study.read(study) as opened:
        identity, info = opened.identity, opened.info
        [first, *_] = [opened.results(record.id) for record in opened.candidates()]
    half = [ItemRecord(r.benchmark, r.item, -99.0, None) for r in first if r.benchmark == "words"]
    with Study.open(study, identity, info) as opened:
        estimate = Estimate(-9.0, 1.0, {"words": (-18.0, 1.0), "copy": (0.0, 0.1)})
        opened.record(MIXTURES[0], origin="cma", results=half, timings={}, stopped=("worse", estimate))
    result = verify(study, at(tmp_path / "two.jsonl", read(trained)[:4], trained.parent))
    assert result["calibration"][0]["proxy"]["overall"] == result["calibration"][0]["trained"]["overall"][0]
    with Study.read(study) as opened:
        assert opened.find(MIXTURES[0]).status == "stopped"  # type: ignore[union-attr]
        assert opened.find(MIXTURES[0], repeat=1).origin == "verify"  # type: ignore[union-attr]
    assert verify(study, tmp_path / "two.jsonl")["evaluated"] == {"proxies": 0, "checkpoints": 0}


def test_the_search_goes_on_after_a_verification(study: Path, tmp_path: Path) -> None:
    """What verification has measured is held out, be it the best of all: proposals and answer stay."""
    with Study.read(study) as opened:
        config, identity, info = stored_config(opened.info, study), opened.identity, opened.info
        [first, *_] = opened.candidates()
        perfect = [ItemRecord(r.benchmark, r.item, 9.0, None) for r in opened.results(first.id)]
    with Study.open(study, identity, info) as opened:
        opened.record(MIXTURES[0], origin=VERIFICATION, results=perfect, timings=first.timings)
        before = opened.candidates()
    longer, fresh = (run(replace(config, study=each, budget=6)) for each in (study, tmp_path / "fresh"))
    assert longer["best"] == fresh["best"]
    with Study.read(study) as opened, Study.read(tmp_path / "fresh") as other:
        assert [r.id for r in opened.candidates()][: len(before)] == [r.id for r in before]
        searched = [r.mixture for r in opened.candidates() if r.origin != VERIFICATION and not r.repeat]
        assert searched == [r.mixture for r in other.candidates() if not r.repeat]


def test_references_may_be_adapters(tiny_study: TinyStudy, tmp_path: Path) -> None:
    """Trained on the study's base, beside whole checkpoints; here they are the experts themselves."""
    base, web = tiny_study.paths["base"], tiny_study.paths["web"]
    write_adapter(base, tmp_path / "math", target_modules=["q_proj", "v_proj"], r=3, size=0.1)
    experts = {"math": str(tmp_path / "math"), "web": str(web)}
    bench = tuple(map(str, tiny_study.bench))
    directory = tmp_path / "study"
    run(
        RunConfig(
            experts=experts,
            base=str(base),
            bench=bench,
            study=directory,
            budget=4,
            engine="hf",
            search="random",
        )
    )
    lines = [{"mixture": {name: 1}, "checkpoint": path} for name, path in experts.items()]
    result = verify(directory, write(tmp_path / "references.jsonl", lines))
    assert result["evaluated"] == {"proxies": 0, "checkpoints": 2}
    for point in result["calibration"]:
        assert point["trained"]["overall"] == [point["proxy"]["overall"]]
    assert any("2 of 2 references have a single domain" in warning for warning in result["warnings"])


def test_what_fails_is_left_out_and_told(
    study: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the checkpoints, and the proxy of another mixture."""
    real = HfEngine.apply

    def failing(self: HfEngine, mixture: Mixture) -> Swap:
        if mixture == MIXTURES[2] or mixture.as_dict().get("line 3") == 1:
            raise EngineError("out of memory")
        return real(self, mixture)

    monkeypatch.setattr(HfEngine, "apply", failing)
    result = verify(study, at(tmp_path / "some.jsonl", read(trained)[:8], trained.parent))
    assert [point["mixture"] for point in result["calibration"]] == [
        MIXTURES[number].as_dict() for number in (0, 1, 3)
    ]
    assert [point["seeds"] for point in result["calibration"]] == [[1, 2], [2], [1, 2]]
    assert result["runs"] == 5
    assert f"the proxy of {MIXTURES[2]} is left out: out of memory" in result["warnings"]
    assert "the training run of line 3 is left out: out of memory" in result["warnings"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("nan", NonFiniteError, "line 2"),
        ("shape", MergeMixError, r"differs in (shape|hidden_size|vocab_size).*line"),
        ("twice", ConfigError, r"line 3 .* has the contents of line 1"),
        ("gone", CheckpointError, "nowhere"),
    ],
)
def test_checkpoints_that_cannot_be_scored(
    study: Path, trained: Path, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    lines = read(trained)[:4]
    broken = Path(shutil.copytree(trained.parent / lines[1]["checkpoint"], tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    if change == "nan":
        tensors["model.norm.weight"][0] = math.nan
    if change == "shape":
        tensors["model.norm.weight"] = torch.ones(3, dtype=torch.bfloat16)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    lines[1]["checkpoint"] = str(broken) if change != "gone" else "nowhere"
    if change == "twice":
        lines[1]["checkpoint"] = lines[0]["checkpoint"]
        lines[1], lines[2] = {**lines[1], "checkpoint": lines[3]["checkpoint"]}, {**lines[2], "seed": 5}
        lines[2]["checkpoint"] = str(
            shutil.copytree(trained.parent / lines[0]["checkpoint"], tmp_path / "copy")
        )
        lines[3]["checkpoint"] = read(trained)[4]["checkpoint"]
    with pytest.raises(error, match=message):
        verify(study, at(tmp_path / "references.jsonl", lines, trained.parent))
    with Study.read(study) as opened:
        scored = any(record.origin == VERIFICATION for record in opened.candidates())
    assert scored == (change == "nan"), "what can be seen at once costs no proxy"


def test_experts_that_have_moved(study: Path, trained: Path, tiny_study: TinyStudy, tmp_path: Path) -> None:
    """The study says what is missing and what to do; a configuration with the new places is taken."""
    with Study.read(study) as opened:
        config, identity, info = stored_config(opened.info, study), opened.identity, opened.info
    models = Path(shutil.copytree(tiny_study.paths["math"].parent, tmp_path / "models"))
    pairs = [[name, str(tmp_path / "gone" / name)] for name in NAMES]
    with Study.open(study, identity, {**info, "config": {**info["config"], "experts": pairs}}):
        pass
    two = at(tmp_path / "two.jsonl", read(trained)[:4], trained.parent)
    with pytest.raises(CheckpointError, match=r"gone.*has moved, give --config study.yaml"):
        verify(study, two)
    moved = replace(config, experts={name: str(models / name) for name in NAMES})
    assert verify(study, two, config=moved)["evaluated"]["checkpoints"] == 4
    assert verify(study, two)["evaluated"]["checkpoints"] == 0, "from now on the study knows"
    plain = replace(moved, budget=77, seed=77, max={NAMES[0]: 0.7})
    verify(study, two, config=plain)
    with Study.read(study) as opened:
        kept = stored_config(opened.info, study)
    assert (kept.budget, kept.seed, kept.max) == (config.budget, config.seed, config.max)
    other = replace(moved, experts={**moved.experts, "web": str(models / "base")})
    with pytest.raises(StudyError, match="expert web"):
        verify(study, two, config=other)
    fewer = replace(moved, bench=moved.bench[:1])
    with pytest.raises(StudyError, match=r"benchmark copy: the study has .*, this run has nothing"):
        verify(study, two, config=fewer)


def test_a_study_that_does_not_say_how_it_was_configured(study: Path, trained: Path) -> None:
    with Study.read(study) as opened:
        identity, info = opened.identity, opened.info
    without = {key: value for key, value in info.items() if key != "config"}
    with Study.open(study, identity, without):
        pass
    with pytest.raises(StudyError, match=r"run the same `mergemix run` command once more.*--config"):
        verify(study, trained)
    old = {key: value for key, value in info["config"].items() if key not in ("groups", "holdout", "tokens")}
    assert stored_config({**info, "config": old}, study) == stored_config(info, study), "their defaults"
    with Study.open(study, identity, {**info, "config": {**info["config"], "newer": 1}}):
        pass
    with pytest.raises(StudyError, match="newer, which this version does not know"):
        verify(study, trained)


def test_a_study_keeps_its_whole_configuration(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was given, experts in their order, and to be used from any directory."""
    monkeypatch.chdir(tiny_study.paths["math"].parent)
    config = RunConfig(
        experts={"web": "web", "math": "math", "code": "code"},
        base="base",
        bench=("../bench/words.yaml",),
        study=tmp_path / "study",
        budget=8,
        engine="hf",
        search="random",
        groups={"texts": ("web", "code")},
        max={"texts": 0.9},
        prior={"web": 1, "math": 2, "code": 1},
        utility="worst",
    )
    run(config)
    monkeypatch.chdir(tmp_path)
    with Study.read(tmp_path / "study") as study:
        again = stored_config(study.info, tmp_path / "study")
    assert list(again.experts) == ["web", "math", "code"]
    assert again.experts["web"] == str(tiny_study.paths["web"])
    assert again.base == str(tiny_study.paths["base"])
    assert Path(again.bench[0]).samefile(tiny_study.bench[0])
    assert replace(again, experts=config.experts, base=config.base, bench=config.bench) == config
    summary = run(again)
    assert summary["candidates"] == 8


def test_another_engine_is_refused(study: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "resolve_kind", lambda kind: kind)
    with pytest.raises(StudyError, match='engine: the study has "hf", this run has "vllm"'):
        verify(study, trained, engine="vllm")


def test_the_command(
    done: tuple[Path, dict[str, Any]], trained: Path, tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    directory, result = done
    arguments = ["verify", f"--study={directory}", f"--trained={trained}"]
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    assert lasting(json.loads(out)) == lasting(result)
    config = {
        "experts": {name: str(tiny_study.paths[name]) for name in NAMES},
        "bench": [str(path) for path in tiny_study.bench],
        "search": "random",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    code, out, err = invoke(*arguments, "--top=3", "--engine=hf", f"--config={tmp_path / 'study.yaml'}")
    assert code == 0, err
    assert "Verdict: " in out
    assert "best 3, by chance 50%" in out.replace("\n", " ")
    refused(invoke(*arguments, "--top=6"), 1, "--top must be from 1 to 5", "but is 6")
    refused(invoke("verify", f"--study={directory}"), 2, "--trained")
    refused(invoke("verify", f"--study={tmp_path}", f"--trained={trained}"), 1, "a study must exist")
