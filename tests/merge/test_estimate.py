"""What a plan foretells, against what the merge then does; and what is measured."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.checkpoints.family import open_family
from mergemix.checkpoints.files import FileIdentity
from mergemix.checkpoints.header import TensorInfo
from mergemix.errors import ConfigError
from mergemix.merge import bandwidth, estimate, resources
from mergemix.merge.mixtures_file import Recipe
from mergemix.merge.request import MergeRequest
from mergemix.mixture import Mixture
from tests.checkpoints.adapter_files import factors, write_adapter_files
from tests.merge.families import NAMES, tiny_family
from tests.tiny import random_tensors, write_checkpoint

WEIGHTS = ({"math": 1.0}, {"math": 1.0, "code": 3.0}, {"web": 1.0})


def make_request(root: Path, *weights: dict[str, float], memory_bytes: int = 1 << 28) -> MergeRequest:
    recipes = tuple(
        Recipe(f"m{index}", given, Mixture.of(NAMES, given)) for index, given in enumerate(weights)
    )
    family = tiny_family(root / "models")
    return MergeRequest(family, recipes, root / "out", memory_bytes, many=len(weights) > 1)


@pytest.mark.parametrize("weights", [WEIGHTS[1:2], WEIGHTS])
def test_a_plan_foretells_what_the_merge_does(tmp_path: Path, weights: tuple[dict[str, float], ...]) -> None:
    request = make_request(tmp_path, *weights)
    foretold = estimate.estimate(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"], "nothing is left behind"
    stats = request.run()
    assert foretold["fits"] is True
    assert foretold["reasons"] == []
    assert foretold["bytes_read"] == stats.bytes_read
    assert foretold["bytes_written"] == stats.bytes_written
    assert foretold["tensors"] == stats.tensors
    assert sum(each["bytes"] for each in foretold["reads"]) == stats.bytes_read
    used = {name for given in weights for name in given}
    assert [each["name"] for each in foretold["reads"]] == [name for name in NAMES if name in used]
    assert {each["from"] for each in foretold["reads"]} == {"disk"}
    files = [path for path in request.out.rglob("*") if path.is_file() and path.name != "mergemix.json"]
    assert foretold["disk"]["needed_bytes"] == sum(path.stat().st_size for path in files)
    memory = foretold["host_memory"]
    assert memory["peak_bytes"] == memory["buffers_bytes"] + memory["process_bytes"]
    assert 0 < memory["buffers_bytes"] <= request.memory_bytes
    assert foretold["device_memory_bytes"] == 0
    stages = dict(foretold["stages"])
    assert set(stages) == {"start", "disk_read", "disk_write", "kernel", "processor"}
    start = stages.pop("start")
    assert foretold["seconds"] == start + max(stages.values())
    assert stages[foretold["bound_by"]] == max(stages.values())
    whole = sum(tensor.nbytes for tensor in request.family.template.tensors.values())
    swap = dict(foretold["swap"])
    assert swap.pop("tiers").keys() == {"device", "host", "disk"}
    assert swap == {"bytes_read": 3 * whole, "bytes_written": whole, "cpu_parameter_bytes": 2 * whole}


def test_an_adapter_is_read_as_factors(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", random_tensors({"up.weight": (48, 16), "norm.weight": (16,)}, 0)
    )
    adapter = write_adapter_files(tmp_path / "adapter", factors("up", (48, 16), rank=2))
    family = open_family(str(base), {"math": str(adapter)})
    recipe = Recipe("", {"math": 1.0}, Mixture.of(["math"], {"math": 1.0}))
    request = MergeRequest(family, (recipe,), tmp_path / "out", 1 << 20)
    foretold = estimate.estimate(request)
    read = {each["name"]: each["bytes"] for each in foretold["reads"]}
    assert read == {"base": 2 * (48 * 16 + 16), "math": 4 * 2 * (48 + 16)}
    assert "low_rank_kernel" in foretold["stages"]
    assert foretold["bandwidths"]["low_rank_kernel_bytes_per_s"] > 0
    assert request.run().bytes_read == foretold["bytes_read"] == sum(read.values())


def test_a_copy_needs_no_kernel(tmp_path: Path) -> None:
    foretold = estimate.estimate(make_request(tmp_path, {"math": 1.0}))
    assert "kernel" not in foretold["stages"]
    assert foretold["seconds"] > 0


def test_all_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(tmp_path, *WEIGHTS, memory_bytes=1000)
    one = estimate.assess(request).disk // 3
    monkeypatch.setattr(estimate, "free_disk", lambda out: 2 * one + 5)
    foretold = estimate.estimate(request)
    memory, disk = foretold["reasons"]
    assert foretold["fits"] is False
    assert "--memory" in memory
    assert "at most 2 of the 3 mixtures fit" in disk
    assert foretold["host_memory"]["peak_bytes"] is None
    with pytest.raises(ConfigError) as caught:
        estimate.check_fits(request)
    assert str(caught.value) == f"{memory}; {disk}"
    enough = int(next(word for word in memory.split() if word.isdigit() and int(word) > 1000))
    monkeypatch.undo()
    estimate.check_fits(make_request(tmp_path / "again", *WEIGHTS, memory_bytes=enough))


def test_buffers_beyond_the_free_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(tmp_path, WEIGHTS[1])
    monkeypatch.setattr(estimate, "free_memory", lambda: 5000)
    with pytest.raises(ConfigError, match=r"do not fit in the 5 kB of memory .* --memory 0MiB or less"):
        estimate.check_fits(request)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    request = make_request(tmp_path, WEIGHTS[1])
    request.out.mkdir()
    assert "exists already" in estimate.assess(request).reasons[0]
    nowhere = MergeRequest(request.family, request.recipes, tmp_path / "no" / "out", 1 << 20)
    foretold = estimate.estimate(nowhere)
    assert [reason for reason in foretold["reasons"] if "is not a directory" in reason] == foretold["reasons"]
    assert foretold["disk"]["free_bytes"] is None
    assert foretold["seconds"] is None
    assert foretold["bound_by"] is None
    assert foretold["bandwidths"]["disk_write_bytes_per_s"] is None


def test_what_a_killed_merge_left_counts_as_free(tmp_path: Path) -> None:
    left = tmp_path / ".out.tmp-12345" / "m1"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(os.urandom(1 << 20))
    os.sync()
    free = resources.free_disk(tmp_path / "another")
    assert abs(resources.free_disk(tmp_path / "out") - free - (1 << 20)) < 1 << 19 or free == 0


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0, 1),
)
def test_ranges_are_spread_over_all_bytes(sizes: list[int], count: int, nbytes: int, phase: float) -> None:
    """Tensors of one file, end to end after a header of 8 bytes."""
    total = sum(sizes)
    file = FileIdentity(0, 0, 8 + total, 0)
    tensors, offset = [], 8
    for index, size in enumerate(sizes):
        tensors.append(TensorInfo(str(index), "U8", (size,), Path("f"), offset, size, file))
        offset += size
    ranges = bandwidth.spread_ranges(tensors, count, nbytes, phase)
    assert len(ranges) == (count if total else 0)
    for index, each in enumerate(ranges):
        assert 0 <= each.begin < each.tensor.nbytes
        place = each.tensor.offset - 8 + each.begin
        share = total / count
        assert index * share - 1 <= place <= (index + 1) * share
        assert 0 < each.nbytes <= nbytes
        assert place + each.nbytes <= total


@pytest.fixture
def file(tmp_path: Path) -> TensorInfo:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        return TensorInfo("t", "U8", (1 << 20,), path, 0, 1 << 20, FileIdentity.of(opened.fileno()))


def test_what_is_in_the_page_cache_is_known(file: TensorInfo) -> None:
    ranges = [bandwidth.Range(file, 0, file.nbytes)]
    file.path.read_bytes()
    rate, share = bandwidth.read_rate(ranges)
    assert share in (1.0, None)
    assert rate.bytes_per_s > 0
    with file.path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first = bandwidth.read_rate(ranges)[1]
    assert first in (0.0, share)  # a file system in memory has nothing else
    assert bandwidth.read_rate(ranges)[1] == first, "measuring changed what is in the page cache"


def test_measuring_leaves_nothing_behind(tmp_path: Path) -> None:
    threads, files = threading.active_count(), set(os.listdir("/proc/self/fd"))
    written, read = bandwidth.file_rates(tmp_path, 3 << 20)
    rates = [written, read, bandwidth.write_rate(tmp_path, 3 << 20), bandwidth.copy_rate(1 << 20)]
    rates += [bandwidth.kernel_rate(3, 2, dtype, nbytes=1 << 20) for dtype in ("BF16", "F16", "F32")]
    rates.append(bandwidth.kernel_rate(2, 2, rank=4, nbytes=1 << 20))
    assert all(rate.bytes_per_s > 0 and rate.processor_s_per_byte >= 0 for rate in rates)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= threads + len(os.sched_getaffinity(0))  # the kernels keep theirs
    assert set(os.listdir("/proc/self/fd")) == files
    with pytest.raises(OSError, match="No such file"):
        bandwidth.write_rate(tmp_path / "nowhere")


def test_memory_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = resources.free_memory()
    assert free is None or free > 1 << 20
    assert 1 << 20 < resources.process_memory() <= resources.peak_memory() * 1.01
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 3000000\nfile 1000\n")
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert resources.free_memory() == 1_001_000
    (tmp_path / "memory.max").write_text("max\n")
    again = resources.free_memory()
    assert again is None or again > 1_001_000


def test_the_tiers_of_the_delta_cache_are_foretold(tmp_path: Path) -> None:
    request = make_request(tmp_path, {"math": 0.5, "code": 0.5})
    whole = estimate.estimate(request)["swap"]["tiers"]
    assert whole["device"] == whole["host"] == 0 < whole["disk"]
    some = estimate.estimate(request, device_cache=whole["disk"] // 3, host_cache=whole["disk"] // 2)["swap"][
        "tiers"
    ]
    assert sum(some.values()) == whole["disk"]
    assert 0 < some["device"] <= whole["disk"] // 3
    assert 0 < some["host"] <= whole["disk"] // 2
    every = estimate.estimate(request, device_cache=1 << 40)["swap"]["tiers"]
    assert every == {"device": whole["disk"], "host": 0, "disk": 0}
