"""Weighted sums of checkpoint tensors into parameters, by the device that these live on."""

from __future__ import annotations

import torch

from mergemix.serve.copies import Copy
from mergemix.serve.cpu_sums import CpuSums, Sum
from mergemix.serve.gpu_sums import GpuSums
from mergemix.serve.view_reader import ViewReader


class Sums:
    """The ways to write a destination; all of them share the open files and the threads.

    family_bytes: of all operands together.
    """

    def __init__(self, family_bytes: int) -> None:
        self.reader = ViewReader(family_bytes)
        self.cpu = CpuSums(self.reader)
        self._gpus: dict[torch.device, GpuSums] = {}

    def gpu(self, device: torch.device) -> GpuSums:
        """All sums into one GPU share a ring, which stays: vLLM counts it when it measures free memory."""
        if device not in self._gpus:
            self._gpus[device] = GpuSums.on(device, self.reader, self.cpu)
        return self._gpus[device]

    def write_once(self, copy: Copy, weights: tuple[float, ...]) -> bool:
        """Write one destination from the files, for a load; whether all that was written is finite."""
        device = copy.destination.device
        if device.type == "cpu":
            finite = self.cpu.write([Sum(copy, weights, {})], check=True)
            return finite and (copy.is_direct or not copy.is_floating or is_finite(copy.destination))
        self.gpu(device).write_once(copy, weights)
        return not copy.is_floating or is_finite(copy.destination)

    def is_finite(self, copy: Copy, operand: int) -> bool:
        return self.cpu.is_finite(copy, operand)

    def close(self) -> None:
        self.reader.close()


def is_finite(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
