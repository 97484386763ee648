"""Swaps in any order, with any cache: the parameters, and the counters, which are counted here once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.merge import delta_cache, merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve.copies import Copy
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan
from tests.serve.test_swap_plan import NAMES, Parameters, assert_same, checkpoint

DTYPES = [torch.bfloat16, torch.float32]
ONE_HOT = [tuple(float(i == k) for i in range(3)) for k in range(3)]
WEIGHTS = st.one_of(
    st.sampled_from([*ONE_HOT, (0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (-0.0, 1.0, 0.0)]),
    st.tuples(*[st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 1.0, -0.75, 1.5])] * 3),
)
GROUPS = st.lists(
    st.builds(
        LayerGroup,
        st.lists(
            st.sampled_from(["q", "k", "e*s", "pair", "*", "b*", "s*", "?", "steps", "empty"]),
            min_size=1,
            max_size=2,
            unique=True,
        ).map(tuple),
        WEIGHTS,
    ),
    max_size=3,
).map(tuple)
MIXTURE = st.builds(Mixture, st.just(NAMES), WEIGHTS, GROUPS)
BUDGET = st.sampled_from([0, 1, 300, 700, 1500, 3000, 1 << 20])


def written(root: Path, members: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in members.items():
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"architectures": ["Toy"]}')


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Family]:
    found = {}
    for dtype in DTYPES:
        root = tmp_path_factory.mktemp("family")
        written(root, {name: checkpoint(seed, dtype) for seed, name in enumerate(("base", *NAMES))})
        found[dtype] = open_family(str(root / "base"), {name: str(root / name) for name in NAMES})
    return found


@pytest.fixture(scope="module", autouse=True)
def segments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("shm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_cache, "shared_memory", lambda: place)
        yield place
    assert list(place.iterdir()) == []


def loaded(
    family: Family, mixture: Mixture, dtype: torch.dtype, sizes: CacheSizes
) -> tuple[SwapPlan, Parameters]:
    recording, parameters = Recording(family, mixture), Parameters(dtype)
    for name, weight in recording.lazy_weights():
        parameters.load(name, weight)
    return recording.finish(parameters.tensors().values(), sizes), parameters


def from_disk(family: Family, mixture: Mixture, dtype: torch.dtype, out: Path) -> Parameters:
    """What a plain load of the merge on disk gives."""
    merge_to_directory(family, mixture, out)
    parameters = Parameters(dtype)
    for name, tensor in load_file(out / "model.safetensors").items():
        parameters.load(name, tensor)
    return parameters


class Book:
    """What every destination holds and which slots are filled, told from the mixtures alone."""

    def __init__(self, family: Family, plan: SwapPlan, mixture: Mixture) -> None:
        self._family, self._plan = family, plan
        self._filled: set[tuple[int, int]] = set()
        self._live = [self._wanted(copy, mixture) for copy in plan.moving]

    def _wanted(self, copy: Copy, mixture: Mixture) -> dict[int, float]:
        """Coefficients by operand; a copy of one operand where that is what the sum comes to."""
        found = self._family.coefficients(mixture.at(copy.origin.name))
        used = {k: c for k, c in enumerate(found) if c}
        kinds = [copy.origin.classes[k] for k in used]
        if not copy.is_floating or len(set(kinds)) == 1:
            return {kinds[0]: 1.0}
        return used

    def change_to(self, mixture: Mixture) -> tuple[set[int], dict[str, int]]:
        """Which destinations must be written, and the bytes that are read for it, by tier."""
        changed, read = set(), {"device": 0, "host": 0, "disk": 0}
        for i, copy in enumerate(self._plan.moving):
            wanted = self._wanted(copy, mixture)
            if wanted == self._live[i]:
                continue
            changed.add(i)
            self._live[i] = wanted
            tier = self._plan.cache.tiers[i]
            for kind in {copy.origin.classes[k] for k in wanted}:
                read[tier if (i, kind) in self._filled else "disk"] += copy.view.numel() * copy.view.itemsize
                if tier != "disk":
                    self._filled.add((i, kind))
        return changed, read


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), device=BUDGET, host=BUDGET)
def test_any_swaps_with_any_cache(
    families: dict[torch.dtype, Family],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    dtype: torch.dtype,
    device: int,
    host: int,
) -> None:
    family = families[dtype]
    mixtures = data.draw(st.lists(MIXTURE, min_size=2, max_size=3))
    order = data.draw(st.lists(st.sampled_from(mixtures), min_size=2, max_size=6))
    root = tmp_path_factory.mktemp("merges")
    expected = {m: from_disk(family, m, dtype, root / str(i)) for i, m in enumerate(dict.fromkeys(mixtures))}
    plan, parameters = loaded(family, mixtures[0], dtype, CacheSizes(device, host))
    try:
        assert plan.unreplayable == []
        assert_same(parameters, expected[mixtures[0]])
        assert plan.cache.assigned["device"] <= device
        assert plan.cache.assigned["host"] <= host
        book = Book(family, plan, mixtures[0])
        for mixture in order:
            check_swap(plan, book, mixture)
            assert_same(parameters, expected[mixture])
            assert plan.mismatches(sample=False) == []
            check_swap(plan, book, mixture)  # nothing moves
    finally:
        plan.close()


def check_swap(plan: SwapPlan, book: Book, mixture: Mixture) -> None:
    """What is to be written is spoiled; what is not is, for the swap, something else, that must stay."""
    moved, bytes_read = book.change_to(mixture)
    kept = []
    for i, copy in enumerate(plan.moving):
        if i not in moved:
            kept.append((copy.destination, copy.destination.clone()))
        copy.destination.fill_(3)
    change = plan.change_to(mixture)
    assert {int(i) for write in change.writes for i in write.copies} == moved
    assert change.skipped == len(plan.moving) - len(moved)
    assert plan.bytes_written(change) == sum(
        plan.moving[i].destination.numel() * plan.moving[i].destination.itemsize for i in moved
    )
    assert plan.write(change) == bytes_read
    for destination, contents in kept:
        assert (destination == 3).all()
        destination.copy_(contents)


@pytest.mark.parametrize("sizes", [CacheSizes(), CacheSizes(1 << 20, 1 << 20)], ids=["disk", "cached"])
@pytest.mark.parametrize("experts", [("math",), NAMES], ids=["one", "equal"])
def test_a_family_in_which_nothing_moves(tmp_path: Path, experts: tuple[str, ...], sizes: CacheSizes) -> None:
    tensors = checkpoint(1, torch.bfloat16)
    written(tmp_path, dict.fromkeys(experts, tensors))
    family = open_family(None, {name: str(tmp_path / name) for name in experts})
    weights = (1.0, *[0.0] * (len(experts) - 1))
    plan, parameters = loaded(family, Mixture(experts, weights), torch.bfloat16, sizes)
    assert plan.moving == []
    assert plan.nbytes == 0
    assert plan.copies
    plain = Parameters(torch.bfloat16)
    for name, tensor in tensors.items():
        plain.load(name, tensor)
    for mixture in (Mixture(experts, weights), Mixture(experts, weights, (LayerGroup(("q",), weights),))):
        change = plan.change_to(mixture)
        assert change.writes == ()
        assert change.skipped == 0
        assert plan.bytes_written(change) == 0
        assert plan.storages(change) == set()
        assert set(plan.write(change).values()) == {0}
        assert_same(parameters, plain)
        assert plan.mismatches(sample=True) == plan.mismatches(sample=False) == []
    plan.close()
