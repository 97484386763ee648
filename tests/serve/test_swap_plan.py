"""Lazy merged tensors and the swap plan, with loaders that do what vLLM's do, and no vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.merge import delta_cache, merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve.coefficients import check_mixture
from mergemix.serve.copies import same_bits, used_operands
from mergemix.serve.lazy import LazyMerge, Origin
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan
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


def loaded(
    family: Family, mixture: Mixture | tuple[float, ...], sizes: CacheSizes | None = None
) -> tuple[SwapPlan, Parameters]:
    recording = Recording(family, as_mixture(mixture))
    parameters = Parameters(dtype_of(family))
    for name, weight in recording.lazy_weights():
        parameters.load(name, weight)
    return recording.finish(parameters.tensors().values(), sizes), parameters


def recording_of(family: Family) -> tuple[Recording, dict[str, LazyMerge]]:
    """A load of the first expert alone, and what it would load."""
    recording = Recording(family, Mixture(NAMES, (0.0, 1.0, 0.0)))
    return recording, dict(recording.lazy_weights())


def as_mixture(mixture: Mixture | tuple[float, ...]) -> Mixture:
    return mixture if isinstance(mixture, Mixture) else Mixture(NAMES, mixture)


def swap(plan: SwapPlan, mixture: Mixture | tuple[float, ...]) -> dict[str, int]:
    return plan.write(plan.change_to(as_mixture(mixture)))


def dtype_of(family: Family) -> torch.dtype:
    return load_file(family.experts[0].root / "model.safetensors")["q"].dtype


FromDisk = Callable[[Mixture | tuple[float, ...]], Parameters]


@pytest.fixture(scope="module")
def from_disk(family: Family, tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """Parameters loaded from the merge on disk, plainly."""
    known: dict[Mixture, Parameters] = {}

    def load(mixture: Mixture | tuple[float, ...]) -> Parameters:
        mixture = as_mixture(mixture)
        if mixture not in known:
            out = tmp_path_factory.mktemp("merge") / "out"
            merge_to_directory(family, mixture, out)
            known[mixture] = Parameters(dtype_of(family))
            for name, tensor in load_file(out / "model.safetensors").items():
                known[mixture].load(name, tensor)
        return known[mixture]

    return load


def assert_same(live: Parameters, expected: Parameters) -> None:
    for name, tensor in expected.tensors().items():
        assert same_bits(live.tensors()[name], tensor), name


@pytest.mark.parametrize("weights", MIXTURES)
def test_the_first_load_equals_a_plain_load_of_the_disk_merge_bit_for_bit(
    family: Family, from_disk: FromDisk, weights: tuple[float, ...]
) -> None:
    plan, parameters = loaded(family, weights)
    assert plan.unreplayable == []
    assert_same(parameters, from_disk(weights))


def test_every_swap_equals_a_plain_load_of_the_disk_merge_bit_for_bit(
    family: Family, from_disk: FromDisk
) -> None:
    plan, parameters = loaded(family, (1 / 3, 1 / 3, 1 / 3))
    for weights in [*MIXTURES, *MIXTURES[::-1]]:
        swap(plan, weights)
        assert_same(parameters, from_disk(weights))
        assert plan.mismatches(sample=True) == []
        assert plan.mismatches(sample=False) == []


def test_a_destination_that_is_off_by_one_bit_is_found(family: Family) -> None:
    plan, parameters = loaded(family, (0.2, 0.5, 0.3))
    last_row = parameters.qk.data[-1].view(torch.int16)
    last_row[-1] ^= 1
    assert plan.mismatches(sample=False) == ["k"]


def test_tensors_equal_in_all_operands_are_written_once(family: Family) -> None:
    plan, parameters = loaded(family, (0.2, 0.5, 0.3))
    parameters.same.data.fill_(5)
    swap(plan, (1.0, 0.0, 0.0))
    assert torch.equal(parameters.same.data, torch.full_like(parameters.same.data, 5))
    assert plan.nbytes == sum(copy.nbytes for copy in plan.copies) - 13 * parameters.same.element_size()


def test_a_load_that_reads_values_works_but_is_not_replayable(family: Family) -> None:
    recording, weights = recording_of(family)
    scale = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
    scale.data.fill_(weights["scale"].item())
    expected = load_file(family.experts[1].root / "model.safetensors")["scale"]
    assert scale.item() == expected.item()
    assert "scale" in recording.unreplayable[0]


def test_a_copy_into_a_temporary_and_overlapping_copies_are_not_replayable(family: Family) -> None:
    recording, weights = recording_of(family)
    parameter, temporary = torch.empty(12, 8), torch.empty(4, 8)
    temporary.copy_(weights["k"])
    parameter[:8].copy_(weights["q"])
    parameter[6:10].copy_(weights["k"])
    plan = recording.finish([parameter])
    assert len(plan.unreplayable) == 2
    assert any("temporary" in reason for reason in plan.unreplayable)
    assert any("overlaps" in reason for reason in plan.unreplayable)


def test_of_two_copies_into_one_place_the_later_one_counts(family: Family) -> None:
    recording, weights = recording_of(family)
    parameter = torch.empty(3, 8, dtype=weights["q"].dtype)
    parameter.copy_(weights["q"][:3])
    parameter.copy_(weights["k"][:3])
    swap(recording.finish([parameter]), (1.0, 0.0, 0.0))
    assert torch.equal(parameter, load_file(family.experts[0].root / "model.safetensors")["k"][:3])


def test_writing_into_a_checkpoint_tensor_while_loading_is_an_error(family: Family) -> None:
    _, weights = recording_of(family)
    with pytest.raises(TypeError, match="writes into a checkpoint tensor"):
        weights["q"].add_(1)


def test_bits_read_as_another_type_are_materialised(family: Family) -> None:
    recording, weights = recording_of(family)
    bits = weights["q"].view(torch.uint8)
    assert not isinstance(bits, LazyMerge)
    assert torch.equal(
        bits.view(weights["q"].dtype), load_file(family.experts[1].root / "model.safetensors")["q"]
    )
    assert recording.unreplayable


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
    check_mixture(without, Mixture(NAMES, (0.5, 0.25, 0.25)))
    with pytest.raises(ConfigError, match="base"):
        check_mixture(without, Mixture(NAMES, (0.5, 0.25, 0.0)))
    with pytest.raises(ConfigError, match="experts are"):
        check_mixture(family, Mixture(("math", "code"), (0.5, 0.5)))


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

    elements = torch.empty(6, 4, device="meta")
    lazy = LazyMerge(Origin("x", (), (0, 1, 2)), elements, Nobody())
    view = lazy.t()[1:3].unsqueeze(0).transpose(1, 2).expand(2, 6, 2).select(0, 1).detach()
    assert isinstance(view, LazyMerge)
    source = torch.randn(6, 4)
    shown = view.elements
    assert torch.equal(
        source.as_strided(shown.shape, shown.stride(), shown.storage_offset()), source.t()[1:3].t()
    )
    assert (view.shape, view.stride(), view.device.type) == (shown.shape, shown.stride(), "cpu")
    assert [part.shape for part in lazy.split(4)] == [(4, 4), (2, 4)]
    assert "3 operands" in repr(lazy)


GROUPED = (
    LayerGroup(("q", "k"), (0.0, 1.0, 0.0)),
    LayerGroup(("e*s",), (0.3, 0.3, 0.4)),
    LayerGroup(("pair", "q"), (0.0, 0.4, 0.6)),
)
GROUPED_MIXTURES = [
    *(Mixture(NAMES, weights) for weights in MIXTURES),
    Mixture(NAMES, (0.2, 0.5, 0.3), GROUPED),
    Mixture(NAMES, (0.5, 0.1, 0.1), GROUPED[1:]),
    Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("*",), (0.25, 0.25, 0.5)),)),
]


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shared memory is, for a test alone."""
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(delta_cache, "shared_memory", lambda: place)
    return place


