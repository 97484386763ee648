"""The transformers engine keeps every engine's promises, and its live weights are the disk merge bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from mergemix.checkpoints.checkpoint import COPIED, FLOATING
from mergemix.checkpoints.family import Family, open_family
from mergemix.checkpoints.header import DTYPE_BITS
from mergemix.errors import ConfigError, EngineError, NonFiniteError, PoisonedEngineError
from mergemix.merge import merge_to_directory
from mergemix.merge.plan import plan_merge
from mergemix.merge.stream import stream
from mergemix.mixture import Mixture
from mergemix.serve import hf_batches
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix.serve.engine import Engine, EngineSpec, Generate, LogLikelihood
from mergemix.serve.hf_engine import DeviceSink, HfEngine
from tests.serve.conformance import (
    MAX_TOKENS,
    PAIRS,
    PROMPTS,
    EngineConformance,
    StartEngine,
    mixtures_in_mixed_order,
)
from tests.serve.tiny_models import MAX_POSITIONS, Arch, make_family, tiny_tokenizer

REQUESTS = [*(Generate(prompt, MAX_TOKENS) for prompt in PROMPTS), *(LogLikelihood(*pair) for pair in PAIRS)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(family: Family, mixture: Mixture | None = None, **options: Any) -> HfEngine:
    return HfEngine(EngineSpec(family, kind="hf", **options), mixture or Mixture.uniform(family.names))


def tiny_family(directory: Path, arch: Arch = "llama") -> tuple[Family, dict[str, Path]]:
    paths = make_family(directory, arch, experts=2)
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    return open_family(str(paths["base"]), experts), paths


def edit(checkpoint: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a checkpoint; dots of the names as double underscores."""
    file = checkpoint / "model.safetensors"
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    whole = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, file, {"format": "pt"})


def check_weights(engine: HfEngine, family: Family, mixture: Mixture, out: Path) -> None:
    """The live state dict is that of a fresh load of the merge on disk."""
    merge_to_directory(family, mixture, out)
    fresh = AutoModelForCausalLM.from_pretrained(out).state_dict()
    live = engine._model.state_dict()
    assert list(live) == list(fresh)
    assert all(torch.equal(live[name], fresh[name]) for name in fresh), mixture


class HfConformance(EngineConformance):
    swap_path: str

    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls) -> StartEngine:
        return start

    def test_live_weights_equal_a_fresh_load_of_the_merge_on_disk(
        self, engine: HfEngine, family: Family, tmp_path: Path
    ) -> None:
        assert engine.swap_path == self.swap_path
        checksums = []
        for number, mixture in enumerate(mixtures_in_mixed_order(family.names)):
            engine.apply(mixture)
            check_weights(engine, family, mixture, tmp_path / str(number))
            checksums.append(engine.checksum())
        assert checksums[0] == checksums[-1]
        assert len(set(checksums)) == len(checksums) - 1

    def test_a_swapped_engine_answers_exactly_as_one_started_on_the_mixture(
        self, engine: Engine, family: Family, make_engine: StartEngine
    ) -> None:
        mixture = Mixture(family.names, (0.25, 0.25, 0.5))
        engine.apply(mixture)
        with make_engine(family, mixture) as fresh:
            assert engine.submit(REQUESTS) == fresh.submit(REQUESTS)
        assert engine.submit(REQUESTS[::-1]) == engine.submit(REQUESTS)[::-1]


class TestTiedLlama(HfConformance):
    arch = "llama"
    swap_path = "in place"


class TestQwen3Moe(HfConformance):
    arch = "qwen3_moe"
    swap_path = "reload"


@pytest.mark.parametrize("swap_path", ["in place", "reload"])
def test_an_output_head_of_its_own_is_swapped_too(tmp_path: Path, swap_path: str) -> None:
    family, paths = tiny_family(tmp_path / "family", "llama_untied")
    if swap_path == "reload":
        # Tied by its config, and yet a head in the file: transformers decides by the values, so each load may differ.
        for path in paths.values():
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
            embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
            edit(path, lm_head__weight=embedding.clone())
        edit(paths["code"], lm_head__weight=-embedding)
        family = open_family(str(paths["base"]), {"math": str(paths["math"]), "code": str(paths["code"])})
    engine = start(family, Mixture.one_hot(family.names, "math"))
    assert engine.swap_path == swap_path
    for number, weights in enumerate([(0.5, 0.5), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]):
        mixture = Mixture(family.names, weights)
        engine.apply(mixture)
        check_weights(engine, family, mixture, tmp_path / str(number))


