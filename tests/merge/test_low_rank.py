"""Adapters as experts: base plus low-rank products, without ever forming a full expert."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.merge import convert, merge_many, merge_to_directory
from mergemix.merge import stream as stream_module
from mergemix.merge.buffers import Buffers, divide_memory
from mergemix.merge.plan import plan_merge
from mergemix.mixture import Mixture
from mergemix_kernels import reference
from tests.checkpoints.peft_adapters import write_adapter, write_base
from tests.merge.families import Tensors, bits
from tests.tiny import write_checkpoint

SHAPES = {"embed.weight": (90, 24), "layer.weight": (70, 24), "wide.weight": (24, 700), "norm.weight": (24,)}
ADAPTED = ("layer", "wide")


def write_lora(root: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float) -> Path:
    """A PEFT directory. factors: (lora_A [r, in], lora_B [out, r]) by module."""
    root.mkdir()
    rank = max((down.shape[0] for down, _ in factors.values()), default=1)
    tensors = {}
    for module, (down, up) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    patterns = {module: down.shape[0] for module, (down, _) in factors.items() if down.shape[0] != rank}
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": patterns,
        "target_modules": list(factors), "base_model_name_or_path": None,
    }  # fmt: skip
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, root / "adapter_model.safetensors")
    return root


def random_factors(
    generator: torch.Generator, modules: Mapping[str, int], dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """modules: rank by module."""
    return {
        module: (
            torch.randn(rank, SHAPES[f"{module}.weight"][1], generator=generator).to(dtype),
            torch.randn(SHAPES[f"{module}.weight"][0], rank, generator=generator).to(dtype),
        )
        for module, rank in modules.items()
    }


def merged(root: Path) -> Tensors:
    tensors: Tensors = {}
    for path in root.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_output_is_the_reference_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    """Adapters and whole experts in any order, any division of the work, several outputs."""
    root = tmp_path_factory.mktemp("family")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), label="dtype")
    kinds = data.draw(st.lists(st.sampled_from(["whole", "adapter"]), min_size=1, max_size=5), label="kinds")

    def random_model() -> Tensors:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}

    base = random_model()
    sources, wholes, adapters = {}, {}, {}
    for k, kind in enumerate(kinds):
        name = f"e{k}"
        if kind == "whole":
            wholes[name] = random_model()
            sources[name] = str(write_checkpoint(root / name, wholes[name], shards=1 + k % 3))
        else:
            ranks = data.draw(st.dictionaries(st.sampled_from(ADAPTED), st.integers(1, 9), min_size=1))
            factor_dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
            factors = random_factors(generator, ranks, factor_dtype)
            alpha = data.draw(st.sampled_from([1, 4, 16]))
            scale = {module: alpha / down.shape[0] for module, (down, _) in factors.items()}
            sources[name] = str(write_lora(root / name, factors, alpha))
            adapters[name] = (factors, scale)
    family = open_family(str(write_checkpoint(root / "base", base, shards=2)), sources)
    share = st.one_of(st.just(0.0), st.floats(0.01, 1.0))
    weights = data.draw(
        st.lists(st.lists(share, min_size=len(kinds), max_size=len(kinds)), min_size=1, max_size=3)
    )
    mixtures = {f"m{p}": Mixture(family.names, tuple(given)) for p, given in enumerate(weights)}
    pages, workers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    monkeypatch.setattr(
        stream_module, "divide_memory", lambda plan, memory: Buffers(workers, pages * 4096, 0, 0)
    )
    merge_many(family, mixtures, root / "merged")
    for name, mixture in mixtures.items():
        result = merged(root / "merged" / name)
        for tensor in SHAPES:
            expected = reference_merge(tensor, base[tensor], wholes, adapters, mixture)
            assert torch.equal(bits(result[tensor]), bits(expected)), (name, tensor)


def reference_merge(
    tensor: str, base: torch.Tensor, wholes: Mapping[str, Tensors], adapters: Mapping, mixture: Mixture
) -> torch.Tensor:
    """By the rules of the design, from the kernels' torch reference."""
    rest = 1 - sum(weight for name, weight in mixture.as_dict().items() if name in wholes)
    sources = [base, *(wholes[name][tensor] for name in mixture.names if name in wholes)]
    weights = [
        0.0 if abs(rest) < 1e-9 else rest,
        *(mixture.as_dict()[n] for n in mixture.names if n in wholes),
    ]
    module = tensor.removesuffix(".weight")
    left, right, scales = [], [], []
    for name, weight in mixture.as_dict().items():
        if name in adapters and module in adapters[name][0]:
            down, up = adapters[name][0][module]
            left.append(up.float())
            right.append(down.float())
            scales += [weight * adapters[name][1][module]] * down.shape[0]
    if any(np.float32(scale) != 0 for scale in scales):
        fp32 = torch.tensor(scales, dtype=torch.float64).float()
        return reference.low_rank_sum(sources, weights, torch.cat(left, 1), torch.cat(right, 0), fp32)
    return reference.weighted_sum(sources, weights)


