"""lm-eval tasks on live engines give the numbers of the `lm_eval` command on the merged checkpoint."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mergemix.checkpoints.family import Family, open_family
from mergemix.evals.lm_eval_tasks import load_lm_eval, parse_lm_eval
from mergemix.evals.suite import ItemResult, Suite
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, EngineSpec
from mergemix.serve.hf_engine import HfEngine
from tests.evals.lm_eval_command import run_lm_eval
from tests.evals.lm_eval_fixture import give_chat_template, keep_data_in, write_tasks
from tests.serve.tiny_models import make_family

PLAIN = ["mm_sums", "mm_choices", "mm_endings", "mm_pages", "mm_blanks"]
WEIGHTS = (0.3, 0.5)


@dataclass
class Made:
    tasks: Path
    family: Family
    merged: Path

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.family.names, WEIGHTS)

    def command(self, kind: str, tasks: list[str], *options: str) -> list[str]:
        model = f"pretrained={self.merged}" + (",enforce_eager=True" if kind == "vllm" else "")
        return [
            *("--model", kind, "--model_args", model, "--tasks", ",".join(tasks)),
            *("--include_path", str(self.tasks), "--batch_size", "1" if kind == "hf" else "auto"),
            *(["--device", "cpu"] if kind == "hf" else []),
            *options,
        ]

    def run(self, engine: Engine, kind: Literal["hf", "vllm"], specs: list[str]) -> Ours:
        """After swaps to other mixtures, as in a search."""
        loaded = [
            load_lm_eval(
                parse_lm_eval(f"lm_eval:{spec}"), [self.tasks], self.family.template.root, None, kind
            )
            for spec in specs
        ]
        suite = Suite([benchmark for benchmarks in loaded for benchmark in benchmarks])
        engine.apply(Mixture.one_hot(self.family.names, self.family.names[0]))
        engine.apply(self.mixture)
        batch = suite.batch()
        results = batch.grade(engine.stream(batch.requests))
        return Ours(suite.report(results), results)


@dataclass
class Ours:
    report: dict[str, dict[str, float]]
    results: list[ItemResult]

    def responses(self, task: str) -> dict[str, Any]:
        """As in lm-eval's samples."""
        found: dict[str, Any] = {}
        for result in self.results:
            if result.benchmark == task:
                assert result.error is None
                assert result.text is not None
                found[result.item] = [[result.text]] if task == "mm_sums" else json.loads(result.text)
        return found


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As many as the command has: products are split by threads, which changes the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_data_in(tmp_path_factory.mktemp("data"), monkeypatch)
        yield


def make(directory: Path, arch: Literal["llama", "qwen3_moe"]) -> Made:
    paths = make_family(directory / "models", arch, experts=2, seed=11)
    for path in paths.values():
        give_chat_template(path)
        if arch == "qwen3_moe":
            # lm-eval lets this change greedy answers, too.
            file = path / "generation_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.3}))
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    family = open_family(str(paths["base"]), experts)
    merge_to_directory(family, Mixture(family.names, WEIGHTS), directory / "merged")
    return Made(write_tasks(directory / "tasks"), family, directory / "merged")


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """Of one task's results in lm-eval's file: those by metric and filter."""
    return {key: value for key, value in results.items() if "," in key and value != "N/A"}


def test_the_hf_engine_gives_the_numbers_of_the_command_to_all_digits(tmp_path: Path) -> None:
    llama, moe = make(tmp_path / "llama", "llama"), make(tmp_path / "moe", "qwen3_moe")
    moe_tasks = ["mm_sums", "mm_choices", "mm_pages"]
    commands = [
        llama.command("hf", PLAIN),
        llama.command("hf", ["mm_chat"], "--apply_chat_template"),
        llama.command("hf", ["mm_sums", "mm_choices"], "--num_fewshot", "1", "--limit", "5"),
        moe.command("hf", moe_tasks),
    ]
    theirs = run_lm_eval(commands, tmp_path / "out")
    with HfEngine(EngineSpec(llama.family, kind="hf"), Mixture.uniform(llama.family.names)) as engine:
        ours = [
            llama.run(engine, "hf", PLAIN),
            llama.run(engine, "hf", ["mm_chat,chat_template=true"]),
            llama.run(engine, "hf", [f"{task},few_shot=1,limit=5" for task in ("mm_sums", "mm_choices")]),
        ]
    with HfEngine(EngineSpec(moe.family, kind="hf"), Mixture.uniform(moe.family.names)) as engine:
        ours.append(moe.run(engine, "hf", moe_tasks))
    compared = 0
    for mine, (results, responses) in zip(ours, theirs, strict=True):
        assert set(mine.report) == set(results)
        for task in results:
            for key, value in numbers(results[task]).items():
                metric, _, rest = key.partition("_stderr,")
                if rest and f"{metric}_stderr,{rest}" not in mine.report[task]:
                    assert metric in ("bleu", "perplexity"), "only bootstrapped errors are left out"
                    continue
                assert mine.report[task][key] == value, (task, key)
                compared += 1
            if task in ("mm_sums", "mm_chat"):
                assert mine.responses(task) == responses[task], task
    assert compared > 40
    assert len({response[0][0] for response in theirs[0][1]["mm_sums"].values()}) > 5, "answers that differ"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_vllm_gives_the_numbers_of_the_commands_vllm(tmp_path: Path) -> None:
    """Rounding in bf16 depends on what shares a batch: answers may part late, log-likelihoods in the third digit."""
    from mergemix.serve.vllm_engine import VllmEngine

    made = make(tmp_path, "llama")
    [(results, responses)] = run_lm_eval([made.command("vllm", PLAIN)], tmp_path / "out")
    with VllmEngine(EngineSpec(made.family, kind="vllm"), Mixture.uniform(made.family.names)) as engine:
        ours = made.run(engine, "vllm", PLAIN)
    assert ours.report["mm_pages"]["bits_per_byte,none"] == pytest.approx(
        results["mm_pages"]["bits_per_byte,none"], rel=0.01
    )
    for task, metric in (("mm_choices", "acc"), ("mm_choices", "acc_norm"), ("mm_blanks", "right")):
        items = len(responses[task])
        assert abs(ours.report[task][f"{metric},none"] - results[task][f"{metric},none"]) <= 1 / items
    for item, given in ours.responses("mm_endings").items():
        [[[_, mine, _]]], [[[theirs, _]]] = given, responses["mm_endings"][item]
        assert float(theirs) == pytest.approx(mine, rel=0.02)
    same = [responses["mm_sums"][item] == mine for item, mine in ours.responses("mm_sums").items()]
    assert sum(same) >= 0.7 * len(same)