def test_nothing_of_a_swap_is_written_to_disk(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path, "qwen3_moe")
    before = sorted(tmp_path.rglob("*"))
    with start(family) as engine:
        engine.apply(Mixture.one_hot(family.names, "code"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_nan_in_an_expert_is_named_at_the_start_and_at_a_swap(tmp_path: Path, arch: Arch) -> None:
    family, paths = tiny_family(tmp_path, arch)
    edit(paths["code"], model__norm__weight=torch.full((64,), float("nan"), dtype=torch.bfloat16))
    family = open_family(str(paths["base"]), {"math": str(paths["math"]), "code": str(paths["code"])})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight.*code"):
        start(family)
    with start(family, Mixture.one_hot(family.names, "math")) as engine:
        with pytest.raises(PoisonedEngineError, match=r"halfway: .*model\.norm\.weight.*code"):
            engine.apply(Mixture.uniform(family.names))
        assert engine.poisoned


def test_an_interrupted_swap_poisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    family, _ = tiny_family(tmp_path)
    engine = start(family)
    monkeypatch.setattr("mergemix.serve.hf_engine.stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.apply(Mixture.uniform(family.names))
    assert engine.poisoned


def test_small_batches_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, _ = tiny_family(tmp_path)
    with start(family) as engine:
        whole = engine.loglikelihood(REQUESTS[-len(PAIRS) :])  # type: ignore[arg-type]
        monkeypatch.setattr(hf_batches, "TOKENS_PER_BATCH", 1)
        alone = engine.loglikelihood(REQUESTS[-len(PAIRS) :])  # type: ignore[arg-type]
        for one, other in zip(whole, alone, strict=True):
            assert one.num_tokens == other.num_tokens
            assert one.logprob == pytest.approx(other.logprob, abs=0.1 * one.num_tokens)
        assert len(engine.submit(REQUESTS)) == len(REQUESTS)


def test_padding_does_not_move_learned_positions() -> None:
    """Rotary positions are relative, so that a model with learned ones is needed to see padding go wrong."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    sequences, num_scored = [[5, 9, 3, 8, 7, 1, 2, 4], [6, 2], [9, 9, 4]], [3, 1, 2]
    scores = hf_batches.score_batch(model, sequences, num_scored)
    asked = [Generate("", 6) for _ in sequences]
    answers = hf_batches.answer_batch(model, tiny_tokenizer(bos=False), (), sequences, asked)
    for score, answer, sequence, n in zip(scores, answers, sequences, num_scored, strict=True):
        with torch.inference_mode():
            logprobs = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
        places = range(len(sequence) - n - 1, len(sequence) - 1)
        assert score.logprob == pytest.approx(
            float(sum(logprobs[i, sequence[i + 1]] for i in places)), abs=1e-4
        )
        (alone,) = hf_batches.answer_batch(model, tiny_tokenizer(bos=False), (), [sequence], asked[:1])
        assert answer == alone


def test_batches_are_bounded_and_hold_every_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_batches, "TOKENS_PER_BATCH", 100)
    monkeypatch.setattr(hf_batches, "LOGITS_PER_BATCH", 30 * 128)
    requests = [*(Generate("", 1 + i % 7) for i in range(20)), *(LogLikelihood("", "") for _ in range(20))]
    encoded = [hf_batches.Encoded((5,) * (1 + i % 11), i % 5 * (i >= 20)) for i in range(40)]
    found = list(hf_batches.batches(requests, encoded, 128))
    assert sorted(i for batch in found for i in batch) == list(range(40))
    assert 4 < len(found) < 20
    for batch in found:
        assert len({type(requests[i]) for i in batch}) == 1
        answer = max(getattr(requests[i], "max_tokens", 0) for i in batch)
        assert len(batch) * (max(len(encoded[i].ids) for i in batch) + answer) <= 100
        assert len(batch) * max(encoded[i].num_scored for i in batch) <= 30


def test_settings_of_the_checkpoint_do_not_change_greedy_answers(tmp_path: Path) -> None:
    family, paths = tiny_family(tmp_path)
    with start(family) as engine:
        expected = engine.submit(REQUESTS)
    given = {
        "do_sample": True,
        "temperature": 2.0,
        "repetition_penalty": 5.0,
        "max_length": 3,
        "eos_token_id": 1,
    }
    (paths["base"] / "generation_config.json").write_text(json.dumps(given))
    config = json.loads((paths["base"] / "config.json").read_text())
    (paths["base"] / "config.json").write_text(json.dumps({**config, "repetition_penalty": 5.0}))
    with start(family) as engine:
        assert engine.submit(REQUESTS) == expected


def test_generation_ends_soon_after_every_answer_has_said_its_stop(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    with start(family) as engine:
        *shorter, answer = engine.generate([Generate("the cat 12", n) for n in range(1, 5)])
        stop = answer.text[1:3]
        steps: list[int] = []
        engine._model.register_forward_hook(lambda *_: steps.append(1))
        (stopped,) = engine.generate([Generate("the cat 12", 100, (stop,))])
        assert len(steps) <= 8
        assert stopped.text == answer.text[:1]
        assert stopped.num_tokens == next(each.num_tokens for each in [*shorter, answer] if stop in each.text)


def test_sampling_follows_its_own_seed_and_leaves_torch_as_it_was(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    drawn = [Generate("the cat 12", 12, temperature=3.0, seed=seed) for seed in (1, 2, 1)]
    with start(family) as engine:
        before = torch.random.get_rng_state()
        first, second, again = engine.generate(drawn)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert first == again
        assert first.text != second.text
        assert engine.generate([*(Generate(p, 9) for p in PROMPTS), drawn[1]])[-1] == second
        (narrow,) = engine.generate([Generate("the cat 12", 12, temperature=3.0, top_p=1e-6, seed=5)])
        assert narrow.text == engine.generate([Generate("the cat 12", 12)])[0].text


def test_an_answer_says_whether_it_ended_by_itself_and_what_was_cut(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    with start(family, max_model_len=16) as engine:
        (whole,) = engine.generate([Generate("x y z", 6)])
        assert (whole.finished, whole.cut) == (False, 0)
        (stopped,) = engine.generate([Generate("x y z", 6, (whole.text[2:4],))])
        assert stopped.finished
        (long,) = engine.generate([Generate((5,) * 30, 6)])
        assert long.cut == 20
        (scored,) = engine.loglikelihood([LogLikelihood((5,) * 30, (6, 7))])
        assert (scored.cut, scored.num_tokens) == (17, 2)
        (scored,) = engine.loglikelihood([LogLikelihood((5,) * 30, (6, 7), as_lm_eval=True)])
        assert (scored.cut, scored.num_tokens) == (15, 2)  # the last id need not be read to be scored


def test_max_model_len_shortens_prompts_and_cannot_exceed_the_model(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    with pytest.raises(ConfigError, match=rf"at most the model's {MAX_POSITIONS} tokens, but is 1000"):
        start(family, max_model_len=1000)
    with start(family, max_model_len=8) as engine:
        end, whole = engine.generate([Generate("<s>x y z", 1), Generate("Q" * 20 + "<s>x y z", 1)])
        assert end.text == whole.text
        with pytest.raises(ConfigError, match="8 tokens, but is 9"):
            engine.submit([Generate("a", 9)])


def test_a_checkpoint_that_does_not_fill_the_model_is_refused(tmp_path: Path) -> None:
    _, paths = tiny_family(tmp_path)
    edit(paths["math"], model__norm__weight=None)
    family = open_family(None, {"math": str(paths["math"])})
    with pytest.raises(EngineError, match=re.escape("model.norm.weight")):
        start(family)


def test_an_architecture_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    family, paths = tiny_family(tmp_path)
    (paths["base"] / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(EngineError, match=r"no causal language model.*base"):
        start(family)


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"hidden_act": "unheard_of"}, {"hidden_size": "wide"}, {"vocab_size": -5}],
)
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    family, paths = tiny_family(tmp_path)
    config = json.loads((paths["base"] / "config.json").read_text())
    (paths["base"] / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(EngineError, match=r"no causal language model.*base"):
        start(family)


def test_a_failure_while_the_weights_are_loaded_is_an_engine_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("a size of the weights is not that of the model")

    family, _ = tiny_family(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", failing)
    with pytest.raises(EngineError, match="RuntimeError: a size of the weights"):
        start(family)


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tmp_path: Path) -> None:
    """transformers would ask on the terminal, and wait."""
    family, paths = tiny_family(tmp_path)
    config = json.loads((paths["base"] / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"},
    }
    (paths["base"] / "config.json").write_text(json.dumps(config))
    (paths["base"] / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(EngineError, match="trust_remote_code"):
        start(family)


def test_every_type_that_a_checkpoint_may_have_has_one_in_torch() -> None:
    assert TORCH_DTYPES.keys() == FLOATING | COPIED
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize * 8 == DTYPE_BITS[name]


def test_a_closed_engine_says_so(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    engine = start(family)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit([])
    with pytest.raises(EngineError, match="closed"):
        engine.apply(Mixture.uniform(family.names))


def test_a_device_sink_takes_the_merge_chunk_by_chunk(tmp_path: Path) -> None:
    family, _ = tiny_family(tmp_path)
    mixture = Mixture(family.names, (0.3, 0.7))
    plan = plan_merge(family, [mixture])
    memory = {task.name: torch.full((task.nbytes,), 255, dtype=torch.uint8) for task in plan.tasks}
    stream(plan, DeviceSink(plan, memory), memory_bytes=3 << 12)
    merge_to_directory(family, mixture, tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert np.array_equal(memory[name].numpy(), tensor.reshape(-1).view(torch.uint8).numpy())
