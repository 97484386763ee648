"""LoRA adapters folded into live weights: the swap plan against plain loads of merges on disk, with no vLLM."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.adapter import Adapter
from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.merge import delta_cache, merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve import cpu_sums, reference_check
from mergemix.serve.coefficients import check_mixture
from mergemix.serve.copies import Copy, Numbers, numbers_of, same_bits
from mergemix.serve.folded_sums import Placed, folded_sums
from mergemix.serve.lazy import LazyMerge
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan
from tests.checkpoints.adapter_files import change_tensors, factors, write_adapter_files

NAMES = ("math", "full", "code", "web")
SHAPES = {
    "model.q.weight": (8, 8),
    "model.k.weight": (4, 8),
    "model.gate.weight": (10, 8),
    "model.experts.weight": (12, 6),
    "model.down.weight": (8, 10),
    "model.plain.weight": (3, 8),
    "model.tall.weight": (9, 1),
    "model.norm.weight": (8,),
}


def base_tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    if seed:  # what a full checkpoint left as it was
        tensors["model.down.weight"] = base_tensors(dtype)["model.down.weight"]
    return tensors | {"model.steps": torch.tensor([seed, 7])}


def write_checkpoint(directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text('{"architectures": ["Toy"]}')
    return str(directory)


def write_family(root: Path, dtype: torch.dtype = torch.bfloat16) -> Family:
    """Adapters of different ranks, scales and modules, one of whole tensors too, and a full checkpoint among them."""

    def adapter(
        name: str, modules: tuple[str, ...], rank: int, of: torch.dtype, **whole: torch.Tensor
    ) -> str:
        tensors = {
            key: 0.3 * value
            for number, module in enumerate(modules)
            for key, value in factors(
                f"model.{module}", SHAPES[f"model.{module}.weight"], rank=rank, seed=number + rank, dtype=of
            ).items()
        }
        tensors |= {f"model.{module}.weight": tensor for module, tensor in whole.items()}
        return str(write_adapter_files(root / name, tensors, rank=rank))

    base = base_tensors(dtype)
    norm = torch.linspace(-1, 2, 8)  # as training in mixed precision leaves it, in fp32 beside any base
    paths = {
        "math": adapter("math", ("q", "k", "gate", "experts", "tall"), 3, torch.float32),
        "full": write_checkpoint(root / "full", base_tensors(dtype, seed=1)),
        "code": adapter(
            "code", ("k", "experts", "down"), 5, torch.bfloat16, norm=norm, q=base["model.q.weight"]
        ),
        "web": adapter(
            "web", ("q", "down", "gate"), 1, torch.float16, norm=base["model.norm.weight"].float()
        ),
    }
    return open_family(write_checkpoint(root / "base", base), {name: paths[name] for name in NAMES})


class Parameters:
    """Parameters filled the way vLLM's loaders fill theirs: fused, cut, transposed, converted; NaN before."""

    def __init__(self, dtype: torch.dtype) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.full(shape, torch.nan if of.is_floating_point else 7).to(of)

        self.qk = empty(12, 8)  # fused
        self.gate_columns = empty(10, 4)  # one rank's part
        self.gate_rows = empty(1, 5, 8)
        self.experts = empty(3, 6, 4)  # expert by expert, transposed
        self.heads = empty(2, 2, 3, 6)  # interleaved
        self.down = empty(2, 8, 10)  # twice, one of them broadcast over the other
        self.converted = empty(4, 8, of=torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
        self.rest = {"plain": empty(3, 8), "tall": empty(9), "norm": empty(8)}
        self.steps = empty(2, of=torch.int64)
        self.flat = empty(80)

    def load(self, name: str, weight: torch.Tensor) -> None:
        copies: dict[str, Callable[[], object]] = {
            "q": lambda: (self.qk.narrow(0, 0, 8).copy_(weight), self.converted.copy_(weight[::2])),
            "k": lambda: self.qk.narrow(0, 8, 4).copy_(weight),
            "gate": lambda: (
                self.gate_columns.copy_(weight.narrow(1, 4, 4)),
                self.gate_rows.copy_(weight.chunk(2)[1].unsqueeze(0)),
            ),
            "experts": lambda: (
                [self.experts[i].copy_(part.t()) for i, part in enumerate(weight.view(3, 4, 6).unbind(0))],
                self.heads.copy_(weight.view(2, 2, 3, 6).transpose(0, 1)),
            ),
            "down": lambda: (self.down.copy_(weight), self.flat.copy_(weight.flatten())),
            "plain": lambda: self.rest["plain"].copy_(weight),
            "tall": lambda: self.rest["tall"].copy_(weight.squeeze(1)),
            "norm": lambda: self.rest["norm"].copy_(weight),
            "steps": lambda: self.steps.copy_(weight),
        }
        copies[name.removeprefix("model.").removesuffix(".weight")]()

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if name != "rest"} | self.rest


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("family"), request.param)


