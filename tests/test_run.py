"""The search loop on real models with the transformers engine: answer, resume, kill, failure."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import mergemix.run
from mergemix.config import RunConfig
from mergemix.errors import ConfigError, EngineError, MergeMixError, NonFiniteError, StudyError
from mergemix.mixture import Mixture
from mergemix.run import run
from mergemix.serve.engine import Engine, Output, Request, Swap
from mergemix.study import Study
from tests.study_fixture import TinyStudy, write_benchmark

TIMED = ("swaps", "generation_median_s", "overhead_median_s", "study")
BUDGET = 9


def config(tiny: TinyStudy, study: Path, **changes: Any) -> RunConfig:
    experts = {name: str(path) for name, path in tiny.paths.items() if name != "base"}
    given = {
        "experts": experts,
        "base": str(tiny.paths["base"]),
        "bench": tuple(map(str, tiny.bench)),
        "study": study,
        "budget": BUDGET,
        "engine": "hf",
        "seed": 7,
    }
    return RunConfig(**{**given, **changes})


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in TIMED}


@pytest.fixture(scope="module")
def finished(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run."""
    study = tmp_path_factory.mktemp("finished") / "study"
    return study, run(config(tiny_study, study))


def test_the_answer_has_every_promised_part(finished: tuple[Path, dict[str, Any]]) -> None:
    study, summary = finished
    assert summary["candidates"] == BUDGET
    assert summary["failed"] == 0
    assert summary["engine"] == "hf"
    assert "budget" in summary["stopped"]
    assert set(summary["baselines"]) == {"uniform", "base", "math", "code", "web"}
    best = summary["best"]
    assert abs(sum(best["mixture"].values()) - 1) < 1e-9
    assert best["utility"] >= max(v for k, v in summary["baselines"].items() if k != "base")
    low, high = best["interval"]
    mean = sum(best["capabilities"].values()) / len(best["capabilities"])
    assert best["utility"] == pytest.approx(mean), "macro is the mean of the capabilities' scores"
    assert low < best["utility"] < high
    assert summary["noise_floor"] == 0.0, "the transformers engine is deterministic on one machine"
    assert summary["swaps"]["count"] == BUDGET + 2
    assert summary["failures"] == []
    assert summary["swaps"]["proven"] is True
    assert summary["item_evaluations"] == (BUDGET + 2) * 36
    assert summary["overhead_median_s"] >= summary["swaps"]["median_s"] > 0
    assert best["mixture"] not in summary["indistinguishable"]
    assert json.loads((study / "mixture.json").read_text())["best"] == best


def test_what_is_stored_is_what_the_answer_says(finished: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = finished
    with Study.read(directory) as study:
        records = [record for record in study.candidates() if record.repeat == 0]
        means = {
            r.mixture: (r.scores["copy"] + r.scores["words"]) / 2 for r in records if any(r.mixture.weights)
        }
        best = max(means, key=lambda mixture: means[mixture])
        assert best.as_dict() == summary["best"]["mixture"]
        assert means[best] == pytest.approx(summary["best"]["utility"], rel=1e-12)
        assert len(study.results(records[0].id)) == 36


def test_a_finished_study_answers_again_without_an_engine(
    tiny_study: TinyStudy, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mergemix.run, "open_engine", lambda *_: pytest.fail("paid for a candidate twice"))
    study, summary = finished
    assert run(config(tiny_study, study)) == summary


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 8}, r"seed: the study has 7, this run has 8"),
        # What a study.yaml that leaves `search` out asks for may change with the version.
        ({"search": "cma"}, r'search: the study has "bo", this run has "cma"'),
    ],
)
def test_another_search_is_another_study(
    tiny_study: TinyStudy, finished: tuple[Path, dict[str, Any]], changed: dict[str, Any], told: str
) -> None:
    study, _ = finished
    before = (study / "mixture.json").read_bytes()
    with pytest.raises(StudyError, match=told):
        run(config(tiny_study, study, **changed))
    assert (study / "mixture.json").read_bytes() == before


