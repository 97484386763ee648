"""Adapters that PEFT wrote mean here what they mean there; whatever means more is refused, and the reason named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mergemix.checkpoints.adapter import Adapter, fingerprint, is_adapter, open_adapter
from mergemix.checkpoints.adapter_config import read_settings
from mergemix.checkpoints.checkpoint import Location
from mergemix.errors import CheckpointError
from tests.checkpoints.adapter_files import (
    adapted,
    change_config,
    change_tensors,
    fitted,
    product,
    write_adapter_files,
)
from tests.checkpoints.conftest import BaseOf
from tests.checkpoints.peft_adapters import write_adapter, write_base

Q_PROJ = "model.layers.0.self_attn.q_proj"
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.0.mlp.down_proj": 3},
    "alpha_pattern": {"down_proj": 5, r".*\.1\.self_attn\..*": 7},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear layers": ("llama", {"r": 4, "target_modules": "all-linear"}),
    "patterns": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **PATTERNS}),
    "rank-stabilised": ("llama", {"r": 3, "target_modules": ["q_proj"], "use_rslora": True}),
    "rank-stabilised patterns": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, **PATTERNS},
    ),
    "modules to save": ("llama", {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embeddings and head": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head"]}),
    "all biases": ("llama", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "own biases": ("llama", {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "tied": ("llama_tied", {"r": 2, "target_modules": "all-linear", "modules_to_save": ["norm"]}),
    "tied embeddings trained together": (
        "llama_tied",
        {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied embeddings saved": (
        "llama_tied",
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "layers as [in, out]": (
        "gpt2",
        {"r": 2, "target_modules": ["c_attn", "c_proj", "wpe"], "modules_to_save": ["ln_f"]},
    ),
    "square layers as [in, out]": ("gpt2", {"r": 2, "target_modules": r".*attn\.c_proj"}),
}  # fmt: skip


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(torch.tensor([[3, 7, 9, 1, 4]])).logits


def check_model(base: Path, adapter: Path, peft: torch.nn.Module, tolerance: float = 1e-12) -> Adapter:
    """What the adapter stands for answers as PEFT's model does; both in fp64."""
    opened, expert = fitted(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(base).double()
    missing, unexpected = model.load_state_dict(adapted(opened, expert), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(logits(model), logits(peft), rtol=0, atol=tolerance)
    return expert


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_means_what_it_means_to_peft(base_of: BaseOf, tmp_path: Path, case: str) -> None:
    arch, settings = CASES[case]
    peft = write_adapter(base_of(arch), tmp_path / "adapter", **settings).double()
    expert = check_model(base_of(arch), tmp_path / "adapter", peft)
    layers = {name: layer for name, layer in peft.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        delta = expert.deltas.get(f"{name.removeprefix('base_model.model.')}.weight")
        if delta is None:
            assert name.endswith("lm_head"), "only a tied head is left out"
            continue
        truth = layer.get_delta_weight("default")
        assert truth.abs().max() > 1e-3
        torch.testing.assert_close(product(delta), truth, rtol=0, atol=1e-14)


MODULES = [
    "q_proj",
    "a.q_proj",
    "a.xq_proj",
    "a.q_proj.b",
    "layers.1.k",
    "layers.11.k",
    "a.layers.1.k",
    "a[0].k",
]
KEYS = [
    "q_proj",
    "a.q_proj",
    r"layers\.1\.k",
    "layers.1.k",
    "^a.*",
    "1.k",
    "q_proj|k",
    "k$",
    "a[0].k",
    ".*",
    "a.q",
]


@settings(deadline=None, max_examples=50)
@given(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
def test_patterns_match_as_they_do_in_peft(tmp_path_factory: pytest.TempPathFactory, keys: list[str]) -> None:
    ranks = {key: number + 10 for number, key in enumerate(keys)}
    directory = write_adapter_files(tmp_path_factory.mktemp("a"), {}, rank_pattern=ranks, alpha_pattern=ranks)
    _, told = read_settings(directory / "adapter_config.json")
    for module in MODULES:
        truth = ranks.get(get_pattern_key(ranks.keys(), module))
        assert told.rank_of(module) == (truth or 2)
        assert told.scale_of(module, 4) == (truth or 8) / 4


@pytest.mark.parametrize("autocast", [True, False])
def test_factors_keep_their_dtype_beside_a_base_of_another(tmp_path: Path, autocast: bool) -> None:
    base = write_base(tmp_path / "base", dtype="bfloat16")
    write_adapter(base, tmp_path / "adapter", autocast=autocast, r=2, target_modules=["q_proj"])
    opened, expert = fitted(base, tmp_path / "adapter")
    assert {tensor.dtype for tensor in opened.tensors.values()} == {"BF16"}
    assert {d.dtype for delta in expert.deltas.values() for d in (delta.up, delta.down)} == {
        "F32" if autocast else "BF16"
    }


def test_pissa_is_refused_until_peft_has_converted_it(base_of: BaseOf, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    start, end = tmp_path / "start", tmp_path / "end"
    write_adapter(base_of("llama"), start, size=0.0, **settings)
    peft = write_adapter(
        base_of("llama"), end, save={"path_initial_model_for_weight_conversion": start}, **settings
    )
    assert json.loads((end / "adapter_config.json").read_text())["r"] == 4
    check_model(base_of("llama"), end, peft, tolerance=1e-4)  # PEFT takes its start out of the base in fp32
    write_adapter(base_of("llama"), start, **settings)
    with pytest.raises(CheckpointError, match=r"init_lora_weights is 'pissa'.*path_initial_model_for_weight"):
        fitted(base_of("llama"), start)


def test_dora_is_refused(base_of: BaseOf, tmp_path: Path) -> None:
    write_adapter(base_of("llama"), tmp_path / "a", r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match=r"use_dora is True: DoRA .*merge_and_unload"):
        fitted(base_of("llama"), tmp_path / "a")
    change_config(tmp_path / "a", use_dora=False)
    with pytest.raises(CheckpointError, match=r"q_proj.lora_magnitude_vector' is neither a factor"):
        fitted(base_of("llama"), tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "only LoRA .* peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True}, "use_qalora is True: QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"lora_bias": True}, "lora_bias is True: a bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters .*fused"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is .*rows of the embeddings"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication .*repeats"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens .*some tokens"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config .*routes"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"kasa_config": {"beta": 0.1}}, "'kasa_config' .*not known here"),
        ({"from_the_future": 0.5}, "'from_the_future' is 0.5.*not known here.*or remove it"),
        *(({"init_lora_weights": start}, f"init_lora_weights is '{start}'.*changes the base")
          for start in ("olora", "corda", "loftq", "lora_ga", "pissa_niter_4")),
        ({"r": 0}, "r must be a positive integer, but is 0"),
        ({"r": "2"}, "r must be a positive integer"),
        ({"r": True}, "r must be a positive integer"),
        ({"r": 3}, r"its rank is 3, but lora_A has shape \[2, .*\] \[rank, in\]"),
        ({"rank_pattern": {"q_proj": 3}}, f"{Q_PROJ}.*its rank is 3"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern must map names to positive integers"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map names"),
        ({"alpha_pattern": {"q_proj": "high"}}, "alpha_pattern must map names to finite numbers"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is no regular expression"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, but is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, but is nan"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"bias": "some"}, "bias must be none, all or lora_only"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path must be a string"),
    ],
)  # fmt: skip
def test_a_configuration_that_means_more_or_nothing_is_refused(
    base_of: BaseOf, copy: Path, change: dict[str, Any], words: str
) -> None:
    change_config(copy, **change)
    with pytest.raises(CheckpointError, match=words) as caught:
        fitted(base_of("llama"), copy)
    assert str(copy) in str(caught.value)


def test_settings_that_change_nothing_are_accepted(base_of: BaseOf, copy: Path) -> None:
    before = fitted(base_of("llama"), copy)[1]
    change_config(copy, lora_dropout=0.5, use_dora=False, from_the_future=None, more=[], inference_mode=False,
                  init_lora_weights="gaussian", eva_config={"rho": 2.0}, megatron_core="megatron.core")  # fmt: skip
    assert fitted(base_of("llama"), copy)[1].deltas.keys() == before.deltas.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{Q_PROJ}.lora_B.weight": None}, f"module '{Q_PROJ}' has .*but no lora_B"),
        ({f"{Q_PROJ}.lora_A.weight": None}, "but no lora_A"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(0)}, r"has shape \[0\]; .*DeepSpeed or FSDP"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 16, 3, 3)}, "must be a matrix, .* convolution"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(3, 16)}, r"its rank is 2, .*\[3, 16\]"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 16).double()}, "is F64; only BF16, F16, F32"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 16).int()}, "is I32; only"),
        ({f"{Q_PROJ}.lora_B.bias": torch.ones(16)}, "lora_B.bias' is neither a factor of LoRA"),
        ({f"{Q_PROJ}.lora_A.default.weight": torch.ones(2, 16)}, "lora_A.default.weight' is neither"),
        (
            {"model.layers.0.mlp.experts.base_layer.lora_A.weight": torch.ones(2, 16)},
            "base_layer.* is neither",
        ),
        ({"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}, "is neither"),
        ({f"{Q_PROJ}.lora_embedding_A": torch.ones(2, 16)}, "are the same part of one module"),
        ({"x.lora_A.weight": torch.ones(2, 4), "x.lora_embedding_B": torch.ones(4, 2)}, "are not a pair"),
        ({"model.norm.base_layer.weight": torch.ones(16)}, "are the same part of one module"),
    ],
)
def test_tensors_that_are_no_lora_are_refused(
    base_of: BaseOf, copy: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    change_tensors(copy, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        fitted(base_of("llama"), copy)
    assert str(copy / "adapter_model.safetensors") in str(caught.value)


def test_a_tensor_without_pefts_prefix_is_refused(base_of: BaseOf, copy: Path) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): t for name, t in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"is neither a factor of LoRA \(base_model.model.<module>"):
        fitted(base_of("llama"), copy)


