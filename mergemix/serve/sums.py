"""Weighted sums of checkpoint tensors into parameters, by the device that these live on."""

from __future__ import annotations

import torch

from mergemix.serve.copies import Copy, Numbers
from mergemix.serve.cpu_sums import CpuSums, Sum
from mergemix.serve.gpu_sums import GpuSums
from mergemix.serve.view_reader import ViewReader
from mergemix_kernels.pinned import CudaLanes, Ring


class Sums:
    """The ways to write a destination; all of them share the open files and the threads.

    family_bytes: of all operands together.
    """

    def __init__(self, family_bytes: int) -> None:
        self.reader = ViewReader(family_bytes)
        self.cpu = CpuSums(self.reader)
        self._gpus: dict[torch.device, GpuSums] = {}

    def gpu(self, device: torch.device) -> GpuSums | None:
        """None for the host. All sums into one GPU share a ring, which stays."""
        if device not in self._gpus and (ring := self.ring(device)) is not None:
            self._gpus[device] = GpuSums(self.reader, self.cpu, ring)
        return self._gpus.get(device)

    def ring(self, device: torch.device) -> Ring | None:
        return None if device.type == "cpu" else Ring(CudaLanes(device))

    def write_once(self, copy: Copy, numbers: Numbers) -> bool:
        """Write one destination from the files, for a load; whether all that was written is finite."""
        gpu = self.gpu(copy.destination.device)
        if gpu is None:
            finite = self.cpu.write([Sum(copy, numbers, {})], check=True)
            return finite and (copy.is_direct or not copy.is_floating or is_finite(copy.destination))
        gpu.write_once(copy, numbers)
        return not copy.is_floating or is_finite(copy.destination)

    def is_finite(self, copy: Copy, operand: int) -> bool:
        return self.cpu.is_finite(copy, operand)

    def close(self) -> None:
        self._gpus.clear()  # launches that are kept ready hold the memory of the cache
        self.reader.close()


def is_finite(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
