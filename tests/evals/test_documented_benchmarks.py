"""The examples of docs/benchmarks.md are read, asked and scored by a real engine; so is a task of lm-eval."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from mergemix.checkpoints.family import open_family
from mergemix.errors import BenchmarkError
from mergemix.evals.benchmark import Context, load_benchmark, load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.mixture import Mixture
from mergemix.serve.engine import EngineSpec
from mergemix.serve.hf_engine import HfEngine
from tests.serve.tiny_models import make_family, tiny_tokenizer

GUIDE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
CHAT = "<s>{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base and two experts that can chat and read long prompts."""
    paths = make_family(tmp_path_factory.mktemp("models"), "llama", experts=2)
    for path in paths.values():
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
        tokenizer = tiny_tokenizer(bos=True)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the guide. Answers are shorter than there: a random model has nothing to say."""
    directory = tmp_path_factory.mktemp("guide")
    for name, content in re.findall(r"`([\w.-]+)`:\n\n```\w+\n(.*?)```", GUIDE, re.DOTALL):
        (directory / name).write_text(re.sub(r"max_tokens: \d+", "max_tokens: 8", content))
    return directory


@pytest.fixture(scope="module")
def engine(paths: dict[str, Path]) -> Iterator[HfEngine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on several, much slower on a busy machine
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    family = open_family(str(paths["base"]), experts)
    engine = HfEngine(EngineSpec(family, kind="hf"), Mixture.uniform(family.names))
    yield engine
    engine.close()
    torch.set_num_threads(threads)


def test_a_real_engine_answers_every_example(
    directory: Path, paths: dict[str, Path], engine: HfEngine
) -> None:
    suite = Suite(load_benchmarks([str(directory)], Context(root=paths["base"], allow_code=True)))
    metrics = {benchmark.name: benchmark.metric for benchmark in suite.benchmarks}
    assert metrics == {
        "arithmetic": "accuracy",
        "boxed": "accuracy",
        "capitals": "accuracy",
        "chat": "accuracy",
        "functions": "accuracy",
        "letters": "accuracy",
        "notes": "bits_per_byte",
        "samples": "pass@4",
    }
    batch = suite.batch()
    results = batch.grade(enumerate(engine.submit(batch.requests)))
    assert [result.error for result in results] == [None] * suite.num_items
    assert all(result.score is not None and math.isfinite(result.score) for result in results)
    assert all(result.cut == 0 for result in results)
    texts = {result.benchmark: result.text for result in results}
    assert len(set(json.loads(texts["samples"] or ""))) > 1, "samples are drawn, each for itself"
    # The same seeds draw the same answers: a candidate that is asked again gets what it got.
    assert batch.grade(enumerate(engine.submit(batch.requests))) == results
    assert set(suite.report(results)) == {"notes"}


def test_the_prompt_in_the_guide_is_what_is_asked(directory: Path) -> None:
    first, second = load_benchmark(directory / "arithmetic.yaml").items
    assert f"```text\n{first.prompt}\n```" in GUIDE
    assert second.answers == ("3/4", "0.75")


@pytest.fixture
def task(tmp_path: Path) -> str:
    """A task of lm-eval with three documents, found in `tmp_path`."""
    (tmp_path / "data.jsonl").write_text('{"q": "1+1", "a": "2"}\n' * 3)
    content = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}=",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(content))
    return "own_sums"


def test_tasks_of_lm_eval_by_spec_and_by_file(tmp_path: Path, task: str, paths: dict[str, Path]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"lm_eval: {task}\nname: own\nlimit: 2\n")
    context = Context(root=paths["base"], include_paths=(tmp_path,))
    benchmarks = load_benchmarks([f"lm_eval:{task},limit=3", str(path)], context)
    assert [(benchmark.name, len(benchmark.item_ids)) for benchmark in benchmarks] == [(task, 3), ("own", 2)]
    with pytest.raises(BenchmarkError, match=f"names must be unique, but '{task}' is in lm_eval:{task}"):
        load_benchmarks([f"lm_eval:{task}"] * 2, context)
    path.write_text(f"lm_eval: {task}\nitems: a.jsonl\n")
    with pytest.raises(BenchmarkError, match=r"own.yaml: unknown key 'items'"):
        load_benchmarks([str(path)], context)
    with pytest.raises(BenchmarkError, match=f"lm_eval:{task}: tasks of lm-eval need a checkpoint"):
        load_benchmarks([f"lm_eval:{task}"])
