"""The sample of what a swap wrote, with plans of tensors that are larger than a sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve.recording import Recording
from mergemix.serve.sample_check import PART_ELEMENTS, Sampler, box, cut, part_count
from mergemix.serve.swap_plan import SAMPLED_REST, SAMPLED_WRITTEN, SwapPlan

NAMES = ("math", "code")
FIRST, SECOND = Mixture(NAMES, (0.25, 0.75)), Mixture(NAMES, (0.5, 0.5))
SHAPES = {
    "large": (1024, 1024),  # 256 parts
    "wide": (3, 300_000),  # rows are cut
    **{f"layer-{n}": (128, 128) for n in range(60)},  # 4 parts each
    **{f"norm-{n}": (64,) for n in range(60)},
    "static": (64, 64),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several take longer for tensors of this size, by far where others want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in SHAPES.items()}
        tensors["static"] = torch.ones(64, 64, dtype=torch.bfloat16)
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"architectures": ["Toy"]}')
    return open_family(None, {name: str(root / name) for name in NAMES})


Loaded = tuple[SwapPlan, dict[str, torch.Tensor]]


@pytest.fixture
def loaded(family: Family) -> Loaded:
    recording = Recording(family, FIRST)
    live = {}
    for name, weight in recording.lazy_weights():
        live[name] = torch.empty(SHAPES[name][::-1], dtype=torch.bfloat16)  # transposed: strides differ
        live[name].copy_(weight.permute(*reversed(range(weight.dim()))))
    return recording.finish(live.values()), live


def swap(plan: SwapPlan, mixture: Mixture) -> None:
    plan.write(plan.change_to(mixture))


def sampled(plan: SwapPlan) -> list[str]:
    return plan.mismatches(sample=True)


def test_right_swaps_pass(loaded: Loaded) -> None:
    plan, _ = loaded
    assert sampled(plan) == []
    for mixture in (SECOND, FIRST, Mixture(NAMES, (1.0, 0.0)), SECOND):
        swap(plan, mixture)
        for _ in range(3):
            assert sampled(plan) == []


@pytest.mark.parametrize("turn", range(0, 12, 3))
def test_a_swap_that_is_lost_as_a_whole_or_in_a_large_part_is_noticed_at_once(
    loaded: Loaded, turn: int
) -> None:
    plan, live = loaded
    for _ in range(turn):
        assert sampled(plan) == []
    swap(plan, SECOND)
    right = {name: tensor.clone() for name, tensor in live.items()}
    swap(plan, FIRST)
    for name, tensor in right.items():
        live[name].copy_(tensor)
    assert len(sampled(plan)) > 10
    plan.forget()
    swap(plan, FIRST)
    live["large"].copy_(right["large"])
    assert sampled(plan) == ["large"]


@pytest.mark.parametrize("name", ["norm-17", "layer-40", "wide"])
def test_a_write_that_is_lost_in_every_swap_is_noticed_in_a_few(loaded: Loaded, name: str) -> None:
    plan, live = loaded
    small = SAMPLED_WRITTEN // 2  # views that are looked at in turn, by each swap
    for number in range(2 * len(SHAPES) // small + 1):
        before = live[name].clone()
        swap(plan, (SECOND, FIRST)[number % 2])
        live[name].copy_(before)
        if found := sampled(plan):
            assert found == [name]
            return
    pytest.fail("never noticed")


@pytest.mark.parametrize("name", ["norm-3", "static", "large"])
def test_what_was_not_written_is_looked_at_too(loaded: Loaded, name: str) -> None:
    plan, live = loaded
    rest = Mixture(NAMES, FIRST.weights, (LayerGroup(("layer-0",), (0.5, 0.5)),))
    swap(plan, rest)
    assert sampled(plan) == []
    live[name].zero_()
    for _ in range(4 * len(SHAPES) // SAMPLED_REST):
        if found := sampled(plan):
            assert found == [name]
            return
    pytest.fail("never noticed")


def test_in_the_end_every_element_is_looked_at(loaded: Loaded) -> None:
    plan, live = loaded
    swap(plan, SECOND)
    total = sum(part_count(copy.view) for copy in plan.moving)
    generator = np.random.default_rng(0)
    for _ in range(2):
        row, column = generator.integers(1024), generator.integers(1024)
        live["large"].view(torch.int16)[row, column] ^= 1
        assert any(sampled(plan) == ["large"] for _ in range(6 * total // SAMPLED_WRITTEN))
        live["large"].view(torch.int16)[row, column] ^= 1
    assert plan.mismatches(sample=False) == []


def test_a_sample_is_bounded_whatever_the_model(loaded: Loaded) -> None:
    plan, _ = loaded
    swap(plan, SECOND)
    read: list[int] = []
    real = plan._sums.reader.read_bytes
    plan._sums.reader.read_bytes = lambda tensor, begin, into: (  # type: ignore[method-assign]
        read.append(into.size),
        real(tensor, begin, into),
    )[1]
    assert sampled(plan) == []
    assert 0 < len(read) <= (SAMPLED_WRITTEN + SAMPLED_REST) * len(NAMES)
    assert max(read) <= 2 * PART_ELEMENTS


@settings(deadline=None, max_examples=50)
@given(
    shape=st.lists(st.integers(1, 9), max_size=3),
    order=st.randoms(use_true_random=False),
    long=st.booleans(),
)
def test_parts_cover_every_element_once(shape: list[int], order: object, long: bool) -> None:
    shape = [*shape, PART_ELEMENTS + 100] if long else shape
    dimensions = list(range(len(shape)))
    order.shuffle(dimensions)  # type: ignore[attr-defined]
    whole = torch.zeros(shape, dtype=torch.uint8).permute(dimensions)
    for position in range(part_count(whole)):
        part = cut(whole, box(whole, position))
        assert 0 < part.numel() <= PART_ELEMENTS
        part += 1
    assert bool((whole == 1).all())


def test_a_view_without_elements_has_no_parts() -> None:
    assert part_count(torch.empty(0, 4)) == 0
    assert Sampler([0, 0]).choose(np.array([0, 1]), 8) == []


@settings(deadline=None, max_examples=50)
@given(parts=st.lists(st.integers(0, 90), min_size=1, max_size=40), number=st.integers(2, 64))
def test_a_sampler_stays_within_its_number_and_meets_every_part_in_the_end(
    parts: list[int], number: int
) -> None:
    sampler, total = Sampler(parts), sum(parts)
    members = np.arange(len(parts))
    met: set[tuple[int, int]] = set()
    for _ in range(6 * total // number + 1):
        chosen = sampler.choose(members, number)
        assert len(chosen) == len(set(chosen)) <= max(number, 1)
        assert all(0 <= part < parts[i] for i, part in chosen)
        large = [i for i in members if total and parts[i] >= 4 * total / number]
        assert set(large) <= {i for i, _ in chosen}
        met |= set(chosen)
    assert len(met) == total