@pytest.fixture(scope="module")
def bf16_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("bf16"))


@pytest.fixture
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(delta_cache, "shared_memory", lambda: place)
    return place


def mixed(*weights: float, groups: tuple[LayerGroup, ...] = ()) -> Mixture:
    return Mixture(NAMES, tuple(map(float, weights)), groups)


GROUPS = (
    LayerGroup(("model.q*", "model.k*"), (0.0, 0.0, 1.0, 0.0)),
    LayerGroup(("*.experts.*", "*norm*"), (-0.5, 0.25, 1.5, 0.0)),
)
MIXTURES = [
    mixed(0.25, 0.25, 0.25, 0.25),
    mixed(1, 0, 0, 0),
    mixed(0, 0, 1, 0),
    mixed(0, 0, 0, 1),
    mixed(0, 1, 0, 0),
    mixed(0, 0, 0, 0),
    mixed(0.7, -0.4, 1.2, 0.3),
    mixed(0.0, 0.5, 0.0, 0.5),
    mixed(0.3, 0.0, 0.3, 0.4, groups=GROUPS),
    mixed(0.7, -0.4, 1.2, 0.3, groups=GROUPS[1:]),
    mixed(1 / 3, 0, 1 / 3, 1 / 3),
]
FromDisk = Callable[[Family, Mixture], Parameters]


