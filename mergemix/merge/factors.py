"""The low-rank factors of adapters, as the CPU kernel takes them: widened to fp32, all adapters' ranks side by side."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mergemix.checkpoints.adapter import LowRankDelta
from mergemix.checkpoints.header import TensorInfo
from mergemix.checkpoints.ranges import OpenFiles
from mergemix.merge.convert import widen
from mergemix.merge.plan import TensorTask
from mergemix_kernels import cpu


class FactorCache:
    """Factors of the tensors in progress, shared by the workers: each keeps those of its latest tensor alive."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._latest = threading.local()
        self._loaded: weakref.WeakValueDictionary[str, _Factors] = weakref.WeakValueDictionary()

    def load(self, task: TensorTask, first: int, count: Callable[[int], None]) -> cpu.LowRank:
        """The factors of a tensor, for elements from `first` on. count: told the bytes read.

        Raises CheckpointError when an adapter's file cannot be read.
        """
        self._latest.factors = None  # before others are loaded: memory is bounded by one tensor per worker
        with self._lock:
            factors = self._loaded.get(task.name)
            if factors is None:
                factors = self._loaded[task.name] = _Factors(self._load(task, count))
        self._latest.factors = factors
        return replace(factors.low_rank, first=first)

    def _load(self, task: TensorTask, count: Callable[[int], None]) -> cpu.LowRank:
        rows, columns = task.shape
        rank = sum(term.delta.rank for term in task.low_rank)
        left, right = np.empty((rows, rank), np.float32), np.empty((rank, columns), np.float32)
        scales = np.empty((len(task.coefficients), rank), np.float32)
        begin = 0
        for term in task.low_rank:
            part = slice(begin, begin + term.delta.rank)
            for factor, target in _places(term.delta, left[:, part], right[part]):
                widen(self._read(factor), factor.dtype, target)
                count(factor.nbytes)
            scales[:, part] = np.asarray(term.scales, np.float32)[:, None]
            begin = part.stop
        return cpu.LowRank(left, right, scales, 0)

    def _read(self, factor: TensorInfo) -> np.ndarray:
        data = np.empty(factor.nbytes, np.uint8)
        self._files.read_into(factor, 0, data.data)
        return data


class _Factors:
    """What a weak reference can hold."""

    def __init__(self, low_rank: cpu.LowRank) -> None:
        self.low_rank = low_rank


def _places(
    delta: LowRankDelta, left: np.ndarray, right: np.ndarray
) -> tuple[tuple[TensorInfo, np.ndarray], tuple[TensorInfo, np.ndarray]]:
    """Each factor with the view, of its own shape, that it fills."""
    if delta.transposed:
        return (delta.down, left.T), (delta.up, right.T)
    return (delta.up, left), (delta.down, right)
