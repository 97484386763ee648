"""The swap on a GPU: CPU tensors stand for its memory, and its lanes run late and out of turn."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.checkpoints.header import TensorInfo
from mergemix.merge import delta_cache, merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve import gpu_sums, sums
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels.dispatch import GroupedWeightedSum
from mergemix_kernels.pinned import Ring, StreamedSum
from tests.kernels.late_lanes import LateLanes
from tests.serve import test_folded_adapters as adapters
from tests.serve.test_swap_plan import GROUPED_MIXTURES, NAMES, Parameters, assert_same, checkpoint

EVERYTHING = 1 << 20
OTHER_DTYPES = {"q": torch.bfloat16, "k": torch.float16, "pair": torch.bfloat16, "experts": torch.bfloat16}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Of tensors in several dtypes."""
    root = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(("base", *NAMES)):
        tensors = checkpoint(seed, torch.float32)
        tensors = {key: tensor.to(OTHER_DTYPES.get(key, tensor.dtype)) for key, tensor in tensors.items()}
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text('{"architectures": ["Toy"]}')
    return open_family(str(root / "base"), {name: str(root / name) for name in NAMES})


@pytest.fixture(scope="module")
def expected(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[Mixture, Parameters]:
    """Parameters loaded from the merge on disk, plainly."""
    loaded = {}
    for mixture in GROUPED_MIXTURES:
        out = tmp_path_factory.mktemp("merge") / "out"
        merge_to_directory(family, mixture, out)
        loaded[mixture] = Parameters(torch.bfloat16)
        for name, tensor in load_file(out / "model.safetensors").items():
            loaded[mixture].load(name, tensor)
    return loaded


class Device:
    """Stands for a GPU: which memory is its own or pinned, and when its work is done."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int, *, pinned: bool) -> None:
        self.lanes, self._pinned = LateLanes(seed), pinned
        self.ring = Ring(self.lanes, slot_bytes=5 * 512, slots=2)
        is_finite = sums.is_finite

        def finite(tensor: torch.Tensor) -> bool:
            self.wait()
            return is_finite(tensor)

        patch.setattr(sums.Sums, "ring", lambda *_: self.ring)
        patch.setattr(sums, "is_finite", finite)

    def wait(self) -> None:
        """For the caller's stream."""
        self.lanes.wait_on_host(self.lanes.record("caller"))

    def load(self, family: Family, mixture: Mixture, sizes: CacheSizes) -> tuple[SwapPlan, Parameters]:
        recording, parameters = Recording(family, mixture), Parameters(torch.bfloat16)
        for tensor in parameters.tensors().values():
            self.lanes.put(tensor, "device")
        for name, weight in recording.lazy_weights():
            parameters.load(name, weight)
        plan = recording.finish(parameters.tensors().values(), sizes)
        self.wait()
        self.place(plan)
        return plan, parameters

    def place(self, plan: SwapPlan) -> None:
        for i, tier in enumerate(plan.cache.tiers):
            slot = plan.cache.slot(i, 0)
            if slot is not None:
                self.lanes.put(
                    slot, "device" if tier == "device" else "pinned" if self._pinned else "pageable"
                )

    def swap(self, plan: SwapPlan, mixture: Mixture) -> dict[str, int]:
        """What is to change is spoiled first."""
        change = plan.change_to(mixture)
        for destination in (plan.moving[i].destination for write in change.writes for i in write.copies):
            destination.fill_(float("nan") if destination.is_floating_point() else 9)
        read = plan.write(change)
        self.wait()
        return read


@pytest.fixture(autouse=True)
def segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(delta_cache, "shared_memory", lambda: place)
    return place


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of files, by whoever reads them."""
    found: list[int] = []
    read, depth = ViewReader.read, [0]

    def counted(self: ViewReader, tensor: TensorInfo, view: torch.Tensor, into: torch.Tensor) -> None:
        depth[0] or found.append(view.numel() * view.element_size())
        depth[0] += 1
        try:
            read(self, tensor, view, into)
        finally:
            depth[0] -= 1

    monkeypatch.setattr(ViewReader, "read", counted)
    monkeypatch.setattr(sums.CpuSums, "each", lambda self, parts, work: [work(part) for part in parts])
    return found


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("host", [0, 700, EVERYTHING])
@pytest.mark.parametrize("device", [0, 900, EVERYTHING])
def test_swaps_equal_the_disk_merge_wherever_the_operands_are(
    family: Family,
    expected: dict[Mixture, Parameters],
    monkeypatch: pytest.MonkeyPatch,
    bytes_read: list[int],
    device: int,
    host: int,
    pinned: bool,
) -> None:
    chance = random.Random(device + host + pinned)
    gpu = Device(monkeypatch, chance.randrange(1 << 20), pinned=pinned)
    plan, parameters = gpu.load(family, GROUPED_MIXTURES[0], CacheSizes(device, host))
    assert_same(parameters, expected[GROUPED_MIXTURES[0]])
    for mixture in chance.choices(GROUPED_MIXTURES, k=10):
        bytes_read.clear()
        read = gpu.swap(plan, mixture)
        assert read["disk"] == sum(bytes_read)
        assert_same(parameters, expected[mixture])
        assert plan.mismatches(sample=False) == []
        assert sum(gpu.swap(plan, mixture).values()) == 0
    plan.close()


def test_whatever_the_default_device_of_torch_is(
    family: Family, expected: dict[Mixture, Parameters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM makes the GPU the default device while weights change: what is meant for the host says so."""
    gpu = Device(monkeypatch, 5, pinned=True)
    plan, parameters = gpu.load(family, GROUPED_MIXTURES[0], CacheSizes(900, 700))
    with torch.device("meta"):
        for mixture in GROUPED_MIXTURES[1:]:
            gpu.swap(plan, mixture)
            assert plan.mismatches(sample=False) == []
            assert_same(parameters, expected[mixture])
    plan.close()


@pytest.mark.parametrize("device", [0, 700, EVERYTHING])
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_swaps_with_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: int, default: str
) -> None:
    family = adapters.write_family(tmp_path / "adapters")
    gpu = Device(monkeypatch, device, pinned=True)
    recording = Recording(family, adapters.MIXTURES[0])
    parameters = adapters.Parameters(torch.bfloat16)
    for tensor in parameters.tensors().values():
        gpu.lanes.put(tensor, "device")
    for name, weight in recording.lazy_weights():
        parameters.load(name, weight)
    plan = recording.finish(parameters.tensors().values(), CacheSizes(device, 900))
    gpu.wait()
    gpu.place(plan)
    with torch.device(default):
        for mixture in random.Random(device).choices(adapters.MIXTURES, k=6):
            gpu.swap(plan, mixture)
            assert plan.mismatches(sample=False) == []
    plan.close()


