"""The CPU kernels on several threads, in forked children and in fresh processes."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_samples import as_array, numbers

from mergemix_kernels import cpu, cpu_native, reference

BF16 = torch.bfloat16


def run(sources: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    out = torch.full_like(sources[0], float("nan"))
    cpu.weighted_sum([as_array(source) for source in sources], weights, as_array(out), "BF16")
    return out


def test_one_thread_means_the_calling_one_and_many_may_call(monkeypatch):
    monkeypatch.setattr(cpu, "thread_count", lambda: 3)
    monkeypatch.setattr(cpu, "_helper_threads", lambda _: pytest.fail("threads=1 must start none"))
    sources = [numbers(BF16, 3 * cpu.MIN_RANGE_ELEMENTS, seed) for seed in range(4)]
    sums = cpu.WeightedSums([[0.1, 0.2, 0.3, 0.4], [0.7, 0.0, 0.0, 0.3]], 4)

    def call(_: int) -> list[torch.Tensor]:
        outs = [torch.full_like(sources[0], float("nan")) for _ in range(2)]
        assert sums(
            [as_array(source) for source in sources], [as_array(out) for out in outs], "BF16", threads=1
        )
        return outs

    expected = call(0)
    with ThreadPoolExecutor(8) as callers:
        for outs in callers.map(call, range(32)):
            assert all(map(torch.equal, outs, expected))


def _sum_in_child(queue) -> None:
    sources = [numbers(BF16, 300_000, seed) for seed in range(3)]
    weights = [0.2, 0.3, 0.5]
    equal = torch.equal(run(sources, weights), reference.weighted_sum(sources, weights))
    queue.put((equal, {name for _ in range(20) for name in cpu._over_ranges(_thread_name, 1 << 20)}))


def _thread_name(begin: int, end: int) -> str:
    time.sleep(0.001)
    return threading.current_thread().name


def test_works_on_several_threads_in_a_forked_child_of_a_process_that_used_them(monkeypatch):
    monkeypatch.setattr(cpu, "thread_count", lambda: 3)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own OpenMP pool would not survive the fork; ours must
    try:
        run([numbers(BF16, 300_000, 0)], [1.0])
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_sum_in_child, args=(queue,))
        child.start()
        equal, threads = queue.get(timeout=60)
        child.join(60)
    finally:
        torch.set_num_threads(torch_threads)
    assert child.exitcode == 0
    assert equal
    assert len(threads) == 3


def test_concurrent_callers_do_not_disturb_each_other(monkeypatch):
    monkeypatch.setattr(cpu, "thread_count", lambda: 3)
    sources = [numbers(BF16, 200_000, seed) for seed in range(4)]
    mixes = [[0.1 * k, 0.2, 0.3, 0.5 - 0.1 * k] for k in range(8)]
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda weights: run(sources, weights), mixes * 4))
    for weights, result in zip(mixes * 4, results, strict=True):
        assert torch.equal(result, reference.weighted_sum(sources, weights))


def test_thread_count_obeys_affinity_and_openmp(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for value, expected in (("", 8), ("4", 4), ("4,2", 4), ("99", 8), ("0", 1), ("many", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert cpu.thread_count() == expected


IMPORTS = """
import sys
import mergemix_kernels
heavy = {"torch", "numba", "llvmlite", "triton", "numpy"} & set(sys.modules)
assert not heavy, heavy
import mergemix_kernels.cpu
assert not {"torch", "numba", "llvmlite", "triton"} & set(sys.modules)
"""

KEEPING = """
import resource, sys
from pathlib import Path
import numpy as np
from mergemix_kernels import cpu, cpu_native
place, numba_may_be_needed, limit = Path(sys.argv[1]), sys.argv[2] == "yes", int(sys.argv[3])
cpu_native._places = lambda: [place]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
out = np.empty(3, np.float32)
cpu.weighted_sum([np.ones(3, np.float32)], [2.0], out, "F32")
assert out.tolist() == [2.0] * 3
assert numba_may_be_needed or "numba" not in sys.modules
"""


def sum_in_a_process(place, *, compiles: bool, limit: int = 0) -> None:
    command = [sys.executable, "-c", KEEPING, str(place), "yes" if compiles else "no", str(limit)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


def test_machine_code_is_kept_and_needs_no_numba(tmp_path):
    sum_in_a_process(tmp_path, compiles=True)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    sum_in_a_process(tmp_path, compiles=False)
    for damaged in (whole[:-1], whole[:50], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        kept.write_bytes(damaged)
        sum_in_a_process(tmp_path, compiles=True)
        assert [path.name for path in tmp_path.iterdir()] == [kept.name]
        sum_in_a_process(tmp_path, compiles=False)


LOW_RANK = """
import sys
from pathlib import Path
import numpy as np
from mergemix_kernels import cpu, cpu_native
cpu_native._places = lambda: [Path(sys.argv[1])]
for dtype, one in (("BF16", 0x3F80), ("F16", 0x3C00), ("F32", 1.0)):
    for rows, columns, ranks in ((48, 16, 2), (8, 8, 3), (5, 1000, 1), (3, 32, 40), (70, 43, 9)):
        kind = cpu.numpy_dtype(dtype)
        base, out = np.full(rows * columns, one, kind), np.zeros(rows * columns, kind)
        zeros = np.zeros((rows, ranks), np.float32)
        addend = cpu.LowRank(zeros, np.ones((ranks, columns), np.float32), np.ones((1, ranks), np.float32), 0)
        assert cpu.WeightedSums([[1.0]], 1)([base], [out], dtype, low_rank=addend, threads=1)
        assert (out == base).all()
print("numba" in sys.modules)
"""


def test_low_rank_code_stands_alone(tmp_path):
    """In the process that compiles, what numba brings could be called; in the next one it is not there."""
    for compiles in ("True", "False"):
        command = [sys.executable, "-c", LOW_RANK, str(tmp_path)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert (finished.returncode, finished.stdout.strip()) == (0, compiles), finished.stderr


def test_code_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    cpu_native._key.cache_clear()
    before = cpu_native._key()
    for name in cpu_native.SOURCES:
        (tmp_path / name).write_bytes(Path(cpu_native.__file__).with_name(name).read_bytes())
    monkeypatch.setattr(cpu_native, "__file__", str(tmp_path / "cpu_native.py"))
    for name in cpu_native.SOURCES:
        cpu_native._key.cache_clear()
        assert cpu_native._key() == before
        with (tmp_path / name).open("a") as source:
            source.write("#")
        cpu_native._key.cache_clear()
        assert cpu_native._key() != before
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    cpu_native._key.cache_clear()


@pytest.mark.parametrize("limit", [1, 4000], ids=["no byte", "some bytes"])
def test_a_full_disk_does_not_fail_the_sum(limit, tmp_path):
    sum_in_a_process(tmp_path, compiles=True, limit=limit)
    assert not list(tmp_path.iterdir())


def test_nowhere_to_keep_machine_code(tmp_path):
    (tmp_path / "file").touch()
    sum_in_a_process(tmp_path / "file" / "folder", compiles=True)


def test_imports_are_light():
    finished = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
