"""The benchmark of evaluation: both sides are asked the same, and what it says follows from what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_eval
from benchmarks.bench_eval import ALONE, OURS, PEER, PEER_WHOLE, Timed, rows_of, share_alike, verdicts_of
from benchmarks.eval_items import CHOOSE, GENERATE, MAX_TOKENS, Files, write_files
from benchmarks.eval_peer import answers
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.serve.engine import Generate, LogLikelihood

COUNT = 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(tmp_path_factory.mktemp("items") / "bench", COUNT)


def test_both_sides_are_asked_the_same(files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files.tasks), include_defaults=False)
    asked: list[Any] = []
    for name, task in manager.load([GENERATE, CHOOSE])["tasks"].items():
        task.build_all_requests()
        for instance in task.instances:
            if name == GENERATE:
                context, options = instance.args
                asked.append(Generate(context, options["max_gen_toks"], tuple(options["until"])))
            else:
                asked.append(LogLikelihood(*instance.args))
    suite = Suite(load_benchmarks([str(path) for path in files.ours]))
    assert suite.item_counts == {CHOOSE: COUNT // 2, GENERATE: COUNT - COUNT // 2}
    assert sorted(map(repr, suite.batch().requests)) == sorted(map(repr, asked))
    assert {r.max_tokens for r in suite.batch().requests if isinstance(r, Generate)} == {MAX_TOKENS}


def test_items_differ_and_share_their_examples(files: Files) -> None:
    suite = Suite(load_benchmarks([str(path) for path in files.ours]))
    prompts = {r.prompt for r in suite.batch().requests if isinstance(r, Generate)}
    prompts |= {r.context for r in suite.batch().requests if isinstance(r, LogLikelihood)}
    assert len(prompts) == COUNT
    starts = {str(prompt).rpartition("question:")[0] for prompt in prompts}
    assert len(starts) == 1


def test_answers_of_the_peer_by_item() -> None:
    doc = {"choices": ["a", "b"]}
    found = answers(
        {
            GENERATE: [
                {"doc_id": 1, "filtered_resps": ["one"]},
                {"doc_id": 0, "filtered_resps": ["zero"]},
            ],
            CHOOSE: [
                {"doc_id": 0, "doc": doc, "filtered_resps": [("-2.0", "False"), ("-1.5", "True")]},
                {"doc_id": 1, "doc": doc, "filtered_resps": [(-1.0, False), (-1.5, True)]},
            ],
        }
    )
    assert found == {GENERATE: ["zero", "one"], CHOOSE: ["b", "a"]}


def timed(seconds: float, generate_s: float, **rest: Any) -> Timed:
    return Timed(seconds, generate_s, **rest)


def test_overhead_is_what_a_candidate_takes_beyond_generation() -> None:
    found = {
        OURS: [timed(10.4, 10.0, swap_s=0.3, score_s=0.1), timed(10.2, 10.0)],
        ALONE: [timed(9.9, 9.8), timed(10.0, 9.9)],
        PEER: [timed(15.0, 12.0)],
        PEER_WHOLE: [timed(60.0, 12.0)],
    }
    rows = {row["way"]: row for row in rows_of(found)}
    assert math.isclose(rows[OURS]["overhead"], 0.03)
    assert math.isclose(rows[PEER]["overhead"], 0.25)
    assert math.isclose(rows[OURS]["swap_s"], 0.15)
    ratios, [shown] = verdicts_of(found)
    by_name = {row["provider"]: row for row in ratios}
    assert math.isclose(shown["measured"], 0.03)
    assert shown["met"] is True
    assert math.isclose(by_name[f"seconds, {PEER_WHOLE} / mergemix"]["median"], 60 / 10.4)
    assert math.isclose(
        by_name["seconds of a candidate / generation of the engine alone"]["p80"],
        10.2 / 9.9 + 0.8 * (10.4 / 9.8 - 10.2 / 9.9),
    )
    without_peer = {OURS: [timed(10.6, 10.0)], ALONE: [timed(10.0, 9.8)]}
    assert verdicts_of(without_peer)[1][0]["met"] is False


@pytest.mark.parametrize(("theirs", "share"), [(["x", "y"], 1.0), (["x", "z"], 0.75)])
def test_alike_are_the_answers_of_the_same_item(theirs: list[str], share: float) -> None:
    ours = timed(1.0, 1.0, answers={GENERATE: ["x ", "y"], CHOOSE: ["a", "b"]})
    peer = timed(1.0, 1.0, answers={GENERATE: theirs, CHOOSE: ["a", "b"]})
    assert share_alike([ours, ours], [peer]) == share


def test_nothing_is_reported_when_the_answers_differ(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(text: str) -> Callable[..., dict[str, list[Timed]]]:
        run = timed(1.0, 0.9, answers={GENERATE: [text]})
        ways = (OURS, ALONE) if text == "ours" else (PEER, PEER_WHOLE)
        return lambda *_: {way: [run] for way in ways}

    monkeypatch.setattr(bench_eval, "measure_ours", measured("ours"))
    monkeypatch.setattr(bench_eval, "measure_peer", measured("theirs"))
    out = tmp_path / "eval.json"
    arguments = ["--quick", "--experts", "1", "--scratch", str(tmp_path), "--out", str(out)]
    assert bench_eval.main(arguments) == 1
    assert "0.00% of the answers" in capsys.readouterr().err
    assert not out.exists()
