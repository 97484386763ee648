"""Folding: what a view of a merged tensor takes of the adapters' factors, against the tensor as merged on disk."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import NonFiniteError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve.low_rank import Cut, cut, pack
from mergemix_kernels.low_rank import GroupedLowRankSum, LowRankGroup
from tests.checkpoints.adapter_files import change_tensors, factors, stored, write_adapter_files
from tests.checkpoints.peft_adapters import write_adapter, write_base

View = Callable[[torch.Tensor], torch.Tensor]


def chosen(view: torch.Tensor, found: Cut, width: int) -> bool:
    """Whether the cut names exactly the elements of a view of an arange, in the order of the matrix."""
    expected = found.rows[:, None] * width + found.columns
    return torch.equal(found.arranged(view).reshape(expected.shape), expected)


@st.composite
def chains(draw, whole: torch.Tensor) -> torch.Tensor:
    """Any chain of the operations that loaders use on checkpoint tensors."""
    view = whole
    for _ in range(draw(st.integers(0, 5))):
        dimension = draw(st.integers(0, view.dim() - 1)) if view.dim() else None
        name = draw(
            st.sampled_from(
                ["slice", "narrow", "unbind", "unsqueeze", "transpose", "split", "join", "expand"]
            )
        )
        if name == "unsqueeze":
            view = view.unsqueeze(draw(st.integers(0, view.dim())))
        elif name == "expand":
            view = view.expand(draw(st.integers(1, 2)), *view.shape)
        elif dimension is None:
            break
        elif name in ("slice", "narrow"):
            begin = draw(st.integers(0, view.shape[dimension] - 1))
            length = draw(st.integers(1, view.shape[dimension] - begin))
            view = view.narrow(dimension, begin, length)
            if name == "slice":
                view = view[(slice(None),) * dimension + (slice(None, None, draw(st.integers(1, 3))),)]
        elif name == "unbind":
            view = draw(st.sampled_from(view.unbind(dimension)))
        elif name == "transpose":
            view = view.transpose(dimension, draw(st.integers(0, view.dim() - 1)))
        elif name == "split":
            length = view.shape[dimension]
            divisor = draw(st.sampled_from([each for each in range(1, length + 1) if length % each == 0]))
            view = view.unflatten(dimension, (divisor, -1))
        elif view.is_contiguous():  # join
            view = view.flatten(dimension)
    return view


def is_grid(view: torch.Tensor, width: int) -> bool:
    """Whether the elements (numbered) are a matrix of some rows and columns, each dimension split in any one way."""
    lengths = [length for length in view.shape if length != 1]
    over_columns = [[part for part in range(1, length + 1) if length % part == 0] for length in lengths]
    for parts in product(*over_columns):
        split = view.reshape(
            [each for n, part in zip(lengths, parts, strict=True) for each in (n // part, part)]
        )
        order = [*range(0, 2 * len(lengths), 2), *range(1, 2 * len(lengths), 2)]
        matrix = split.permute(order).reshape(-1, prod(parts))
        rows, columns = matrix // width, matrix % width
        if torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(
            columns, columns[:1].expand_as(columns)
        ):
            return True
    return False


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(6, 8), (12, 4), (1, 6), (5, 1), (4, 3), (8, 8)]),
    first=st.sampled_from([0, 5]),
)
def test_a_cut_names_the_elements_of_any_view(data, shape, first):
    width = shape[1]
    memory = torch.arange(-first, prod(shape))
    view = data.draw(chains(memory[first:].view(shape)))
    found = cut(view, first, shape)
    if found is None:
        assert not is_grid(view, width)
        return
    assert chosen(view, found, width)
    # Another tensor of that shape is arranged alike, whatever its strides.
    other = view.contiguous()
    assert torch.equal(found.arranged(other), found.arranged(view))


@pytest.mark.parametrize(
    ("shape", "of"),
    [
        ((8, 6), lambda w: w),
        ((8, 6), lambda w: w.narrow(0, 2, 4)),
        ((8, 6), lambda w: w.narrow(1, 3, 3)),
        ((8, 6), lambda w: w[4:, :3].unsqueeze(0)),
        ((8, 6), lambda w: w.t()),
        ((8, 6), lambda w: w.narrow(1, 3, 3).t()),
        ((24, 6), lambda w: w.view(2, 3, 4, 6).transpose(0, 1)),  # GPT-NeoX: heads interleave q, k and v
        ((24, 6), lambda w: w.view(2, 3, 4, 6)[:, 1].unsqueeze(1)),
        ((24, 6), lambda w: w.view(4, 6, 6).unbind(0)[2]),  # experts in one tensor
        ((24, 6), lambda w: w.view(4, 6, 6).unbind(0)[2].t().narrow(0, 2, 2)),
        ((8, 6), lambda w: w.flatten()),
        ((8, 6), lambda w: w.view(2, 24)),
        ((8, 6), lambda w: w[3]),
        ((8, 6), lambda w: w[3:4].expand(2, 3, 6)),
        ((8, 6), lambda w: w[1::3, ::2]),
    ],
)  # fmt: skip
def test_what_loaders_do_is_a_choice_of_rows_and_columns(shape: tuple[int, int], of: View) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    found = cut(of(whole), 0, shape)
    assert found is not None
    assert chosen(of(whole), found, shape[1])
    # A tensor without memory tells as much.
    told = cut(of(torch.empty(shape, device="meta")), 0, shape)
    assert told is not None
    assert torch.equal(told.rows, found.rows)
    assert torch.equal(told.columns, found.columns)


def test_what_is_no_choice_of_rows_and_columns() -> None:
    whole = torch.arange(48).view(6, 8)
    for view in (
        whole.diagonal(),
        whole.flatten()[3:13],
        whole.flatten()[::3],
        whole.as_strided((2, 6), (4, 1), 4),
    ):
        assert cut(view, 0, (6, 8)) is None


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """GPT-2, whose linear layers are stored as [in, out], in bf16, with adapters of different ranks and dtypes."""
    root = tmp_path_factory.mktemp("family")
    base = write_base(root / "base", "gpt2", "bfloat16")
    write_adapter(base, root / "math", target_modules=["c_attn", "c_proj", "c_fc"], r=4, fan_in_fan_out=True)
    write_adapter(
        base,
        root / "code",
        target_modules=["c_attn", "wpe"],
        r=3,
        use_rslora=True,
        autocast=False,
        fan_in_fan_out=True,
    )
    write_adapter(base, root / "web", target_modules=["c_fc"], r=2, lora_alpha=32, fan_in_fan_out=True)
    return open_family(str(base), {name: str(root / name) for name in ("math", "code", "web")})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("llama")
    base = write_base(root / "base", "llama", "bfloat16")
    write_adapter(
        base,
        root / "math",
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        r=4,
        save={"save_embedding_layers": False},
    )
    write_adapter(base, root / "code", target_modules="all-linear", r=2, rank_pattern={"down_proj": 5})
    return open_family(str(base), {name: str(root / name) for name in ("math", "code")})


def scales_of(family: Family, name: str, mixture: Mixture) -> list[float]:
    return [family.low_rank_scale(owner, delta.scale, mixture) for owner, delta in family.deltas(name)]


VIEWS: list[View] = [
    lambda w: w,
    lambda w: w.narrow(0, w.shape[0] // 2, w.shape[0] // 2),
    lambda w: w.narrow(1, w.shape[1] // 2, w.shape[1] // 2).unsqueeze(0),
    lambda w: w.t(),
    lambda w: w.view(2, 2, -1, w.shape[1]).transpose(0, 1),
    lambda w: w.view(2, -1, w.shape[1]).unbind(0)[1].t().narrow(0, 1, 3),
]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("of", VIEWS)
def test_the_destination_of_any_view_is_that_view_of_the_merge_on_disk(
    arch: str, of: View, family: Family, llama: Family, tmp_path: Path
) -> None:
    family = family if arch == "gpt2" else llama
    assert family.base is not None
    changed = [name for name in family.base.tensors if family.deltas(name)]
    assert len(changed) >= 7
    packed, groups = [], []
    for name in changed:
        whole = stored(family.base.tensors[name])
        found = cut(of(whole), 0, whole.shape)
        assert found is not None
        packed.append(pack(family.deltas(name), found))
        destination = torch.full_like(of(whole).contiguous(), float("nan"))
        parts = packed[-1]
        groups.append(
            LowRankGroup([found.arranged(of(whole))], parts.left, parts.right, found.arranged(destination))
        )
    sums = GroupedLowRankSum(groups)
    count = len(family.names)
    mixtures = [(0.6, 0.3, 0.1)[:count], (1.0, 0.0, 0.0)[:count], (0.0, -0.4, 1.7)[:count], (0.0,) * count]
    for number, weights in enumerate(mixtures):
        mixture = Mixture(family.names, weights)
        merge_to_directory(family, mixture, tmp_path / str(number))
        merged = load_file(tmp_path / str(number) / "model.safetensors")
        terms = [family.terms(name, mixture) for name in changed]
        assert all([coefficient for _, _, coefficient in each.dense] == [1.0] for each in terms)
        sums(
            [1.0],
            [
                parts.scales(scales_of(family, name, mixture))
                for parts, name in zip(packed, changed, strict=True)
            ],
        )
        for name, group in zip(changed, groups, strict=True):
            found = cut(of(merged[name]), 0, merged[name].shape)
            assert found is not None
            assert torch.equal(group.out, found.arranged(of(merged[name]))), name


def test_scales_stand_where_their_owner_has_its_ranks(family: Family) -> None:
    name = (
        "h.0.attn.c_attn.weight"
        if "h.0.attn.c_attn.weight" in family.template.tensors
        else "transformer.h.0.attn.c_attn.weight"
    )
    whole = stored(family.template.tensors[name])
    found = cut(whole, 0, whole.shape)
    assert found is not None
    packed = pack(family.deltas(name), found)
    assert packed.owners == ((1, 4), (2, 3))
    scales = packed.scales(scales_of(family, name, Mixture(family.names, (0.0, 0.5, 0.5))))
    assert scales.dtype == torch.float32
    assert scales.tolist() == [0.0] * 4 + [pytest.approx(0.5 * 8 / 3**0.5)] * 3


def test_factors_that_are_not_finite(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    module = "model.layers.0.self_attn.q_proj"
    parts = factors(module, (16, 16))
    write_adapter_files(tmp_path / "math", parts)
    parts[f"{module}.lora_B.weight"][3, 1] = float("inf")
    change_tensors(tmp_path / "math", parts)
    family = open_family(str(base), {"math": str(tmp_path / "math")})
    found = cut(torch.empty(16, 16), 0, (16, 16))
    assert found is not None
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_B\.weight.*NaN or Inf"):
        pack(family.deltas(f"{module}.weight"), found)