def test_a_directory_without_safe_weights_is_refused(base_of: BaseOf, copy: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(CheckpointError, match=words):
            fitted(base_of("llama"), copy)

    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused("is truncated")
    path.unlink()
    refused("holds no adapter_model.safetensors, no other weights")
    (copy / "adapter_model.bin").write_bytes(b"pickle")
    refused("only adapter_model.bin, which can run code when loaded")
    save_file({}, path)
    refused("holds no tensors")
    (copy / "adapter_config.json").write_text("{")
    refused("not valid JSON")


def test_an_adapter_is_told_from_a_model(base_of: BaseOf, copy: Path, tmp_path: Path) -> None:
    assert is_adapter(copy)
    assert not is_adapter(base_of("llama"))
    assert not is_adapter(tmp_path)
    shutil.copy(base_of("llama") / "config.json", copy)  # as some trainers do
    assert is_adapter(copy)
    shutil.copy(base_of("llama") / "model.safetensors", copy)
    assert not is_adapter(copy)


def test_what_was_opened_says_where_it_is_from(made: Path) -> None:
    adapter = open_adapter("math", "org/adapter", Location(made, "0" * 40))
    assert (adapter.name, adapter.source, adapter.root, adapter.revision) == (
        "math",
        "org/adapter",
        made,
        "0" * 40,
    )
    assert adapter.config["r"] == 2
    delta = adapter.deltas[f"{Q_PROJ}.weight"]
    assert (delta.rank, delta.shape, delta.scale, delta.transposed) == (2, (16, 16), 4.0, False)
    assert "model.norm.weight" in adapter.tensors


def test_the_fingerprint_is_of_the_contents(made: Path, copy: Path) -> None:
    def now() -> str:
        return fingerprint(open_adapter("any", str(copy), Location(copy, None)))

    before = fingerprint(open_adapter("math", str(made), Location(made, None)))
    change_config(copy, base_model_name_or_path="moved/elsewhere")
    assert now() == before
    tensors = load_file(copy / "adapter_model.safetensors")
    for name in (f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight", "model.norm.weight"):
        change_tensors(copy, {name: tensors[f"base_model.model.{name}"] + 1})
        assert now() != before
        change_tensors(copy, {name: tensors[f"base_model.model.{name}"]})
        assert now() == before
    change_config(copy, lora_alpha=9)
    assert now() != before
