"""Swaps that break in the middle, engines that die, and faults that say nothing, with a real vLLM and a real study.

Whatever happens, a stored score is that of the right weights, to the last bit, or there is none.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.serve.one_shot import STAGES
from tests.serve.tiny_models import make_family
from tests.study_fixture import write_benchmark

ROOT = Path(__file__).parents[2]
NOTICED_S = 30.0
ITEMS = 20
# How, at which stage, in which rank, how often. Raising is noticed by vLLM, SIGKILL by nobody inside.
ONE_RANK = [
    ("kill", "before reading", 0, 1),
    ("raise", "writing", 0, 1),
    ("kill", "writing", 0, 1),
    ("raise", "written", 0, 1),
    ("raise", "reprocessing", 0, 1),
    ("kill", "reprocessed", 0, 1),
    ("raise", "prefix cache", 0, 1),
    ("raise", "written", 0, 2),
]
# Every stage in either rank; each way of failing at both ranks.
TWO_RANKS = [
    (("raise", "kill")[(place + rank) % 2], stage, rank, 1)
    for place, stage in enumerate(STAGES[:-1])
    for rank in (0, 1)
]
CACHED = {"device_cache": 200_000}
TWO = {"tensor_parallel_size": 2}
SCENES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "faults": ("faults", {}, {"plan": ONE_RANK}),
    "at_start": ("at_start", {}, {}),
    "silent": ("silent", {**CACHED, "verify_swaps": "every"}, {}),
    "deaths": ("deaths", {}, {"victims": [("host", "idle"), ("host", "generate")]}),
    "interrupted": ("interrupted", {}, {}),
    "all_killed": ("all_killed", {"host_cache": 200_000}, {}),
    "faults of two ranks": ("faults", TWO, {"plan": TWO_RANKS}),
    "deaths of two ranks": ("deaths", TWO, {"victims": [("0", "idle"), ("1", "generate")]}),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every scene found; vLLM is imported once for all of them."""
    directory = tmp_path_factory.mktemp("scenes")
    paths = make_family(directory / "models", "llama", experts=2)
    rng = random.Random(0)
    bench = [
        write_benchmark(directory, "words", 12, rng, capability="language", metric="loglikelihood"),
        write_benchmark(directory, "copy", 8, rng, capability="copying", grader="contains", max_tokens=6),
    ]
    task = {
        "paths": {name: str(path) for name, path in paths.items()},
        "bench": [str(path) for path in bench],
        "scenes": [
            {"name": name, "scene": scene, "spec": spec, "arguments": arguments}
            for name, (scene, spec, arguments) in SCENES.items()
        ],
    }
    (directory / "task.json").write_text(json.dumps(task))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "GOMP_SPINCOUNT": "1000",
    }
    command = [
        sys.executable,
        "-m",
        "tests.serve.forked_engines",
        str(directory / "task.json"),
        str(directory),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    found = {}
    for name in SCENES:
        out = directory / f"{name}.json"
        assert out.exists(), f"{name} ended without a word\n{done.stderr[-2000:]}"
        found[name] = json.loads(out.read_text())
        if "error" in found[name]:
            found[name]["error"] += "\n".join(
                log.read_text()[-1500:] for log in directory.glob(f"{name}.log")
            )
    return found


def scene(scenes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    found = scenes[name]
    assert "error" not in found, found["error"]
    assert found.get("left", []) == [], "processes or memory outlive their engine"
    return found


@pytest.mark.parametrize(("name", "plan"), [("faults", ONE_RANK), ("faults of two ranks", TWO_RANKS)])
def test_a_swap_that_breaks_anywhere_is_poisoned_unscored_and_tried_once_more(
    scenes: dict[str, dict[str, Any]], name: str, plan: list[tuple[str, str, int, int]]
) -> None:
    found = scene(scenes, name)
    assert found["distinct"] == len(plan), "the candidates answer alike: a mixed-up score would not show"
    for case, (how, stage, rank, times) in zip(found["cases"], plan, strict=True):
        note = json.dumps(case)
        assert case["fault"] == [how, stage, rank, times]
        assert case["happened"], note
        assert case["poisoned"], note
        assert case["starts"] == 1, note
        assert case["left"] == [], note
        if times == 1:
            assert (case["status"], case["proven"], case["same"]) == ("done", True, True), note
        else:
            assert (case["status"], case["proven"], case["scores"]) == ("failed", False, 0), note
            assert "failed halfway" in case["reason"]
    if name == "faults":
        assert {stage for _, stage, _, _ in plan} == set(STAGES)
        assert {case["status"] for case in found["cases"]} == {"done", "failed"}


def test_silent_faults_are_caught_by_an_engine_that_verifies_every_swap(
    scenes: dict[str, dict[str, Any]],
) -> None:
    found = scene(scenes, "silent")
    assert found["proven"]
    for how, tensor in (("stale", "self_attn.o_proj"), ("corrupt", "model.embed_tokens.weight")):
        reason, poisoned, answer = found["caught"][how]
        assert reason.startswith("PoisonedEngineError"), how
        assert tensor in reason, how
        assert poisoned, how
        assert answer.startswith("PoisonedEngineError"), how
    assert "model.embed_tokens.weight" in found["still corrupt"], "the next swap reads the same memory"


def test_a_write_that_is_lost_in_the_fifth_swap_is_caught_and_tried_again(
    scenes: dict[str, dict[str, Any]],
) -> None:
    """By a sample as well, where it is of the largest tensor."""
    found = scene(scenes, "silent")
    assert found["lost"] == [True, True], "the fault did not happen"
    assert found["every"], "stored scores are of other weights"
    assert found["first"], "stored scores are of other weights"
    assert found["starts"] == 5, "each was to be tried again on a new engine, once"


def test_a_tensor_that_is_lost_at_start_leads_to_fresh_engines_that_are_not_proven(
    scenes: dict[str, dict[str, Any]],
) -> None:
    found = scene(scenes, "at_start")
    assert found["lose"]["happened"]
    assert (found["lose"]["engine"], found["lose"]["proven"]) == ("RestartingEngine", [False, False])
    assert found["lose"]["scores"] == found["never"]["scores"]


def test_an_engine_that_verifies_nothing_proves_nothing(scenes: dict[str, dict[str, Any]]) -> None:
    never = scene(scenes, "at_start")["never"]
    assert (never["engine"], never["proven"]) == ("VllmEngine", [False, False])
    assert len(never["scores"]) == ITEMS


@pytest.mark.parametrize("name", ["deaths", "deaths of two ranks"])
def test_a_process_that_is_killed_is_noticed_and_replaced(
    scenes: dict[str, dict[str, Any]], name: str
) -> None:
    found = scene(scenes, name)
    for number, case in enumerate(found["cases"]):
        victim, when = case["victim"]
        print(f"{name}: {victim} killed ({when}), noticed after {case['noticed_s']:.2f} s")
        assert case["reason"].split(":")[0] in ("PoisonedEngineError", "EngineError"), case
        assert case["noticed_s"] < NOTICED_S, case
        assert case["poisoned"], case
        assert (case["same"], case["left"], case["starts"]) == (True, [], number + 2), case


@pytest.mark.parametrize("where", ["apply", "submit"])
def test_an_engine_that_ctrl_c_interrupted_answers_nothing_any_more(
    scenes: dict[str, dict[str, Any]], where: str
) -> None:
    found = scene(scenes, "interrupted")[where]
    assert found["interrupt"] == "KeyboardInterrupt"
    assert [reason.split(":")[0] for reason in found["again"]] == ["PoisonedEngineError"] * 2, found
    assert found["left"] == []


def test_shared_memory_of_a_program_that_was_killed_is_removed_by_the_next_start(
    scenes: dict[str, dict[str, Any]],
) -> None:
    found = scene(scenes, "all_killed")
    assert found["shared"] == 1
    assert found["killed"] == []
    assert found["ended_s"] < NOTICED_S
    assert found["removed"]