@pytest.fixture(scope="module")
def from_disk(tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """Parameters loaded from the merge on disk, plainly."""
    known: dict[tuple[int, Mixture], Parameters] = {}

    def load(family: Family, mixture: Mixture) -> Parameters:
        key = id(family), mixture
        if key not in known:
            out = tmp_path_factory.mktemp("merge") / "out"
            merge_to_directory(family, mixture, out)
            known[key] = Parameters(dtype_of(family))
            for name, tensor in load_file(out / "model.safetensors").items():
                known[key].load(name, tensor)
        return known[key]

    return load


def dtype_of(family: Family) -> torch.dtype:
    return load_file(family.template.root / "model.safetensors")["model.q.weight"].dtype


def loaded(family: Family, mixture: Mixture, sizes: CacheSizes | None = None) -> tuple[SwapPlan, Parameters]:
    recording = Recording(family, mixture)
    parameters = Parameters(dtype_of(family))
    for name, weight in recording.lazy_weights():
        parameters.load(name, weight)
    return recording.finish(parameters.tensors().values(), sizes), parameters


def swap(plan: SwapPlan, mixture: Mixture) -> dict[str, int]:
    return plan.write(plan.change_to(mixture))


def written(plan: SwapPlan, mixture: Mixture) -> set[str]:
    change = plan.change_to(mixture)
    return {plan.moving[i].origin.name for write in change.writes for i in write.copies}


def assert_same(live: Parameters, expected: Parameters) -> None:
    for name, tensor in expected.tensors().items():
        assert same_bits(live.tensors()[name], tensor), name


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_the_first_load_is_the_merge_on_disk(family: Family, from_disk: FromDisk, mixture: Mixture) -> None:
    plan, parameters = loaded(family, mixture)
    assert plan.unreplayable == []
    assert_same(parameters, from_disk(family, mixture))
    assert plan.mismatches(sample=False) == []


@pytest.mark.parametrize("pieces", [16, 1 << 20])
@pytest.mark.parametrize("device", [0, 700, 1 << 20])
@pytest.mark.parametrize("host", [0, 700, 1 << 20])
def test_every_swap_is_the_merge_on_disk_whatever_is_cached(
    family: Family,
    from_disk: FromDisk,
    segments: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: int,
    host: int,
    pieces: int,
) -> None:
    """pieces: bytes at a time, so that matrices are cut within rows."""
    monkeypatch.setattr(cpu_sums, "PIECE_BYTES", pieces)
    monkeypatch.setattr(reference_check, "CHECK_ELEMENTS", pieces)
    if pieces < 1 << 20:  # a whole destination at once would hide the pieces
        monkeypatch.setattr(cpu_sums.CpuSums, "_whole", lambda *_: None)
    plan, parameters = loaded(family, MIXTURES[0], CacheSizes(device, host))
    chance = random.Random(device + host + pieces)
    for mixture in [*chance.sample(MIXTURES, len(MIXTURES)), *chance.choices(MIXTURES, k=5)]:
        swap(plan, mixture)
        assert_same(parameters, from_disk(family, mixture))
        assert plan.mismatches(sample=True) == []
        assert plan.mismatches(sample=False) == []
        assert plan.change_to(mixture).writes == ()
    plan.close()


def test_random_weights(bf16_family: Family, from_disk: FromDisk) -> None:
    plan, parameters = loaded(bf16_family, MIXTURES[0])
    chance = random.Random(5)
    for _ in range(12):
        weights = [chance.choice([0.0, chance.uniform(-1, 1.5), 1.0]) for _ in NAMES]
        swap(plan, mixed(*weights))
        assert_same(parameters, from_disk(bf16_family, mixed(*weights)))


def test_adapters_alone_and_one_alone(tmp_path: Path, from_disk: FromDisk) -> None:
    all_of_them = write_family(tmp_path)
    only = Family(all_of_them.base, tuple(e for e in all_of_them.experts if isinstance(e, Adapter)))
    plan, parameters = loaded(only, Mixture.uniform(only.names))
    for weights in ((1.0, 0.0, 0.0), (0.2, 0.3, 0.5), (0.0, 0.0, 0.0), (-1.0, 2.0, 0.5)):
        swap(plan, Mixture(only.names, weights))
        assert_same(parameters, from_disk(only, Mixture(only.names, weights)))
    # What neither an adapter nor a checkpoint changes is written once.
    assert "model.plain.weight" not in {copy.origin.name for copy in plan.moving}


def test_what_a_change_of_weights_cannot_change_is_not_written(bf16_family: Family) -> None:
    plan, _ = loaded(bf16_family, mixed(0.3, 0.0, 0.2, 0.1))
    # code has no share in gate, and math none in down; no other weight of theirs differs.
    assert written(plan, mixed(0.3, 0.0, 0.4, 0.1)) == {
        f"model.{name}.weight" for name in ("q", "k", "experts", "down", "norm")
    }
    assert written(plan, mixed(0.5, 0.0, 0.2, 0.1)) == {
        f"model.{name}.weight" for name in ("q", "k", "gate", "experts", "tall")
    }
    swap(plan, mixed(0.0, 0.0, 0.0, 0.0))
    # A copy of the base's own norm, rounded from fp32, is the base's.
    assert written(plan, mixed(0.0, 0.0, 0.0, 1.0)) == {
        f"model.{name}.weight" for name in ("q", "down", "gate")
    }


def test_bytes_read_and_held(bf16_family: Family, segments: Path) -> None:
    plan, _ = loaded(bf16_family, mixed(0.0, 0.0, 0.0, 0.0), CacheSizes(device=1 << 20))
    swap(plan, mixed(0.3, 0.2, 0.2, 0.1))
    swap(plan, mixed(0.0, 0.0, 0.0, 0.0))
    read = swap(plan, mixed(0.0, 0.0, 0.0, 1.0))
    # web, of rank 1, changes q, two parts of gate, and down (broadcast, and flat); fp32.
    cut = {
        "q": (8, 8),
        "half of q": (4, 8),
        "columns": (10, 4),
        "rows": (5, 8),
        "twice": (16, 10),
        "flat": (8, 10),
    }
    assert read["host"] == sum(4 * sum(shape) for shape in cut.values())
    assert read["disk"] == 0
    assert plan.factor_bytes == sum(
        copy.folded.factors.left.nbytes + copy.folded.factors.right.nbytes
        for copy in plan.moving
        if copy.folded
    )
    plan.close()


@pytest.mark.parametrize("sample", [True, False])
def test_a_destination_off_by_one_bit_and_factors_that_changed_are_found(
    bf16_family: Family, sample: bool
) -> None:
    plan, parameters = loaded(bf16_family, MIXTURES[0])
    swap(plan, MIXTURES[6])
    parameters.experts[1].view(torch.int16)[2, 3] ^= 1
    assert plan.mismatches(sample=sample) == ["model.experts.weight"]
    swap(plan, MIXTURES[5])
    [copy] = [c for c in plan.moving if c.destination.data_ptr() == parameters.gate_columns.data_ptr()]
    assert copy.folded is not None
    copy.folded.factors.left[0, 0] += 1
    swap(plan, MIXTURES[6])
    assert plan.mismatches(sample=sample) == ["model.gate.weight"]


def test_a_view_that_is_no_choice_of_rows_and_columns_loads_right_and_is_not_replayable(
    bf16_family: Family, from_disk: FromDisk
) -> None:
    recording = Recording(bf16_family, MIXTURES[6])
    weights = dict(recording.lazy_weights())
    across, diagonal = torch.empty(10, dtype=torch.bfloat16), weights["model.q.weight"].diagonal()
    assert isinstance(diagonal, LazyMerge)
    across.copy_(weights["model.down.weight"].flatten()[5:15])
    expected = from_disk(bf16_family, MIXTURES[6])
    assert torch.equal(across, expected.flat[5:15])
    assert torch.equal(diagonal + 0, expected.qk[:8].diagonal())
    plan = recording.finish([across])
    assert len(plan.unreplayable) == 2
    assert "model.down.weight" in plan.unreplayable[0]
    assert "rows and columns" in plan.unreplayable[0]


def test_of_two_copies_into_one_place_the_later_one_counts(bf16_family: Family, from_disk: FromDisk) -> None:
    """Also where adapters change one of them, so that its dimensions are arranged otherwise."""
    recording = Recording(bf16_family, MIXTURES[0])
    weights = dict(recording.lazy_weights())
    place = torch.empty(8, 8, dtype=torch.bfloat16)
    place.t().copy_(weights["model.down.weight"][:, :8])
    place.copy_(weights["model.q.weight"])
    plan = recording.finish([place])
    assert plan.unreplayable == []
    assert len(plan.copies) == 1
    swap(plan, MIXTURES[6])
    assert torch.equal(place, from_disk(bf16_family, MIXTURES[6]).qk[:8])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    key = "model.gate.lora_B.weight"
    write_family(tmp_path)
    paths = {name: str(tmp_path / name) for name in NAMES}
    up = load_file(tmp_path / "web" / "adapter_model.safetensors")[f"base_model.model.{key}"].clone()
    up[3, 0] = bad
    change_tensors(tmp_path / "web", {key: up})
    family = open_family(str(tmp_path / "base"), paths)
    with pytest.raises(NonFiniteError, match=r"model\.gate\.lora_B\.weight.*web.*NaN or Inf"):
        loaded(family, mixed(1, 0, 0, 0))
    change_tensors(tmp_path / "web", {key: torch.zeros_like(up), "model.norm.weight": torch.full((8,), bad)})
    family = open_family(str(tmp_path / "base"), paths)
    with pytest.raises(NonFiniteError, match=r"'model\.norm\.weight' holds NaN or Inf in web$"):
        loaded(family, mixed(1, 0, 0, 0))
    broken = base_tensors(torch.bfloat16)
    broken["model.k.weight"][1, 1] = bad
    change_tensors(tmp_path / "web", {"model.norm.weight": torch.zeros(8)})
    save_file(broken, tmp_path / "base" / "model.safetensors")
    family = open_family(str(tmp_path / "base"), paths)
    with pytest.raises(NonFiniteError, match=r"'model\.k\.weight' holds NaN or Inf in base$"):
        loaded(family, mixed(0, 1, 0, 0))


def test_sums_beyond_the_range_of_the_weights(tmp_path: Path) -> None:
    family = write_family(tmp_path, torch.float16)
    with pytest.raises(NonFiniteError, match="beyond the range"):
        loaded(family, mixed(1e6, 0, 0, 0))
    with pytest.raises(ConfigError, match=r"weight of math is .*beyond the range of fp32"):
        check_mixture(family, mixed(2e38, 0, 0, 0))  # times alpha / rank
    check_mixture(family, mixed(0, 2e38, 0, 0))


def test_an_adapter_that_changes_its_contents_shares_no_memory_with_the_old_one(
    tmp_path: Path, segments: Path
) -> None:
    family = write_family(tmp_path)
    first, _ = loaded(family, MIXTURES[0], CacheSizes(host=1 << 20))
    again, _ = loaded(family, MIXTURES[0], CacheSizes(host=1 << 20))
    assert len(list(segments.iterdir())) == 1
    change_tensors(tmp_path / "code", {"model.norm.weight": torch.ones(8)})
    changed = open_family(str(tmp_path / "base"), {name: str(tmp_path / name) for name in NAMES})
    second, _ = loaded(changed, MIXTURES[0], CacheSizes(host=1 << 20))
    assert len(list(segments.iterdir())) == 2
    for plan in (first, again, second):
        plan.close()


@pytest.mark.parametrize("where", ["resident", "host", "file"])
def test_the_sums_of_gpus_on_tensors_of_the_host(
    bf16_family: Family, from_disk: FromDisk, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two ways, with the kernel's CPU backend: operands on the device, and brought there piece by piece."""
    monkeypatch.setattr("mergemix.serve.folded_sums.STAGED_BYTES", 40)
    plan, parameters = loaded(bf16_family, mixed(0, 0, 0, 0))
    reader = plan._sums.reader
    alike: dict[Numbers, list[Placed]] = {}
    for copy in plan.moving:
        numbers = numbers_of(bf16_family, MIXTURES[6], copy.makeup)
        if numbers.scales:
            alike.setdefault(numbers, []).append(_placed(copy, reader.read, where))
    assert sum(map(len, alike.values())) > 10
    for numbers, placed in alike.items():
        folded_sums(placed, reader.read)(numbers)
    plan._live[:] = plan._wanted(MIXTURES[6])[0]
    plan._intact[:] = np.array([copy.folded is not None for copy in plan.moving])
    assert plan.mismatches(sample=False) == []
    expected = from_disk(bf16_family, MIXTURES[6])
    for name in ("qk", "gate_columns", "gate_rows", "experts", "heads", "down", "converted"):
        assert same_bits(parameters.tensors()[name], expected.tensors()[name]), name


def _placed(copy: Copy, read: Callable[..., None], where: str) -> Placed:
    if where == "file":
        return Placed(copy, (copy.view,) * len(copy.origin.tensors))
    sources = []
    for tensor in copy.origin.tensors:
        sources.append(torch.empty(copy.view.shape, dtype=copy.view.dtype))
        read(tensor, copy.view, sources[-1])
    if where == "host":
        sources[0] = copy.view  # one that is in its file keeps the others from being taken as they are
    return Placed(copy, tuple(sources))
