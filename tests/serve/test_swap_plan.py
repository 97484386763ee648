"""Lazy merged tensors and the swap plan, with loaders that do what vLLM's do, and no vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve.coefficients import coefficients, operands
from mergemix.serve.lazy import LazyMerge, Origin
from mergemix.serve.operands import equality_classes, lazy_weights
from mergemix.serve.swap_plan import SwapPlan, same_bits
from mergemix_kernels.dispatch import pieces

NAMES = ("math", "code", "web")
MIXTURES = [
    (1.0, 0.0, 0.0),
    (0.2, 0.5, 0.3),
    (0.0, 0.0, 1.0),
    (0.0, 0.5, 0.5),
    (0.5, 0.1, 0.1),
    (0.0, 0.0, 0.0),
]


def checkpoint(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "embed": noise(11, 8),
        "q": noise(8, 8),
        "k": noise(4, 8),
        "experts": noise(3, 5, 8),
        "bias": noise(7),
        "same": torch.linspace(-1, 1, 13).to(dtype),  # in all members
        "pair": torch.linspace(0, 3, 6).to(dtype) if seed in (2, 3) else noise(6),  # in code and web
        "scale": noise(),
        "steps": torch.tensor([seed, 7]),
        "empty": noise(0, 4),
    }


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", *NAMES)):
        (root / name).mkdir()
        save_file(checkpoint(seed, request.param), root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"architectures": ["Toy"]}')
    return open_family(str(root / "base"), {name: str(root / name) for name in NAMES})


class Parameters:
    """Parameters filled the way vLLM's loaders fill theirs; poisoned with NaN before."""

    def __init__(self, dtype: torch.dtype) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> torch.nn.Parameter:
            value = (
                torch.full(shape, 7, dtype=of)
                if not of.is_floating_point
                else torch.full(shape, torch.nan, dtype=of)
            )
            return torch.nn.Parameter(value, requires_grad=False)

        self.embed = empty(16, 8)  # vocabulary padded
        self.qk = empty(12, 8)
        self.experts = empty(3, 8, 5)  # transposed, expert by expert
        self.rows = empty(4)  # one rank's part of the bias, backwards in two steps
        self.same = empty(13)
        self.pair = empty(2, 6)  # copied into two places, one by broadcasting
        self.scale = empty()
        self.steps = empty(2, of=torch.int64)
        self.half = empty(3, 8, of=torch.bfloat16)  # another dtype than a fp32 checkpoint's
        self.interleaved = empty(4, 2, 8)
        self.empty = empty(0, 4)

    def load(self, name: str, weight: torch.Tensor) -> None:
        copies: dict[str, Callable[[], object]] = {
            "embed": lambda: self.embed.data[: weight.shape[0]].copy_(weight),
            "q": lambda: (
                self.qk.data.narrow(0, 0, 8).copy_(weight),
                self.interleaved.data[:, 0].copy_(weight.view(4, 2, 8)[:, 1]),
                self.interleaved.data[:, 1].copy_(weight.view(4, 2, 8)[:, 0]),
                self.half.data.copy_(weight[2:5]),
            ),
            "k": lambda: self.qk.data.narrow(0, 8, 4).copy_(weight),
            "experts": lambda: [
                self.experts.data[i].copy_(part.t()) for i, part in enumerate(weight.unbind(0))
            ],
            "bias": lambda: self.rows.data.copy_(weight.chunk(2)[0].unsqueeze(0).squeeze(0)),
            "same": lambda: self.same.data.copy_(weight),
            "pair": lambda: self.pair.data.copy_(weight),
            "scale": lambda: self.scale.data.copy_(weight.reshape(())),
            "steps": lambda: self.steps.data.copy_(weight),
            "empty": lambda: self.empty.data.copy_(weight),
        }
        copies[name]()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: parameter.data for name, parameter in vars(self).items()}


def loaded(family: Family, weights: tuple[float, ...]) -> tuple[SwapPlan, Parameters]:
    mixture = Mixture(NAMES, weights)
    plan = SwapPlan([operand.name for operand in operands(family)], coefficients(family, mixture))
    parameters = Parameters(dtype_of(family))
    for name, weight in lazy_weights(family, plan):
        parameters.load(name, weight)
    plan.seal(parameters.tensors().values())
    return plan, parameters