def many(root: Path, tensors: int) -> Family:
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        (root / name).mkdir(parents=True)
        made = {f"w{i}": torch.randn(6, 4, generator=generator) for i in range(tensors)}
        save_file(made, root / name / "model.safetensors")
        (root / name / "config.json").write_text("{}")
    return open_family(None, {name: str(root / name) for name in NAMES})


def loaded_from(gpu: Device, family: Family, sizes: CacheSizes) -> SwapPlan:
    recording = Recording(family, Mixture(NAMES, (1.0, 0.0, 0.0)))
    parameters = []
    for _, weight in recording.lazy_weights():
        parameters.append(gpu.lanes.put(torch.empty(6, 4), "device"))
        parameters[-1].copy_(weight)
    plan = recording.finish(parameters, sizes)
    gpu.place(plan)
    return plan


def test_a_swap_of_resident_operands_does_the_same_in_python_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, made = [], Counter[str]()
    for kind in (GroupedWeightedSum, StreamedSum):
        made_as = kind.__init__
        monkeypatch.setattr(
            kind,
            "__init__",
            lambda self, *a, of=made_as, key=kind.__name__: (made.update([key]), of(self, *a))[1],
        )
    for tensors in (10, 40):
        gpu = Device(monkeypatch, tensors, pinned=True)
        plan = loaded_from(gpu, many(tmp_path / str(tensors), tensors), CacheSizes(device=EVERYTHING))
        first, second, third = (
            Mixture(NAMES, weights, (LayerGroup(("w*1", "w2"), weights[::-1]),))
            for weights in ((0.2, 0.3, 0.5), (0.1, 0.1, 0.8), (0.6, 0.2, 0.2))
        )
        gpu.swap(plan, first)
        gpu.swap(plan, second)
        made.clear()
        counted = Counter[str]()

        def count(frame: FrameType, event: str, _: object, counted: Counter[str] = counted) -> None:
            name = Path(frame.f_code.co_filename).name
            if event == "call" and name in ("swap_plan.py", "gpu_sums.py", "operand_cache.py", "copies.py"):
                counted[f"{name}:{frame.f_code.co_name}"] += 1

        sys.setprofile(count)
        try:
            change = plan.change_to(third)
            plan.write(change)
        finally:
            sys.setprofile(None)
        gpu.wait()
        assert plan.mismatches(sample=False) == []
        assert len(change.writes) == 2
        assert made == Counter(), "what was launched before is kept ready"
        calls.append(counted)
        plan.close()
    assert calls[0] == calls[1]
    assert calls[0]["gpu_sums.py:write"] == 2


def test_few_launches_are_kept_and_closing_frees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sums, "MAX_LAUNCHES", 3)
    gpu = Device(monkeypatch, 0, pinned=True)
    plan = loaded_from(gpu, many(tmp_path, 9), CacheSizes(device=1000, host=EVERYTHING))
    [kept] = plan._sums._gpus.values()
    for i in range(8):
        gpu.swap(plan, Mixture(NAMES, (0.2, 0.3, 0.5), (LayerGroup((f"w{i}",), (0.0, 0.5, 0.5)),)))
        assert len(kept._launches) <= 3
        assert plan.mismatches(sample=False) == []
    seen = weakref.ref(kept)
    del kept
    plan.close()
    gc.collect()
    assert seen() is None


def test_the_ring_is_taken_while_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(monkeypatch, 0, pinned=True)
    plan = loaded_from(gpu, many(tmp_path, 1), CacheSizes())
    assert all("device" in vars(slot) for slot in gpu.ring.slots)
    plan.close()