@pytest.mark.parametrize("device", [0, 300, 1500, 1 << 20])
@pytest.mark.parametrize("host", [0, 300, 1500, 1 << 20])
def test_swaps_in_random_order_equal_the_disk_merge_whatever_is_cached(
    family: Family, from_disk: FromDisk, segments: Path, device: int, host: int
) -> None:
    plan, parameters = loaded(family, GROUPED_MIXTURES[0], CacheSizes(device, host))
    chance = random.Random(device + host)
    assigned = plan.cache.assigned
    assert assigned["device"] <= device
    assert assigned["host"] <= host
    for mixture in chance.choices(GROUPED_MIXTURES, k=14):
        change = plan.change_to(mixture)
        read = plan.write(change)
        assert_same(parameters, from_disk(mixture))
        assert plan.mismatches(sample=False) == []
        used = sum(
            plan.moving[i].operand_bytes
            * len({plan.moving[i].origin.classes[k] for k in used_operands(w.weights)})
            for w in change.writes
            for i in w.copies
        )
        assert sum(read.values()) == used
        assert plan.bytes_written(change) == sum(
            plan.moving[i].nbytes for w in change.writes for i in w.copies
        )
        assert change.skipped == len(plan.moving) - sum(len(w.copies) for w in change.writes)
        assert sum(plan.write(plan.change_to(mixture)).values()) == 0
    if device == 1 << 20:
        for mixture in GROUPED_MIXTURES:
            swap(plan, mixture)
        change = plan.change_to(GROUPED_MIXTURES[1])
        written = [plan.moving[i] for write in change.writes for i in write.copies]
        # Numbers that are not averaged are not cached.
        assert plan.write(change)["disk"] == sum(c.operand_bytes for c in written if not c.is_floating)
    plan.close()
    assert list(segments.iterdir()) == []