def test_a_larger_budget_goes_on_with_the_same_search(tiny_study: TinyStudy, tmp_path: Path) -> None:
    short = run(config(tiny_study, tmp_path / "grown", budget=7))
    assert short["candidates"] == 7
    grown = run(config(tiny_study, tmp_path / "grown", budget=BUDGET))
    assert grown["candidates"] == BUDGET
    at_once = run(config(tiny_study, tmp_path / "at-once"))
    assert grown["best"] == at_once["best"]
    assert grown["baselines"] == at_once["baselines"]


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mergemix", *arguments, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stored(study: Path) -> int:
    """Candidates committed so far, read while the run is writing."""
    try:
        with sqlite3.connect(f"file:{study / 'study.sqlite'}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM candidate").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def wait_for(study: Path, candidates: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while stored(study) < candidates and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_again_and_again_it_still_gives_the_same_answer(
    tiny_study: TinyStudy, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """SIGKILL right after the 1st, 4th and 8th candidate was stored: nothing lost but the one in flight."""
    study = tmp_path / "study"
    arguments = tiny_study.arguments(study, budget=BUDGET)
    for candidates in (1, 4, 8):
        process = start(arguments)
        wait_for(study, candidates, process)
        process.kill()
        process.wait()
        assert stored(study) >= candidates
    process = start(arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert untimed(json.loads(out)) == untimed(finished[1])
    with Study.read(study) as opened:
        assert [record.repeat for record in opened.candidates()].count(0) == BUDGET


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_it_says_how_to_resume(
    tiny_study: TinyStudy, finished: tuple[Path, dict[str, Any]], tmp_path: Path, sent: signal.Signals
) -> None:
    study = tmp_path / "study"
    process = start(tiny_study.arguments(study, budget=BUDGET))
    wait_for(study, 3, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert f"stored in {study}" in err
    assert "Traceback" not in err
    assert set(json.loads(out)) == {"error"}
    assert stored(study) >= 3
    assert untimed(run(config(tiny_study, study))) == untimed(finished[1])


class Flaky(Engine):
    """Wraps a real engine and fails in `submit` on chosen calls, as a lost process would."""

    kind = "hf"

    def __init__(self, real: Engine, failures: set[int], counter: list[int]) -> None:
        self.real, self.failures, self.counter = real, failures, counter
        self.proven = real.proven

    def apply(self, mixture: Mixture) -> Swap:
        return self.real.apply(mixture)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        self.counter[0] += 1
        if self.counter[0] in self.failures:
            raise EngineError("the engine process ended")
        return self.real.submit(requests)

    def close(self) -> None:
        self.real.close()


def flaky(monkeypatch: pytest.MonkeyPatch, failures: set[int]) -> list[int]:
    started: list[int] = []
    counter = [0]
    real = mergemix.run.open_engine

    def open_engine(*arguments: Any) -> Engine:
        started.append(os.getpid())
        return Flaky(real(*arguments), failures, counter)

    monkeypatch.setattr(mergemix.run, "open_engine", open_engine)
    return started


def test_an_engine_that_dies_once_is_rebuilt_and_nothing_changes(
    tiny_study: TinyStudy,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = flaky(monkeypatch, {4})
    summary = run(config(tiny_study, tmp_path / "study"))
    assert len(started) == 2
    assert untimed(summary) == untimed(finished[1])


def test_a_candidate_that_fails_twice_is_recorded_and_the_search_goes_on(
    tiny_study: TinyStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky(monkeypatch, {8, 9})
    summary = run(config(tiny_study, tmp_path / "study"))
    assert summary["failed"] == 1
    assert summary["candidates"] == BUDGET
    with Study.read(tmp_path / "study") as study:
        [failed] = [record for record in study.candidates() if not record.done]
    assert failed.reason == "the engine process ended"
    assert summary["failures"] == [{"mixture": failed.mixture.as_dict(), "reason": failed.reason}]


def test_held_out_benchmarks_score_the_finalists_only(tiny_study: TinyStudy, tmp_path: Path) -> None:
    changes = {"holdout": tuple(map(str, tiny_study.holdout)), "budget": 6}
    summary = run(config(tiny_study, tmp_path / "study", **changes))
    holdout = summary["holdout"]
    assert set(holdout["utility"]) == {"best", "uniform", "base", "math", "code", "web"}
    assert holdout["items"] == 20
    for name, gain in holdout["gain"].items():
        difference = holdout["utility"]["best"] - holdout["utility"][name]
        assert gain["estimate"] == pytest.approx(difference, abs=1e-9)
    with Study.read(tmp_path / "study") as study:
        assert {result.benchmark for result in study.results(1)} == {"copy", "words"}


def test_an_item_of_the_search_is_not_held_out(tiny_study: TinyStudy, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--holdout: .*'copy-0' of .*copy\.yaml is in the benchmark 'copy'"
    ):
        run(config(tiny_study, tmp_path / "study", holdout=(str(tiny_study.bench[1]),)))


def test_another_holdout_is_refused_before_any_cost(
    tiny_study: TinyStudy,
    finished: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    study = tmp_path / "study"
    shutil.copytree(finished[0], study)
    held_out = write_benchmark(tmp_path, "other", 4, random.Random(9), "again", metric="loglikelihood")
    run(config(tiny_study, study, holdout=tuple(map(str, tiny_study.holdout))))
    monkeypatch.setattr(mergemix.run, "open_engine", lambda *_: pytest.fail("paid before it was refused"))
    with pytest.raises(StudyError, match="benchmark other"):
        run(config(tiny_study, study, holdout=(str(held_out),), budget=BUDGET + 3))


def test_a_run_that_never_got_to_a_result_binds_nobody(tiny_study: TinyStudy, tmp_path: Path) -> None:
    with pytest.raises(MergeMixError):
        run(config(tiny_study, tmp_path / "study", max_model_len=3, budget=5))
    assert run(config(tiny_study, tmp_path / "study", budget=5))["candidates"] == 5


def test_a_nan_in_the_base_stops_the_run(tiny_study: TinyStudy, tmp_path: Path) -> None:
    bad = tmp_path / "bad-base"
    shutil.copytree(tiny_study.paths["base"], bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight.*base"):
        run(config(tiny_study, tmp_path / "study", base=str(bad)))


@pytest.mark.parametrize("search", ["random", "grid"])
def test_the_other_searches_run_too(tiny_study: TinyStudy, tmp_path: Path, search: str) -> None:
    summary = run(config(tiny_study, tmp_path / "study", search=search, budget=7, normalize="zscore"))
    assert summary["candidates"] <= 7
    assert summary["best"]["utility"] > summary["baselines"]["uniform"] - 1e-12


def test_a_utility_that_cannot_be_is_refused_before_any_cost(tiny_study: TinyStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="physics"):
        run(config(tiny_study, tmp_path / "study", utility="physics"))
    assert not (tmp_path / "study").exists()