def dtype_of(family: Family) -> torch.dtype:
    return load_file(family.experts[0].root / "model.safetensors")["q"].dtype


@pytest.fixture(scope="module")
def from_disk(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[float, ...]], Parameters]:
    """Parameters loaded from the merge on disk, plainly."""

    def load(weights: tuple[float, ...]) -> Parameters:
        out = tmp_path_factory.mktemp("merge") / "out"
        merge_to_directory(family, Mixture(NAMES, weights), out)
        parameters = Parameters(dtype_of(family))
        for name, tensor in load_file(out / "model.safetensors").items():
            parameters.load(name, tensor)
        return parameters

    return load


def assert_same(live: Parameters, expected: Parameters) -> None:
    for name, tensor in expected.tensors().items():
        assert same_bits(live.tensors()[name], tensor), name


@pytest.mark.parametrize("weights", MIXTURES)
def test_the_first_load_equals_a_plain_load_of_the_disk_merge_bit_for_bit(
    family: Family, from_disk: Callable[[tuple[float, ...]], Parameters], weights: tuple[float, ...]
) -> None:
    plan, parameters = loaded(family, weights)
    assert plan.unreplayable == []
    assert_same(parameters, from_disk(weights))


def test_every_swap_equals_a_plain_load_of_the_disk_merge_bit_for_bit(
    family: Family, from_disk: Callable[[tuple[float, ...]], Parameters]
) -> None:
    plan, parameters = loaded(family, (1 / 3, 1 / 3, 1 / 3))
    for weights in [*MIXTURES, *MIXTURES[::-1]]:
        given = coefficients(family, Mixture(NAMES, weights))
        plan.write(given)
        assert_same(parameters, from_disk(weights))
        assert plan.mismatches(given, sample=False) == []
        assert plan.mismatches(given, sample=True) == []


def test_a_destination_that_is_off_by_one_bit_is_found(family: Family) -> None:
    plan, parameters = loaded(family, (0.2, 0.5, 0.3))
    last_row = parameters.qk.data[-1].view(torch.int16)
    last_row[-1] ^= 1
    assert plan.mismatches(plan.coefficients, sample=False) == ["k"]


def test_tensors_equal_in_all_operands_are_written_once(family: Family) -> None:
    plan, parameters = loaded(family, (0.2, 0.5, 0.3))
    parameters.same.data.fill_(5)
    plan.write(coefficients(family, Mixture(NAMES, (1.0, 0.0, 0.0))))
    assert torch.equal(parameters.same.data, torch.full_like(parameters.same.data, 5))
    assert plan.nbytes == sum(copy.nbytes for copy in plan.copies) - 13 * parameters.same.element_size()


def test_a_load_that_reads_values_works_but_is_not_replayable(family: Family) -> None:
    plan = SwapPlan(["base", *NAMES], coefficients(family, Mixture(NAMES, (0.0, 1.0, 0.0))))
    weights = dict(lazy_weights(family, plan))
    scale = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    scale.data.fill_(weights["scale"].item())
    expected = load_file(family.experts[1].root / "model.safetensors")["scale"]
    assert scale.item() == expected.item()
    assert "scale" in plan.unreplayable[0]


def test_a_copy_into_a_temporary_and_overlapping_copies_are_not_replayable(family: Family) -> None:
    plan = SwapPlan(["base", *NAMES], coefficients(family, Mixture(NAMES, (0.0, 1.0, 0.0))))
    weights = dict(lazy_weights(family, plan))
    parameter, temporary = torch.empty(12, 8), torch.empty(4, 8)
    temporary.copy_(weights["k"])
    parameter[:8].copy_(weights["q"])
    parameter[6:10].copy_(weights["k"])
    plan.seal([parameter])
    assert len(plan.unreplayable) == 2
    assert any("temporary" in reason for reason in plan.unreplayable)
    assert any("overlaps" in reason for reason in plan.unreplayable)