def test_what_already_holds_its_weights_is_not_written(family: Family) -> None:
    plan, _ = loaded(family, (0.2, 0.5, 0.3))
    assert plan.change_to(Mixture(NAMES, (0.2, 0.5, 0.3))).writes == ()
    # code and web are equal in "pair": shares that move between them change nothing there.
    swap(plan, (0.0, 0.4, 0.6))
    change = plan.change_to(Mixture(NAMES, (0.0, 0.6, 0.4)))
    written = {plan.moving[i].origin.name for write in change.writes for i in write.copies}
    assert "pair" not in written
    assert "q" in written
    only_k = Mixture(NAMES, (0.0, 0.4, 0.6), (LayerGroup(("k",), (1.0, 0.0, 0.0)),))
    change = plan.change_to(only_k)
    assert {plan.moving[i].origin.name for write in change.writes for i in write.copies} == {"k"}
    plan.write(change)
    plan.forget()
    assert plan.change_to(only_k).skipped == 0


def test_a_pattern_without_tensors_is_refused_before_anything_is_written(family: Family) -> None:
    plan, _ = loaded(family, (0.2, 0.5, 0.3))
    with pytest.raises(ConfigError, match=r"'layers\.\*'.*matches none"):
        plan.change_to(Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("q", "layers.*"), (0.0, 1.0, 0.0)),)))
    assert plan.change_to(Mixture(NAMES, (0.2, 0.5, 0.3))).writes == ()


def test_a_write_that_fails_makes_nothing_skipped(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = loaded(family, (0.2, 0.5, 0.3))
    change = plan.change_to(Mixture(NAMES, (1.0, 0.0, 0.0)))

    def fail(*_: object, **__: object) -> bool:
        raise OSError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(plan._sums.cpu, "write", fail)
        with pytest.raises(OSError, match="injected"):
            plan.write(change)
    for weights in ((0.2, 0.5, 0.3), (1.0, 0.0, 0.0)):
        assert plan.change_to(Mixture(NAMES, weights)).skipped == change.skipped


def test_storages_whose_contents_do_not_last_are_written_together(family: Family) -> None:
    plan, parameters = loaded(family, (0.2, 0.5, 0.3))
    qk, embed = (p.data.untyped_storage().data_ptr() for p in (parameters.qk, parameters.embed))
    plan.write_together({qk, embed}, {embed})
    only_k = Mixture(NAMES, (0.2, 0.5, 0.3), (LayerGroup(("k",), (1.0, 0.0, 0.0)),))
    change = plan.change_to(only_k)
    assert {plan.moving[i].origin.name for w in change.writes for i in w.copies} == {"k", "embed"}
    assert plan.storages(change) == {qk, embed}
    plan.write(change)
    assert plan.change_to(only_k).writes == ()


@pytest.mark.parametrize(
    "sizes", [CacheSizes(device=1 << 20), CacheSizes(host=1 << 20)], ids=["device", "host"]
)
def test_a_slot_that_is_corrupted_is_noticed(family: Family, segments: Path, sizes: CacheSizes) -> None:
    plan, _ = loaded(family, (0.2, 0.5, 0.3), sizes)
    swap(plan, (0.3, 0.4, 0.3))
    position = next(i for i, copy in enumerate(plan.moving) if copy.origin.name == "k")
    slot = plan.cache.slot(position, 2)
    assert slot is not None
    slot[1, 2] += 1
    swap(plan, (0.4, 0.3, 0.3))
    assert plan.mismatches(sample=False) == ["k"]
    plan.close()


def test_a_second_engine_reads_nothing_that_the_first_has_filled(
    family: Family, from_disk: FromDisk, segments: Path
) -> None:
    first, _ = loaded(family, (0.2, 0.5, 0.3), CacheSizes(host=1 << 20))
    swap(first, (0.3, 0.4, 0.2))
    second, parameters = loaded(family, (0.2, 0.5, 0.3), CacheSizes(host=1 << 20))
    read = swap(second, (0.3, 0.4, 0.2))
    assert read["disk"] == sum(copy.operand_bytes for copy in second.moving if not copy.is_floating)
    assert read["host"] > 0
    assert_same(parameters, from_disk((0.3, 0.4, 0.2)))
    first.close()
    assert len(list(segments.iterdir())) == 1
    second.close()
    assert list(segments.iterdir()) == []
