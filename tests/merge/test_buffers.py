"""Memory: what is allocated is what was divided, and never more than was given."""

import mmap
from pathlib import Path

import pytest
import torch

from mergemix.errors import ConfigError
from mergemix.merge import stream as stream_module
from mergemix.merge.buffers import BLOCK_ALIGNMENT, MAX_BLOCK_BYTES, divide_memory
from mergemix.merge.plan import MergePlan, plan_merge
from mergemix.merge.sinks import ParameterSink
from mergemix.mixture import Mixture
from tests.merge.families import poisoned_parameters, write_family


def plan_of(root: Path, num_experts: int, num_outputs: int, elements: int = 40_000) -> MergePlan:
    names = [f"e{k}" for k in range(num_experts)]
    experts = {name: {"w": torch.full((elements,), float(k))} for k, name in enumerate(names)}
    return plan_merge(write_family(root, None, experts), [Mixture.uniform(names)] * num_outputs)


@pytest.mark.parametrize("num_experts", [2, 9])
@pytest.mark.parametrize("num_outputs", [1, 4])
@pytest.mark.parametrize("memory_bytes", [60_000, 1 << 20, 64 << 20, 10 << 30])
def test_the_division_stays_within_what_was_given(
    tmp_path: Path, num_experts: int, num_outputs: int, memory_bytes: int
) -> None:
    buffers = divide_memory(plan_of(tmp_path, num_experts, num_outputs), memory_bytes)
    assert buffers.block_bytes % BLOCK_ALIGNMENT == 0
    assert 0 < buffers.block_bytes <= MAX_BLOCK_BYTES
    assert buffers.total_bytes == buffers.workers * buffers.block_bytes * (num_experts + num_outputs)
    assert buffers.total_bytes <= memory_bytes


def test_what_does_not_fit_is_refused_and_what_would_fit_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 3, 2)
    with pytest.raises(
        ConfigError, match=r"at least 20480 bytes \(20\.5 kB\) .* only 20479 were given: use --memory 20480"
    ):
        divide_memory(plan, 20479)
    assert divide_memory(plan, 20480).total_bytes == 20480


def test_a_merge_allocates_what_was_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, 3, 1)
    allocated: list[int] = []
    map_memory = mmap.mmap
    monkeypatch.setattr(
        mmap, "mmap", lambda file, nbytes: allocated.append(nbytes) or map_memory(file, nbytes)
    )
    stream_module.stream(plan, ParameterSink(plan, poisoned_parameters(plan)), memory_bytes=200_000)
    buffers = divide_memory(plan, 200_000)
    assert sum(allocated) == buffers.total_bytes
    assert len(allocated) == buffers.workers