def test_of_two_copies_into_one_place_the_later_one_counts(family: Family) -> None:
    plan = SwapPlan(["base", *NAMES], coefficients(family, Mixture(NAMES, (0.0, 1.0, 0.0))))
    weights = dict(lazy_weights(family, plan))
    parameter = torch.empty(3, 8, dtype=weights["q"].dtype)
    parameter.copy_(weights["q"][:3])
    parameter.copy_(weights["k"][:3])
    plan.seal([parameter])
    plan.write(coefficients(family, Mixture(NAMES, (1.0, 0.0, 0.0))))
    assert torch.equal(parameter, load_file(family.experts[0].root / "model.safetensors")["k"][:3])


def test_writing_into_a_checkpoint_tensor_while_loading_is_an_error(family: Family) -> None:
    plan = SwapPlan(["base", *NAMES], coefficients(family, Mixture(NAMES, (0.0, 1.0, 0.0))))
    weights = dict(lazy_weights(family, plan))
    with pytest.raises(TypeError, match="writes into a checkpoint tensor"):
        weights["q"].add_(1)


def test_bits_read_as_another_type_are_materialised(family: Family) -> None:
    plan = SwapPlan(["base", *NAMES], coefficients(family, Mixture(NAMES, (0.0, 1.0, 0.0))))
    bits = dict(lazy_weights(family, plan))["q"].view(torch.uint8)
    assert not isinstance(bits, LazyMerge)
    assert plan.unreplayable


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.0, 0.0, 0.0)])
def test_nan_or_inf_in_any_expert_is_found_at_the_first_load(
    tmp_path: Path, bad: float, weights: tuple[float, ...]
) -> None:
    for seed, name in enumerate(NAMES):
        tensors = checkpoint(seed, torch.bfloat16)
        if name == "code":
            tensors["k"][3, 7] = bad
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    family = open_family(None, {name: str(tmp_path / name) for name in NAMES})
    with pytest.raises(NonFiniteError, match=r"'k'.*code"):
        loaded(family, weights)


def test_a_base_that_is_needed_but_absent_is_refused(family: Family) -> None:
    without = Family(None, family.experts)
    assert coefficients(without, Mixture(NAMES, (0.5, 0.25, 0.25))) == [0.5, 0.25, 0.25]
    with pytest.raises(ConfigError, match="base"):
        coefficients(without, Mixture(NAMES, (0.5, 0.25, 0.0)))
    with pytest.raises(ConfigError, match="experts are"):
        coefficients(family, Mixture(("math", "code"), (0.5, 0.5)))


def test_equality_is_of_bits() -> None:
    zero, minus = torch.zeros(5), -torch.zeros(5)
    assert equality_classes([zero, minus, zero.clone(), torch.ones(5), minus.clone()]) == (0, 1, 0, 3, 1)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    limit=st.integers(1, 40),
    transposed=st.booleans(),
)
def test_pieces_cover_every_element_once(shape: list[int], limit: int, transposed: bool) -> None:
    whole = torch.zeros(shape)
    if transposed and len(shape) > 1:
        whole = whole.transpose(0, -1)
    for part, twin in pieces([whole, whole], limit):
        assert part.numel() <= max(limit, 1)
        assert part.data_ptr() == twin.data_ptr()
        part += 1
    assert torch.equal(whole, torch.ones_like(whole))


def test_views_of_lazy_tensors_are_lazy() -> None:
    class Nobody:
        def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
            raise AssertionError

        def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
            raise AssertionError(operation)

    sources = [torch.randn(6, 4) for _ in range(3)]
    lazy = LazyMerge(Origin("x", (0, 1, 2)), sources, Nobody())
    view = lazy.t()[1:3].unsqueeze(0).transpose(1, 2).expand(2, 6, 2).select(0, 1).detach()
    assert isinstance(view, LazyMerge)
    for part, source in zip(view.views, sources, strict=True):
        assert torch.equal(part, source.t()[1:3].t())
    assert [part.shape for part in lazy.split(4)] == [(4, 4), (2, 4)]
    assert "3 operands" in repr(lazy)
