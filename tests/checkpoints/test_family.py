"""A family opens when its members agree; where they do not, both values and both members are named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mergemix.checkpoints.family import open_family
from mergemix.errors import CheckpointError, ConfigError, FamilyError
from mergemix.mixture import Mixture
from tests.tiny import TINY_CONFIG, random_tensors, write_checkpoint

SHAPES: dict[str, tuple[int, ...]] = {"embed": (8, 4), "norm": (4,)}


def test_members_keep_their_order_and_layouts_may_differ(tmp_path: Path) -> None:
    sources = {
        name: str(write_checkpoint(tmp_path / name, random_tensors(SHAPES, seed), shards=seed + 1))
        for seed, name in enumerate(["math", "code"])
    }
    family = open_family(None, sources)
    assert family.names == ("math", "code")
    assert family.template.name == "math"
    base = str(write_checkpoint(tmp_path / "base", random_tensors(SHAPES, 7)))
    assert open_family(base, sources).template.name == "base"


def test_no_expert_or_a_nameless_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no expert"):
        open_family(None, {})
    with pytest.raises(ConfigError, match="no name"):
        open_family(None, {"": str(tmp_path)})


def test_a_defect_in_any_member_is_reported(tmp_path: Path) -> None:
    good = str(write_checkpoint(tmp_path / "good", random_tensors(SHAPES, 0)))
    with pytest.raises(CheckpointError, match="absent"):
        open_family(good, {"math": good, "code": str(tmp_path / "absent")})


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": torch.ones(5).bfloat16()}, ["'norm'", "shape", "[4]", "[5]"]),
        ({"norm": torch.ones(4, 1).bfloat16()}, ["'norm'", "shape", "[4]", "[4, 1]"]),
        ({"norm": torch.ones(4)}, ["'norm'", "dtype", "BF16", "F32"]),
        ({"norm": None}, ["'norm'", "not in code"]),
        ({"bias": torch.ones(4)}, ["'bias'", "is in code", "not in "]),
        ({"bias": torch.ones(4), "bias2": torch.ones(4)}, ["'bias'", "1 more"]),
    ],
)
def test_a_tensor_that_differs_is_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], words: list[str], with_base: bool
) -> None:
    one = str(write_checkpoint(tmp_path / "one", random_tensors(SHAPES, 0)))
    changed = {k: v for k, v in (random_tensors(SHAPES, 1) | change).items() if v is not None}
    other = str(write_checkpoint(tmp_path / "other", changed))
    with pytest.raises(FamilyError) as caught:
        open_family(one if with_base else None, {"math": one, "code": other})
    for word in [*words, "base" if with_base else "math", one, other]:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_different_architectures_are_refused(tmp_path: Path, key: str) -> None:
    tensors = random_tensors(SHAPES, 0)
    one = str(write_checkpoint(tmp_path / "one", tensors))
    other = str(write_checkpoint(tmp_path / "other", tensors, config=TINY_CONFIG | {key: "other"}))
    with pytest.raises(FamilyError, match=f"{key}: math .* code .*'other'"):
        open_family(None, {"math": one, "code": other})


def open_pair(root: Path, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    tensors = random_tensors(SHAPES, 0)
    open_family(
        None,
        {
            "math": str(write_checkpoint(root / "one", tensors, config={**TINY_CONFIG, **one})),
            "code": str(write_checkpoint(root / "other", tensors, config={**TINY_CONFIG, **other})),
        },
    )


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-6}, "rms_norm_eps: math .* 1e-05, code .* 1e-06"),
        ({"num_attention_heads": 4}, {"num_attention_heads": 8}, "num_attention_heads: math .* 4, code .* 8"),
        (
            {"text_config": {"act": "silu"}},
            {"text_config": {"act": "gelu"}},
            "text_config.act: math .* 'silu'",
        ),
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, "rope_theta: math .* 10000.0, code .* 1000000.0"),
        ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta: math"),
        ({"rope_scaling": {"type": "yarn"}}, {}, "rope_type: math .* 'yarn', code .* 'default'"),
    ],
)
def test_configs_that_compute_differently_are_refused(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    with pytest.raises(FamilyError, match=words):
        open_pair(tmp_path, one, other)


def test_configs_may_differ_in_what_does_not_change_the_forward_pass(tmp_path: Path) -> None:
    """Two versions of transformers, two trainers: the same model."""
    one = {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.51",
           "_name_or_path": "a", "eos_token_id": 1, "use_cache": True, "text_config": {"dtype": "float32"}}  # fmt: skip
    other = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "bfloat16",
             "transformers_version": "5.1", "_name_or_path": "b", "eos_token_id": [1, 2], "use_cache": False,
             "head_dim": 32, "text_config": {"dtype": "bfloat16"}}  # fmt: skip
    open_pair(tmp_path, one, other)


def test_a_missing_base_is_told_with_a_sum_that_is_not_one(tmp_path: Path) -> None:
    source = str(write_checkpoint(tmp_path / "m", random_tensors(SHAPES, 0)))
    family = open_family(None, {"math": source})
    with pytest.raises(ConfigError, match=r"sum to 0\.99999999, not 1, .*share of 1e-08: give --base"):
        family.coefficients(Mixture(("math",), (0.99999999,)))
