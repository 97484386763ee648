"""An adapter and a base that belong together are fitted; where they do not, both and the tensor are named."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.adapter import open_adapter
from mergemix.checkpoints.adapter_fit import fit_adapter
from mergemix.checkpoints.checkpoint import Location, open_checkpoint
from mergemix.checkpoints.family import open_family
from mergemix.config import RunConfig
from mergemix.errors import CheckpointError, ConfigError, FamilyError
from mergemix.run import run
from tests.checkpoints.adapter_files import (
    change_config,
    change_tensors,
    factors,
    fitted,
    product,
    write_adapter_files,
)
from tests.checkpoints.conftest import BaseOf
from tests.checkpoints.peft_adapters import VOCAB_SIZE, write_adapter, write_base
from tests.study_fixture import write_benchmark
from tests.tiny import random_tensors, write_checkpoint


@pytest.mark.parametrize("change", ["dropped", "added"])
def test_the_base_may_be_stored_with_or_without_a_leading_part(
    base_of: BaseOf, tmp_path: Path, change: str
) -> None:
    """The Hub's GPT-2 has no "transformer."; a model trained without its head has none either, and its base may."""
    peft = write_adapter(
        base_of("gpt2"), tmp_path / "adapter", r=2, target_modules=["c_attn", "wpe"]
    ).double()
    base = shutil.copytree(base_of("gpt2"), tmp_path / "base")
    old, new = ("transformer.", "") if change == "dropped" else ("", "model.")
    tensors = load_file(base / "model.safetensors")
    save_file({new + name.removeprefix(old): t for name, t in tensors.items()}, base / "model.safetensors")
    change_config(tmp_path / "adapter", base_model_name_or_path=None)
    opened, expert = fitted(base, tmp_path / "adapter")
    assert len(expert.deltas) == 3
    assert expert.deltas.keys() <= opened.tensors.keys()
    name = f"{new}{'transformer.'.removeprefix(old)}wpe.weight"
    layer = peft.get_submodule("base_model.model.transformer.wpe")
    torch.testing.assert_close(product(expert.deltas[name]), layer.get_delta_weight("default"))


