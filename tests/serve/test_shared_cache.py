"""The host cache of several engines of one machine: filled by two at once, used by a third, and a full memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.merge import delta_cache
from mergemix.mixture import Mixture
from mergemix.serve.operand_cache import CacheSizes
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan

NAMES = ("math", "code", "web")
TENSORS = 12
HOST = 1 << 20


def make_family(root: Path) -> Family:
    if not root.exists():
        for seed, name in enumerate(NAMES):
            generator = torch.Generator().manual_seed(seed)
            (root / name).mkdir(parents=True)
            made = {f"w{i}": torch.randn(30, 40, generator=generator) for i in range(TENSORS)}
            save_file(made, root / name / "model.safetensors")
            (root / name / "config.json").write_text("{}")
    return open_family(None, {name: str(root / name) for name in NAMES})


def loaded(family: Family, host: int = HOST) -> SwapPlan:
    recording, parameters = Recording(family, Mixture(NAMES, (1.0, 0.0, 0.0))), []
    for _, weight in recording.lazy_weights():
        parameters.append(torch.empty(40, 30))
        parameters[-1].t().copy_(weight)
    return recording.finish(parameters, CacheSizes(host=host))


def swap(plan: SwapPlan, *weights: float) -> dict[str, int]:
    read = plan.write(plan.change_to(Mixture(NAMES, weights)))
    assert plan.mismatches(sample=False) == []
    return read


def fill_at_once(plan: SwapPlan, meet: Callable[[], None]) -> list[dict[str, int]]:
    """What two swaps read. meet: called when every slot is filled, and none marked as filled."""
    mark_filled = plan.cache.mark_filled

    def mark(slots: np.ndarray) -> None:
        meet()
        mark_filled(slots)

    plan.cache.mark_filled = mark  # type: ignore[method-assign]
    first = swap(plan, 0.2, 0.3, 0.5)
    plan.cache.mark_filled = mark_filled  # type: ignore[method-assign]
    return [first, swap(plan, 0.1, 0.3, 0.6)]


def fill_in_another_process() -> None:
    place, family = map(Path, sys.argv[1:])
    delta_cache.shared_memory = lambda: place
    plan = loaded(make_family(family))

    def meet() -> None:
        print("filled", flush=True)
        sys.stdin.readline()

    print(json.dumps(fill_at_once(plan, meet)), flush=True)
    sys.stdin.readline()
    plan.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(delta_cache, "shared_memory", lambda: place)
    return place


def test_two_processes_fill_one_segment_at_once_and_a_third_engine_reads_no_file(
    tmp_path: Path, place: Path
) -> None:
    family = make_family(tmp_path / "family")
    nbytes = len(NAMES) * TENSORS * 30 * 40 * 4
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from {__name__} import fill_in_another_process as fill; fill()",
            str(place),
            str(tmp_path / "family"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert other.stdin is not None
    assert other.stdout is not None
    answers, questions = other.stdout, other.stdin

    def meet() -> None:
        assert answers.readline() == "filled\n"
        print(file=questions, flush=True)

    try:
        plan = loaded(family)
        both = [fill_at_once(plan, meet), json.loads(answers.readline())]
        for first, second in both:
            assert first == {"device": 0, "host": 0, "disk": nbytes}
            assert second == {"device": 0, "host": nbytes, "disk": 0}
        third = loaded(family)
        assert swap(third, 0.2, 0.3, 0.5) == {"device": 0, "host": nbytes, "disk": 0}
        third.close()
        plan.close()
    finally:
        other.communicate("\n")
    assert other.returncode == 0
    assert list(place.iterdir()) == []


def test_a_full_shared_memory_is_refused_and_less_is_still_to_be_had(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_family(tmp_path / "family")
    statvfs = os.statvfs

    def nearly_full(path: Path) -> os.statvfs_result:
        found = list(statvfs(path))
        found[0] = found[1] = 4096
        found[4] = 25  # blocks for everybody: 100 KiB
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(ConfigError, match=r"only 10\d.* of .*shm are free: make the host cache smaller"):
        loaded(family)
    assert list(place.iterdir()) == []
    plan = loaded(family, host=80_000)
    swap(plan, 0.2, 0.3, 0.5)
    assert 0 < plan.cache.assigned["host"] <= 80_000
    assert swap(plan, 0.4, 0.1, 0.5)["host"] > 0
    plan.close()


def test_what_was_read_from_a_file_that_changed_is_not_for_others(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    first, second = loaded(family), loaded(family)
    path = family.experts[1].root / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\x80\x40"
    with path.open("r+b") as file:
        file.write(data)
    with pytest.raises(CheckpointError, match="was changed"):
        first.write(first.change_to(Mixture(NAMES, (0.2, 0.5, 0.3))))
    second.cache.refresh()
    assert not second.cache.filled.any()
    first.close()
    second.close()


def test_experts_that_change_places_do_not_share_memory(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    math, code, web = family.experts
    swapped = Family(None, (replace(math, tensors=code.tensors), replace(code, tensors=math.tensors), web))
    plans = [loaded(family), loaded(swapped)]
    segments = [plan.cache._segment for plan in plans]
    assert None not in segments
    assert len({segment.path for segment in segments if segment is not None}) == 2
    for plan in plans:
        plan.close()
