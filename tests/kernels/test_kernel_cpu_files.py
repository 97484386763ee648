"""Sums of sources that lie in files: the same bits as of arrays, and no answer where files do not have them at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix_kernels import cpu, cpu_tiles


@contextmanager
def opened(paths: list[Path]) -> Iterator[list[int]]:
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def written(directory: Path, sources: list[np.ndarray], begins: list[int]) -> list[Path]:
    paths = [directory / f"{k}.bin" for k in range(len(sources))]
    for path, source, begin in zip(paths, sources, begins, strict=True):
        path.write_bytes(b"x" * begin + source.tobytes() + b"x")
    return paths


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    count=st.integers(1, 5000),
    step=st.sampled_from([64, 4096, 1 << 18]),
    begins=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    outputs=st.integers(1, 3),
    data=st.data(),
)
def test_sums_of_files_are_those_of_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str, count: int, step: int, begins: list[int], outputs: int, data: st.DataObject,
) -> None:  # fmt: skip
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    kind = cpu.numpy_dtype(dtype)
    floats = rng.standard_normal((len(begins), count)).astype(np.float32)
    if dtype == "F32":
        sources = list(floats)
    elif dtype == "F16":
        sources = list(floats.astype(np.float16).view(np.uint16))
    else:
        sources = list((floats.view(np.uint32) >> 16).astype(np.uint16))
    if data.draw(st.booleans(), label="not finite"):
        sources[-1][rng.integers(count)] = {"F32": np.inf, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    weights = rng.random((outputs, len(begins))) + 0.1
    weights[:, 1:][rng.random((outputs, len(begins) - 1)) < 0.3] = 0.0
    sums = cpu.WeightedSums(weights.tolist(), len(begins))
    wanted, found = ([np.full(count, 7, kind) for _ in range(outputs)] for _ in range(2))
    finite = sums(sources, wanted, dtype)
    buffers = [np.empty(step, np.uint8) for _ in begins]
    paths = written(tmp_path_factory.mktemp("files"), sources, begins)
    with pytest.MonkeyPatch.context() as patch, opened(paths) as descriptors:
        patch.setattr(cpu_tiles, "STEP_BYTES", step)
        assert sums.of_cached_files(descriptors, begins, buffers, found, dtype) == finite
    for one, other in zip(wanted, found, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("trouble", ["short", "cold", "closed", "another system"])
def test_what_is_not_at_hand_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    sources = [np.ones(1 << 20, np.float32)] * 2
    paths = written(tmp_path, sources, [0, 0])
    out, buffers = np.empty(1 << 20, np.float32), [np.empty(cpu_tiles.STEP_BYTES, np.uint8)] * 2
    sums = cpu.WeightedSums([[0.5, 0.5]], 2)
    with opened(paths) as descriptors:
        assert sums.of_cached_files(descriptors, [0, 0], buffers, [out], "F32") is True
        positions = [0, 0]
        if trouble == "short":
            positions[1] = 2
        if trouble == "cold":
            os.fsync(descriptors[1])
            os.posix_fadvise(descriptors[1], 0, 0, os.POSIX_FADV_DONTNEED)
        if trouble == "closed":
            descriptors = [descriptors[0], 1 << 20]
        if trouble == "another system":
            monkeypatch.setattr(cpu, "_preadv2", lambda: None)
        assert sums.of_cached_files(descriptors, positions, buffers, [out], "F32") is None