def test_experts_of_a_mixture_of_experts_are_modules_like_others(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{k}.gate_proj" for k in range(12)]
    base = write_checkpoint(
        tmp_path / "base", random_tensors({f"{name}.weight": (6, 4) for name in names}, seed=0)
    )
    tensors = factors(names[1], (6, 4)) | factors(names[11], (6, 4), rank=3, seed=1)
    adapter = write_adapter_files(tmp_path / "a", tensors, rank_pattern={"experts.11.gate_proj": 3})
    _, expert = fitted(base, adapter)
    assert {name: delta.rank for name, delta in expert.deltas.items()} == {
        f"{names[1]}.weight": 2,
        f"{names[11]}.weight": 3,
    }


def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path, copy: Path) -> None:
    change_config(copy, base_model_name_or_path=None)
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (16,)}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in {
            "self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24), "input_layernorm": (16,),
            "post_attention_layernorm": (16,)}.items()}  # fmt: skip
    tensors = random_tensors(shapes, seed=0, dtype=torch.float32)
    down = "model.layers.1.mlp.down_proj.weight"

    def refused(words: str, changes: dict[str, torch.Tensor | None]) -> None:
        changed = {name: t for name, t in (tensors | changes).items() if t is not None}
        base = write_checkpoint(tmp_path / "base", changed)
        with pytest.raises(FamilyError, match=words) as caught:
            fitted(base, copy)
        assert str(base) in str(caught.value)
        assert str(copy) in str(caught.value)

    fitted(write_checkpoint(tmp_path / "base", tensors), copy)
    refused(rf"'{down}' by a matrix of shape \[16, 24\], but .* shape \[16, 25\]", {down: torch.ones(16, 25)})
    refused(r"shape \[16, 24\], but .* shape \[24\]", {down: torch.ones(24)})
    refused(r"shape \[16, 24\], but .* shape \[16, 24, 1\]", {down: torch.ones(16, 24, 1)})
    refused(rf"'{down}', which is I32 .*cannot be averaged", {down: torch.ones(16, 24).int()})
    refused(rf"changes tensor '{down}', which .* does not hold.*another base", {down: None})
    refused(r"'norm.weight' differs in shape: \[16\] in .*, \[17\] in", {"norm.weight": torch.ones(17)})
    refused(r"'norm.weight' differs in dtype: .* as F32, .* as I32", {"norm.weight": torch.ones(16).int()})
    fitted(
        write_checkpoint(tmp_path / "rounded", {**tensors, "norm.weight": torch.ones(16).bfloat16()}), copy
    )
    change_tensors(copy, {"norm.weight": torch.ones(16)})
    refused("one tensor of .* under two names", {"norm.weight": None, "model.norm.weight": torch.ones(16)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.weight', .*embeddings and output head at once"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "head at once.*untie a copy"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "'lm_head.weight'.*a head of its own",
        ),
        ({"target_modules": ["lm_head"]}, "'lm_head.weight'.*a head of its own"),
    ],
)
def test_one_half_of_tied_embeddings_is_refused(
    base_of: BaseOf, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    write_adapter(base_of("llama_tied"), tmp_path / "adapter", r=2, **settings)
    base = shutil.copytree(base_of("llama_tied"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    # transformers 4 leaves it out where it is the default of the architecture
    for told in ({"tie_word_embeddings": True}, {}, {"text_config": {"tie_word_embeddings": True}}):
        rest = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        (base / "config.json").write_text(json.dumps(rest | told))
        with pytest.raises(FamilyError, match=words):
            fitted(base, tmp_path / "adapter")


@pytest.mark.parametrize("told", [{"tie_word_embeddings": True}, {}])
def test_a_layer_with_as_many_rows_as_there_are_tokens_is_no_tied_embedding(
    tmp_path: Path, told: dict[str, Any]
) -> None:
    layer = "model.layers.0.mlp.up_proj"
    shapes = {"model.embed_tokens.weight": (24, 16), f"{layer}.weight": (24, 16)}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 24, **told}
    base = write_checkpoint(tmp_path / "base", random_tensors(shapes, 0), config)
    adapter = write_adapter_files(tmp_path / "adapter", factors(layer, (24, 16)))
    assert list(fitted(base, adapter)[1].deltas) == [f"{layer}.weight"]
    head = write_adapter_files(tmp_path / "head", factors("model.embed_tokens", (24, 16)))
    with pytest.raises(FamilyError, match="head at once"):
        fitted(base, head)


def test_a_head_that_only_claims_to_be_tied_is_refused(base_of: BaseOf, tmp_path: Path) -> None:
    for name, chosen in {
        "deltas": {"target_modules": ["embed_tokens", "lm_head"]},
        "tensors": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }.items():
        write_adapter(base_of("llama_tied"), tmp_path / name, r=2, ensure_weight_tying=True, **chosen)
    fitted(base_of("llama_tied"), shutil.copytree(tmp_path / "deltas", tmp_path / "scaled"))
    change_config(tmp_path / "scaled", alpha_pattern={"lm_head": 9})
    change_tensors(tmp_path / "deltas", {"lm_head.lora_B.weight": torch.ones(VOCAB_SIZE, 2)})
    change_tensors(tmp_path / "tensors", {"lm_head.weight": torch.ones(VOCAB_SIZE, 16)})
    for name in ("scaled", "deltas", "tensors"):
        with pytest.raises(FamilyError, match="a head of its own"):
            fitted(base_of("llama_tied"), tmp_path / name)


def test_layers_stored_both_ways_leave_a_square_one_open(base_of: BaseOf, tmp_path: Path) -> None:
    tensors = random_tensors({"a.weight": (4, 6), "b.weight": (5, 3), "c.weight": (7, 7)}, seed=0)
    base = write_checkpoint(tmp_path / "base", tensors)
    sides = factors("a", (4, 6)) | factors("b", (3, 5))
    _, expert = fitted(base, write_adapter_files(tmp_path / "two", sides))
    assert {name: delta.transposed for name, delta in expert.deltas.items()} == {
        "a.weight": False,
        "b.weight": True,
    }
    with pytest.raises(FamilyError, match=r"stores as \[in, out\] and others .* of the square 'c.weight'"):
        fitted(base, write_adapter_files(tmp_path / "three", sides | factors("c", (7, 7))))
    for told, others in ((False, factors("a", (4, 6))), (True, factors("b", (3, 5)))):
        adapter = write_adapter_files(
            tmp_path / f"{told}", factors("c", (7, 7)) | others, fan_in_fan_out=not told
        )
        assert fitted(base, adapter)[1].deltas["c.weight"].transposed is told


def test_the_base_that_an_adapter_names_must_be_the_one_given(
    base_of: BaseOf, copy: Path, tmp_path: Path
) -> None:
    base = base_of("llama")
    other = write_base(tmp_path / "other", seed=9)
    with pytest.raises(
        FamilyError, match=rf"was trained on '{base}'.*the base given is {other}.*in a copy of"
    ):
        fitted(other, copy)
    fitted(shutil.copytree(base, tmp_path / "moved"), copy)
    for unknown in (str(tmp_path / "gone"), "org/on-the-hub", "", None, "a\0b"):
        change_config(copy, base_model_name_or_path=unknown)
        fitted(other, copy)
    quantised = write_checkpoint(
        tmp_path / "q", {"a": torch.ones(2)}, config={"quantization_config": {"bits": 4}}
    )
    change_config(copy, base_model_name_or_path=str(quantised))
    fitted(base, copy)


def test_another_repository_than_the_one_named_is_refused(base_of: BaseOf, copy: Path) -> None:
    change_config(copy, base_model_name_or_path="Org/base")
    base = open_checkpoint("base", str(base_of("llama")))
    adapter = open_adapter("math", "org/adapter", Location(copy, "0" * 40))
    for same in ("Org/base", "org/base@v1"):
        fit_adapter(adapter, replace(base, source=same))
    with pytest.raises(
        FamilyError, match=r"math \(org/adapter\) was trained on 'Org/base'.* given is org/base2;"
    ):
        fit_adapter(adapter, replace(base, source="org/base2"))


def test_a_family_of_adapters_needs_a_base(base_of: BaseOf, made: Path) -> None:
    for experts in ({"math": str(made)}, {"code": str(base_of("llama")), "math": str(made)}):
        with pytest.raises(ConfigError, match=r"math \(.*\) is a LoRA adapter.*give the base.*--base"):
            open_family(None, experts)
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        open_family(str(made), {"math": str(made)})


def test_a_run_refuses_adapters_without_their_base_before_anything_starts(
    base_of: BaseOf, made: Path, tmp_path: Path
) -> None:
    bench = write_benchmark(tmp_path, "copy", 4, random.Random(0), grader="contains", max_tokens=4)
    config = RunConfig(
        experts={"code": str(base_of("llama")), "math": str(made)},
        bench=(str(bench),),
        study=tmp_path / "study",
        budget=9,
        engine="hf",
    )
    with pytest.raises(ConfigError, match=rf"math \({made}\) is a LoRA adapter.*give the base"):
        run(config)
    assert not (tmp_path / "study").exists()
