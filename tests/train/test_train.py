"""What a training computes and writes, beside plain loops of transformers and torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergemix.checkpoints.family import check_family, open_family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.train import StepProgress, TrainConfig, train
from mergemix.train.batches import Batches
from mergemix.train.observer import Silent
from mergemix.train.prepare import Prepared, prepare
from tests.serve.tiny_models import make_family, tiny_qwen3_moe
from tests.train.files import tiny_config, weights_of, write_lines

TEXTS = {"texts": 1.0}


def distance(one: Path, other: Path, base: Path) -> float:
    """Largest difference of two results, as a share of the largest change from the base."""
    a, b, start = (load_file(path / "model.safetensors") for path in (one, other, base))
    apart = max((a[name].float() - b[name].float()).abs().max().item() for name in start)
    return apart / max((a[name].float() - start[name].float()).abs().max().item() for name in start)


def bare_loop(prepared: Prepared, warmup: int) -> tuple[Any, list[float]]:
    """The same batches through transformers' own loss and torch's AdamW, over all tokens of text."""
    model = AutoModelForCausalLM.from_pretrained(prepared.base.root, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = Batches(prepared.plan, prepared.corpora, prepared.config.seed)
    losses = []
    for step in range(prepared.plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = prepared.config.learning_rate * min(1, (step + 1) / warmup)
        ids = torch.from_numpy(batches.next()[0])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


class Losses(Silent):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def step(self, progress: StepProgress) -> None:
        self.losses.append(progress.loss)
        self.rates.append(progress.learning_rate)


def test_it_is_the_training_that_transformers_and_torch_do(
    tmp_path: Path, plain_base: Path, data: dict[str, Path]
) -> None:
    config = tiny_config(plain_base, data, tmp_path / "out", mixture=TEXTS, warmup=4)
    observer = Losses()
    record = train(config, observer)
    model, losses = bare_loop(prepare(config, Silent()), warmup=4)
    assert observer.losses == pytest.approx(losses, rel=1e-5)
    assert observer.losses[-1] < observer.losses[0] - 0.5
    assert observer.rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, *[1e-3] * 9])
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bare")
    assert distance(tmp_path / "out", tmp_path / "bare", plain_base) < 0.01
    assert record["first_loss"] == observer.losses[0]
    assert record["losses"] == list(enumerate(observer.losses, 1))


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_mean_over_learned_tokens_whatever_the_micro_batch(
    tmp_path: Path, plain_base: Path, data: dict[str, Path], micro_batch: int
) -> None:
    """Sequences of prompts and answers have very different numbers of learned tokens."""
    config = tiny_config(plain_base, data, tmp_path / "whole")
    train(config)
    train(replace(config, out=tmp_path / "parts", micro_batch=micro_batch))
    assert distance(tmp_path / "whole", tmp_path / "parts", plain_base) < 0.01


def as_one_of_two(config: TrainConfig, rank: int, port: int) -> None:
    """A process as `accelerate launch` starts it, that knows its rank from its environment."""
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}  # fmt: skip
    record = train(config)
    os._exit(0 if record["processes"] == 2 else 1)


def test_two_processes_train_what_one_does(tmp_path: Path, plain_base: Path, data: dict[str, Path]) -> None:
    config = tiny_config(plain_base, data, tmp_path / "one", save_every=5, average_last=4)
    train(config)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    other = replace(config, out=tmp_path / "two")
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of this process
    children = [context.Process(target=as_one_of_two, args=(other, rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two", plain_base) < 0.01
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mergemix-tokens", "one", "two"]


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "qwen3_moe"])
def test_the_result_is_an_expert_beside_others(tmp_path: Path, data: dict[str, Path], arch: Any) -> None:
    family = make_family(tmp_path, arch, experts=1)
    train(tiny_config(family["base"], data, tmp_path / "out", tokens=256))
    check_family(open_family(str(family["base"]), {"new": str(tmp_path / "out"), "old": str(family["math"])}))
    before, after = (load_file(path / "model.safetensors") for path in (family["base"], tmp_path / "out"))
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert not torch.equal(after[name], tensor), name  # routers and norms are trained too
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (family["base"] / name).read_bytes()
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_names_types_and_shards_are_the_bases(
    tmp_path: Path, plain_base: Path, data: dict[str, Path]
) -> None:
    """A base in two shards, one tensor in fp32, a tied head stored twice, and a layer that transformers leaves out."""
    base = tmp_path / "base"
    shutil.copytree(plain_base, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.layers.2.predictor.weight"] = torch.randn(5, 3)
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    train(tiny_config(base, data, tmp_path / "out", tokens=256))
    check_family(open_family(str(base), {"a": str(tmp_path / "out"), "b": str(base)}))
    found = {}
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        written = load_file(tmp_path / "out" / file)
        assert sorted(written) == part
        found |= written
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(found["model.layers.2.predictor.weight"], tensors["model.layers.2.predictor.weight"])
    # fp32 all the way: not rounded to bf16 on its way.
    assert not torch.equal(found["model.norm.weight"], found["model.norm.weight"].bfloat16().float())


def test_the_balance_loss_of_experts_is_trained_where_the_base_asks_for_it(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    base = tiny_qwen3_moe(tmp_path / "base", seed=1)
    train(tiny_config(base, data, tmp_path / "without", tokens=256, mixture=TEXTS, warmup=1))
    about = json.loads((base / "config.json").read_text())
    asking = {**about, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    (base / "config.json").write_text(json.dumps(asking))
    config = tiny_config(base, data, tmp_path / "with", tokens=256, mixture=TEXTS, warmup=1)
    train(config)
    model, _ = bare_loop(prepare(config, Silent()), warmup=1)  # whose loss has the balance loss in it
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bare")
    assert distance(tmp_path / "with", tmp_path / "bare", base) < 0.01
    without, with_it = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(without[router], with_it[router])


def test_the_record_says_what_was_trained(tmp_path: Path, plain_base: Path, data: dict[str, Path]) -> None:
    changed: dict[str, Any] = {"mixture": {"sums": 1, "texts": 3}, "tokens": 1000}
    config = tiny_config(plain_base, data, tmp_path / "out", **changed, general=TEXTS, general_share=0.25)
    record = train(config)
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["mixture"] == {"given": {"sums": 1, "texts": 3}, "used": {"sums": 0.25, "texts": 0.75}}
    assert (record["tokens_asked_for"], record["tokens"], record["steps"]) == (1000, 1024, 8)
    parts = {name: (part["tokens"], part["general_tokens"]) for name, part in record["domains"].items()}
    assert parts == {"sums": (192, 0), "texts": (832, 256)}
    assert record["domains"]["texts"]["share"] == 832 / 1024
    assert record["domains"]["texts"]["epochs"] == 832 / record["domains"]["texts"]["corpus_tokens"]
    assert record["parameters"] == 90432
    assert not record["reused"]


def test_shares_and_epochs_are_held_to_the_cap(
    tmp_path: Path, plain_base: Path, data: dict[str, Path]
) -> None:
    there = len(prepare(tiny_config(plain_base, data, tmp_path / "out"), Silent()).corpora["sums"].tokens)

    def prepared(mixture: dict[str, float], tokens: int | None, **changed: Any) -> Prepared:
        return prepare(
            tiny_config(plain_base, data, tmp_path / "out", mixture=mixture, tokens=tokens, **changed),
            Silent(),
        )

    most = 4 * there // 128 * 128
    assert prepared({"sums": 1.0}, most).tokens == most
    with pytest.raises(ConfigError) as error:
        prepared({"sums": 1.0}, most + 128)
    for said in (
        f"sums would be {(most + 128) / there:.2f} times",
        f"it has {there}",
        f"at most {4 * there} of it",
    ):
        assert said in str(error.value)
    with pytest.raises(ConfigError, match=r"may be repeated 0\.5 times"):
        prepared({"sums": 1.0}, there, max_epochs=0.5)
    with pytest.raises(ConfigError, match="one step alone takes 4096 sequences of 32 tokens: give a smaller"):
        prepared({"sums": 1.0}, None, batch=4096)
    # Half of the own tokens and all of the general ones.
    with pytest.raises(ConfigError, match="sums would be"):
        prepared(
            {"sums": 0.5, "texts": 0.5}, 6 * there, general={"sums": 1.0}, general_share=0.5, max_epochs=4.4
        )
    # Without a number of tokens: no domain is read twice, and not a whole step more would fit.
    plan = prepared({"sums": 0.6, "texts": 0.4}, None).plan
    assert plan.tokens_of(["sums", "texts"])["sums"] <= there < (plan.steps + 1) * 128 * 0.6


def test_repeats_are_told_before_the_first_step(
    tmp_path: Path, plain_base: Path, data: dict[str, Path]
) -> None:
    told: list[Any] = []

    class Told(Losses):
        def repeats(self, domain: str, epochs: float, tokens: int) -> None:
            assert not self.losses
            told.append((domain, epochs, tokens))

    mixture = {"sums": 0.9, "texts": 0.1}
    config = tiny_config(plain_base, data, tmp_path / "out", mixture=mixture, tokens=5120)
    record = train(config, Told())
    sums = record["domains"]["sums"]
    assert record["domains"]["texts"]["epochs"] < 1 < sums["epochs"]
    assert told == [("sums", sums["epochs"], sums["corpus_tokens"])]


def test_what_is_no_base(tmp_path: Path, plain_base: Path, data: dict[str, Path]) -> None:
    def refused(base: Path | str, error: type[Exception], said: str, **changed: Any) -> None:
        with pytest.raises(error, match=said):
            train(tiny_config(base, data, tmp_path / "out", **changed))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    refused("nowhere", CheckpointError, "no directory 'nowhere'")
    refused(plain_base, ConfigError, "at most the 256 positions of the base, but is 512", sequence_length=512)
    damaged = tmp_path / "damaged"
    shutil.copytree(plain_base, damaged)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(damaged, CheckpointError, r"lacks tensors of its architecture, model.layers.1.mlp.up_proj.weight")
    foreign = tmp_path / "foreign"
    shutil.copytree(plain_base, foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    refused(foreign, ConfigError, "but the base has only 40: its tokenizer is another model's")
    unended = tmp_path / "unended"
    shutil.copytree(plain_base, unended)
    settings = json.loads((unended / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (unended / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(unended, ConfigError, "has no end token")
    (unended / "tokenizer.json").write_text("{}")
    refused(unended, CheckpointError, "no tokenizer could be loaded")


def test_the_order_of_options_does_not_matter(
    tmp_path: Path, plain_base: Path, data: dict[str, Path]
) -> None:
    one = tiny_config(plain_base, data, tmp_path / "one", tokens=256)
    train(one)
    turned = TrainConfig(**{**vars(one), "out": tmp_path / "other", "data": dict(reversed(data.items())),
                            "mixture": {"texts": 6, "sums": 4}})  # fmt: skip
    train(turned)
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "other")


def test_prompts_alone_teach_nothing(tmp_path: Path, plain_base: Path) -> None:
    """What is read before an answer has no influence but through the answer."""
    rows = [{"prompt": "abc " * 300, "answer": "x"}] * 4
    files = {"long": write_lines(tmp_path / "long.jsonl", rows)}
    observer = Losses()
    train(
        tiny_config(plain_base, files, tmp_path / "out", mixture={"long": 1.0}, tokens=64, batch=2, warmup=0),
        observer,
    )
    assert observer.losses == [0.0]