def small_family(root: Path, dtype: torch.dtype = torch.bfloat16) -> Family:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    sources = {
        name: str(
            write_lora(root / name, random_factors(generator, {"layer": rank, "wide": 2 * rank}, dtype), 8)
        )
        for name, rank in (("math", 4), ("code", 8))
    }
    return open_family(str(write_checkpoint(root / "base", base)), sources)


def test_only_base_and_factors_are_read(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    stats = merge_to_directory(family, Mixture.uniform(family.names), tmp_path / "merged")
    factors = sum(
        delta.down.nbytes + delta.up.nbytes for expert in family.experts for delta in expert.deltas.values()
    )
    assert stats.bytes_read == stats.bytes_written + factors
    untouched = ("embed.weight", "norm.weight")
    base, result = merged(tmp_path / "base"), merged(tmp_path / "merged")
    assert all(torch.equal(bits(base[name]), bits(result[name])) for name in untouched)
    base_only = merge_to_directory(family, Mixture.base_only(family.names), tmp_path / "base-again")
    assert base_only.bytes_read == base_only.bytes_written


def test_memory_counts_the_factors(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    plan = plan_merge(family, [Mixture.uniform(family.names)])
    factor_bytes = 4 * (8 + 16) * (24 + 700)
    assert max(task.factor_bytes for task in plan.tasks) == factor_bytes
    for memory in (3 * factor_bytes, 20 * factor_bytes):
        buffers = divide_memory(plan, memory)
        assert buffers.factor_bytes >= factor_bytes
        assert buffers.total_bytes <= memory
    with pytest.raises(ConfigError, match="needs at least"):
        divide_memory(plan, factor_bytes)


def test_an_adapter_with_nan_is_named(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    path = tmp_path / "code" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.wide.lora_A.weight"][0, 3] = float("nan")
    save_file(tensors, path)
    family = open_family(str(tmp_path / "base"), {name: str(tmp_path / name) for name in ("math", "code")})
    with pytest.raises(NonFiniteError, match=r"'wide.weight' holds NaN or Inf in code \(.*adapter_model"):
        merge_to_directory(family, Mixture.uniform(family.names), tmp_path / "merged")
    merge_to_directory(family, Mixture.one_hot(family.names, "math"), tmp_path / "math-only")


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2"])
def test_one_hot_is_the_adapted_model_that_peft_makes(tmp_path: Path, arch: str) -> None:
    """Linear layers and embeddings, and GPT-2's layers that are stored transposed; a mixture lies in between."""
    from transformers import AutoModelForCausalLM

    base = write_base(tmp_path / "base", arch)
    targets = ["c_attn", "c_fc"] if arch == "gpt2" else ["q_proj", "down_proj"]
    targets += ["embed_tokens"] if arch == "llama" else []
    options = (
        {"fan_in_fan_out": True} if arch == "gpt2" else {"rank_pattern": {"q_proj": 2}, "use_rslora": True}
    )
    ids = torch.arange(6)[None]
    logits, sources = {}, {}
    for name, rank in (("math", 3), ("code", 5)):
        peft = write_adapter(base, tmp_path / name, r=rank, lora_alpha=6, target_modules=targets, **options)
        sources[name] = str(tmp_path / name)
        with torch.no_grad():
            logits[name] = peft(ids).logits
    family = open_family(str(base), sources)
    for name in family.names:
        merge_to_directory(family, Mixture.one_hot(family.names, name), tmp_path / f"{name}-merged")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged").eval()
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, logits[name], atol=1e-4, rtol=1e-4)
    merge_to_directory(family, Mixture.uniform(family.names), tmp_path / "half")
    parts = [merged(tmp_path / f"{name}-merged") for name in family.names]
    for name, tensor in merged(tmp_path / "half").items():
        assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("saved_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_whole_tensor_of_another_type_counts_as_a_saved_expert_s(
    tmp_path: Path, base_dtype: torch.dtype, saved_dtype: torch.dtype
) -> None:
    """Training in mixed precision leaves modules_to_save in fp32 beside a bf16 base."""
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator).to(base_dtype) for name, shape in SHAPES.items()}
    saved = {}
    for name in ("math", "code"):
        root = write_lora(tmp_path / name, random_factors(generator, {"layer": 3}, saved_dtype), 6)
        saved[name] = torch.randn(SHAPES["wide.weight"], generator=generator).to(saved_dtype)
        saved[name][0, :4] = torch.tensor([0.0, -0.0, 1e-30, 6e4])
        path = root / "adapter_model.safetensors"
        save_file({**load_file(path), "base_model.model.wide.weight": saved[name]}, path)
        config = json.loads((root / "adapter_config.json").read_text())
        (root / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["wide"]}))
    base_root = write_checkpoint(tmp_path / "base", base)
    family = open_family(str(base_root), {name: str(tmp_path / name) for name in saved})
    mixture = Mixture.of(family.names, {"math": 3, "code": 1})
    stats = merge_to_directory(family, mixture, tmp_path / "merged", memory_bytes=1 << 20)
    as_saved = [saved[name].to(base_dtype) for name in family.names]
    expected = reference.weighted_sum(as_saved, mixture.weights)
    assert torch.equal(bits(merged(tmp_path / "merged")["wide.weight"]), bits(expected))
    assert stats.bytes_read == plan_merge(family, [mixture]).bytes_read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversions_are_torch_s(dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    words = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    values = words.to(torch.int32).view(torch.float32)
    narrowed = torch.empty(len(values) * dtype.itemsize, dtype=torch.uint8)
    convert.narrow(values.numpy(), name, narrowed.numpy())
    finite = ~values.isnan()
    assert torch.equal(narrowed.view(dtype)[finite], values.to(dtype)[finite])
    assert narrowed.view(dtype)[~finite].isnan().all()
    widened = torch.empty_like(values)
    convert.widen(narrowed.numpy(), name, widened.numpy())
    assert torch.equal(widened[finite], values.to(dtype).float()[finite])


def test_outputs_without_an_adapter_copy_equal_tensors_though_others_use_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    same = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    sources = {name: str(write_checkpoint(tmp_path / name, same)) for name in ("a", "b", "c")}
    lora = write_lora(tmp_path / "lora", random_factors(generator, {"layer": 2}, torch.float32), 4)
    base = str(write_checkpoint(tmp_path / "base", same))
    family = open_family(base, {**sources, "lora": str(lora)})
    mixtures = {
        "equal": Mixture(family.names, (0.3, 0.3, 0.4, 0.0)),
        "adapted": Mixture(family.names, (0.5, 0.0, 0.0, 0.5)),
    }
    merge_many(family, mixtures, tmp_path / "both")
    for name, tensor in merged(tmp_path / "both" / "equal").items():
        assert torch.equal(bits(tensor), bits(same[name])), name
    assert not torch.equal(merged(tmp_path / "both" / "adapted")["layer.weight"], same["layer.weight"])


def test_an_adapter_beside_a_copy_of_its_base_s_configuration_is_one(tmp_path: Path) -> None:
    family = small_family(tmp_path)
    (tmp_path / "math" / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    again = open_family(str(tmp_path / "base"), {name: str(tmp_path / name) for name in family.names})
    assert [type(expert) for expert in again.experts] == [type(expert) for expert in family.experts]
