"""A family opens when its members agree; where they do not, both values and both members are named."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.checkpoints.adapter import Adapter
from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError, ConfigError, FamilyError
from mergemix.mixture import Mixture
from tests.checkpoints.adapter_files import factors, product, stored, write_adapter_files
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


# What a tensor of a mixture is the sum of, with adapters among the experts.

TOUCHED = {"a.weight": (6, 4), "b.weight": (5, 5), "c.weight": (3, 7), "norm": (4,)}
WEIGHTS = st.one_of(
    st.floats(-4, 4), st.just(0.0), st.just(-0.0), st.sampled_from([1e-60, 1 / 3, 2 / 3, 0.5, 1.0, 1e-10])
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two whole experts; adapters that change a, that change b and replace it, and that replace the norm only."""
    root = tmp_path_factory.mktemp("mixed")
    full = {
        name: random_tensors(TOUCHED, seed, torch.float32)
        for seed, name in enumerate(("base", "math", "code"))
    }
    paths = {name: write_checkpoint(root / name, tensors) for name, tensors in full.items()}
    replaced = random_tensors(TOUCHED, 7, torch.float32)
    adapters = {
        "web": factors("a", (6, 4)),
        "chat": factors("b", (5, 5), seed=1)
        | {"b.weight": replaced["b.weight"]}
        | factors("a", (6, 4), seed=2),
        "law": {"norm": replaced["norm"]},
    }
    for name, tensors in adapters.items():
        write_adapter_files(root / name, tensors, use_rslora=name == "web")
    order = ("web", "math", "chat", "law", "code")
    return open_family(str(paths["base"]), {name: str(root / name) for name in order})


def values(member: Checkpoint | Adapter, base: Checkpoint, name: str) -> torch.Tensor:
    """What a member is at one tensor, in fp64."""
    result = stored(member.tensors.get(name, base.tensors[name])).double()
    if isinstance(member, Adapter) and name in member.deltas:
        result = result + product(member.deltas[name])
    return result


@settings(deadline=None)
@given(weights=st.tuples(*[WEIGHTS] * 5))
def test_the_terms_add_up_to_the_mixture(mixed: Family, weights: tuple[float, ...]) -> None:
    base = mixed.base
    assert base is not None
    for name in base.tensors:
        truth = values(base, base, name)
        for expert, weight in zip(mixed.experts, weights, strict=True):
            truth = truth + weight * (values(expert, base, name) - values(base, base, name))
        terms = mixed.terms(name, Mixture(mixed.names, weights))
        assert terms.dense
        parts = [c * stored(tensor).double() for _, tensor, c in terms.dense]
        parts += [scale / delta.scale * product(delta) for _, delta, scale in terms.low_rank]
        bound = 1e-6 * sum((part.abs() for part in parts), torch.zeros(())) + 1e-8
        assert (sum(parts) - truth).abs().le(bound).all()


@settings(deadline=None)
@given(weights=st.tuples(*[WEIGHTS] * 5))
def test_the_terms_are_rounded_once_and_in_order(mixed: Family, weights: tuple[float, ...]) -> None:
    whole = {"a.weight": (1, 4), "b.weight": (1, 2, 4), "c.weight": (1, 4), "norm": (1, 3, 4)}
    low_rank = {"a.weight": (0, 2), "b.weight": (2,)}
    for name, owners in whole.items():
        rest = 1 - math.fsum(weights[owner] for owner in owners)
        shares = [(0, 0.0 if abs(rest) <= 1e-9 else rest), *((owner + 1, weights[owner]) for owner in owners)]
        terms = mixed.terms(name, Mixture(mixed.names, weights))
        assert [(member, c) for member, _, c in terms.dense] == [
            (member, np.float32(c)) for member, c in shares if np.float32(c) != 0
        ]
        assert all(tensor is mixed.members[member].tensors[name] for member, tensor, _ in terms.dense)
        scaled = [
            (owner + 1, weights[owner] * (8 / math.sqrt(2) if owner == 0 else 4.0))
            for owner in low_rank.get(name, ())
        ]
        assert [(member, scale) for member, _, scale in terms.low_rank] == [
            (member, np.float32(scale)) for member, scale in scaled if np.float32(scale) != 0
        ]


def test_the_share_of_an_adapter_stays_in_the_base(mixed: Family) -> None:
    """Also where all weights sum to one, of which a family of whole experts would not read its base."""
    terms = mixed.terms("a.weight", Mixture(mixed.names, (0.5, 0.25, 0.25, 0.0, 0.0)))
    assert [(member, c) for member, _, c in terms.dense] == [(0, 0.75), (2, 0.25)]
    assert [member for member, _, _ in terms.low_rank] == [1, 3]
    terms = mixed.terms("b.weight", Mixture(mixed.names, (0.5, 0.0, 1.0, 0.0, 0.0)))
    assert [(member, c) for member, _, c in terms.dense] == [(3, 1.0)]


def test_terms_of_whole_experts_are_their_coefficients(tmp_path: Path) -> None:
    sources = {
        name: str(write_checkpoint(tmp_path / name, random_tensors(SHAPES, 0)))
        for name in ("base", "math", "code")
    }
    for base in (sources.pop("base"), None):
        family = open_family(base, sources)
        mixture = Mixture(family.names, (1 / 3, 2 / 3))
        shares = {member: c for member, _, c in family.terms("norm", mixture).dense}
        coefficients = family.coefficients(mixture)
        assert shares == {member: c for member, c in enumerate(coefficients) if c != 0}
        assert not family.terms("norm", mixture).low_rank


def test_terms_refuse_what_cannot_be_summed(mixed: Family, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the weight of web is .*, beyond the range of fp32"):
        mixed.terms("a.weight", Mixture(mixed.names, (1e38, 0.0, 0.0, 0.0, 0.0)))
    with pytest.raises(ConfigError, match=r"the weight of the base is -6e\+38, beyond"):
        mixed.terms("c.weight", Mixture(mixed.names, (0.0, 3e38, 0.0, 0.0, 3e38)))
    with pytest.raises(ConfigError, match="the mixture is over math"):
        mixed.terms("norm", Mixture(("math",), (1.0,)))
    family = open_family(None, {"math": str(write_checkpoint(tmp_path / "m", random_tensors(SHAPES, 0)))})
    with pytest.raises(ConfigError, match=r"the weights sum to 0\.5, not 1.*give --base"):
        family.terms("norm", Mixture(("math",), (0.5,)))


def test_a_family_knows_when_a_file_of_it_is_another_one(tmp_path: Path) -> None:
    sources = {
        name: str(write_checkpoint(tmp_path / name, random_tensors(SHAPES, seed), shards=2))
        for seed, name in enumerate(["math", "code"])
    }
    family = open_family(None, sources)
    family.check_unchanged()
    path = family.experts[1].tensors["norm"].path
    path.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{path} was changed"):
        family.check_unchanged()
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read {path}"):
        family.check_unchanged()
