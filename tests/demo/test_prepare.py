"""prepare_demo end to end on its quick settings."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergemix.demo import prepare_demo
from mergemix.demo.corpora import CAPABILITIES, DOMAINS
from mergemix.demo.prepare import prepare
from mergemix.demo.settings import Settings
from mergemix.errors import OutputError
from mergemix.evals.benchmark import load_benchmark

MODELS = ("base", *DOMAINS)
SETTINGS = Settings.quick(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(directory, demo, progress lines) of a first call."""
    directory, lines = tmp_path_factory.mktemp("demo"), []
    return directory, prepare_demo(directory, quick=True, progress=lines.append), lines


def states(demo):
    paths = {"base": demo.base, **demo.experts}
    return {name: load_file(path / "model.safetensors") for name, path in paths.items()}


def mean_loglikelihood(path, benchmark):
    """Of the answers, summed over their tokens; padding on the right cannot be seen from the left."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = [item.prompt + item.answers[0] for item in benchmark.items]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    totals = [
        row[len(item.prompt) : len(text)].sum()
        for row, item, text in zip(logprobs, benchmark.items, texts, strict=True)
    ]
    return torch.stack(totals).mean().item()


def test_models_load_and_are_one_family(made):
    _, demo, _ = made
    assert tuple(demo.experts) == DOMAINS
    shapes = {n: {k: (t.shape, t.dtype) for k, t in state.items()} for n, state in states(demo).items()}
    assert all(shape == shapes["base"] for shape in shapes.values())
    assert {dtype for _, dtype in shapes["base"].values()} == {torch.bfloat16}
    assert "lm_head.weight" not in shapes["base"]  # tied
    config = AutoModelForCausalLM.from_pretrained(demo.base).config
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_each_expert_is_better_at_its_own_than_the_base(made):
    _, demo, _ = made
    weights = states(demo)
    for domain in DOMAINS:
        assert any(not torch.equal(weights[domain][name], weights["base"][name]) for name in weights["base"])
    for path in demo.benchmarks:
        benchmark = load_benchmark(path)
        expert, base = (
            mean_loglikelihood(p, benchmark) for p in (demo.experts[benchmark.capability], demo.base)
        )
        assert expert > base, (benchmark.capability, expert, base)


def test_benchmarks_are_what_the_search_can_load(made):
    _, demo, _ = made
    search, test = map(load_all, (demo.benchmarks, demo.test_benchmarks))
    assert set(search) == set(test) == set(CAPABILITIES)
    for name in CAPABILITIES:
        assert (search[name].capability, search[name].metric) == (name, "loglikelihood")
        assert len(search[name].items) == len(test[name].items) == SETTINGS.items
        assert not {i.prompt for i in search[name].items} & {i.prompt for i in test[name].items}
        request = search[name].requests(0)[0]
        assert request.context + request.continuation == (
            search[name].items[0].prompt + search[name].items[0].answers[0]
        )


def load_all(paths):
    return {benchmark.name: benchmark for benchmark in map(load_benchmark, paths)}


def test_training_is_on_record(made):
    directory, demo, lines = made
    assert set(demo.training) == set(MODELS)
    base, math = demo.training["base"], demo.training["math"]
    assert base["tokens"] == SETTINGS.base.steps * SETTINGS.base.batch * SETTINGS.length
    assert base["last_loss"] < base["first_loss"]
    assert math["learning_rate"] == SETTINGS.expert.learning_rate
    assert json.loads((directory / "models" / "math" / "training.json").read_text()) == math
    assert any(line.startswith("training spam: step") for line in lines)


def snapshot(directory):
    """Modification time and inode of every file: a file written again, even with the same bytes, shows."""
    stats = {path: path.stat() for path in directory.rglob("*") if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


def test_a_second_call_touches_nothing_and_says_so(made):
    directory, demo, _ = made
    before, lines = snapshot(directory), []
    again = prepare_demo(directory, quick=True, progress=lines.append)
    assert snapshot(directory) == before
    assert again.reused == MODELS
    assert demo.reused == ()
    assert again.training == demo.training
    assert sum("reusing" in line for line in lines) == len(MODELS)


def test_only_what_depends_on_a_change_is_made_again(made, tmp_path):
    directory, _, _ = made
    quick = replace(SETTINGS, base=replace(SETTINGS.base, steps=3), expert=replace(SETTINGS.expert, steps=2))
    make = lambda settings: prepare(tmp_path, settings, lambda line: None)  # noqa: E731
    first = make(quick)
    weights = states(first)

    changed = replace(quick, expert=replace(quick.expert, learning_rate=5e-4))
    assert make(changed).reused == ("base",)
    back = make(quick)
    assert back.reused == ("base",)
    for name, state in states(back).items():  # the same settings give the same bits
        assert all(torch.equal(tensor, weights[name][key]) for key, tensor in state.items())

    (tmp_path / "models" / "code" / "model.safetensors").unlink()
    assert make(quick).reused == ("base", "math", "facts", "language", "spam")
    (tmp_path / "benchmarks" / "math.jsonl").write_text("tampered")
    mended = make(quick)
    assert mended.reused == MODELS
    assert (tmp_path / "benchmarks" / "math.jsonl").read_text() == (
        directory / "benchmarks" / "math.jsonl"
    ).read_text()
    assert make(replace(quick, seed=1)).reused == ()


def test_a_kill_in_the_middle_leaves_whole_models_only(tmp_path):
    class Killed(BaseException):
        pass

    def kill_in_math(line):
        if line.startswith("training math"):
            raise Killed

    quick = replace(SETTINGS, base=replace(SETTINGS.base, steps=3), expert=replace(SETTINGS.expert, steps=2))
    with pytest.raises(Killed):
        prepare(tmp_path, quick, kill_in_math)
    assert sorted(os.listdir(tmp_path / "models")) == ["base"]
    assert prepare(tmp_path, quick, lambda line: None).reused == ("base",)


def test_a_place_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        prepare_demo(tmp_path / "file", quick=True)
