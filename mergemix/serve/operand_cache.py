"""The delta cache of one rank: operands packed per destination, cut for this rank, in device and host memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from mergemix.merge.delta_cache import Layout, Segment, Tier, aligned, assign_tiers, remove_stale
from mergemix.serve.copies import Copy, memory_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheSizes:
    """Bytes that one rank may keep of operands. On a CPU engine `device` is memory of this process alone."""

    device: int = 0
    host: int = 0


class OperandCache:
    """Slots of operands, empty at first.

    copies: those of a plan that a swap can write, in plan order. contents: names what the checkpoints hold (see
    Segment). tiers: of each copy; only one on `device` may be in device memory. filled: bool (copies, operands), by
    the first operand with the same contents; True once a slot holds its operand. assigned: bytes by tier.
    """

    def __init__(
        self, copies: Sequence[Copy], sizes: CacheSizes, device: torch.device, contents: Sequence[str]
    ) -> None:
        """Take the memory. Raises ConfigError where shared memory is not to be had."""
        operands = len(copies[0].origin.classes) if copies else 0
        self._copies = copies
        self.tiers = _tiers(copies, sizes, device)
        self.filled = np.zeros((len(copies), operands), bool)
        self.assigned = {tier: self._bytes_in(tier) for tier in ("device", "host", "disk")}
        self._slots: dict[tuple[int, int], torch.Tensor] = {}
        self._device = torch.empty(self.assigned["device"], dtype=torch.uint8, device=device)
        self._place("device", self._device)
        self._rows = np.array([i for i, tier in enumerate(self.tiers) if tier == "host"], np.int64)
        self._segment: Segment | None = None
        self._pinned = 0
        if sizes.host > 0:
            remove_stale()
        if len(self._rows):
            self._segment = Segment(
                self._digest(contents), Layout(len(self._rows) * operands, self.assigned["host"])
            )
            self._shared = self._segment.flags.reshape(len(self._rows), operands)
            memory = torch.from_numpy(self._segment.data)
            if device.type == "cuda":
                self._pinned = _pin(memory, device)
            self._place("host", memory)

    def slot(self, copy: int, operand: int) -> torch.Tensor | None:
        """Where an operand of a copy is kept, in the shape of its destination; None on disk."""
        return self._slots.get((copy, self._copies[copy].origin.classes[operand]))

    def refresh(self) -> None:
        """See what other processes have filled."""
        if self._segment is not None:
            self.filled[self._rows] |= self._shared != 0

    def mark_filled(self, slots: np.ndarray) -> None:
        """slots: bool (copies, operands), of those whose bytes are there now."""
        self.filled |= slots
        if self._segment is not None:
            self._shared[slots[self._rows]] = 1

    def close(self) -> None:
        """Free the memory; safe to call twice. No slot may be used any more."""
        self._slots.clear()
        self._device = self._device.new_empty(0)
        self.filled[:] = False
        if self._segment is not None:
            if self._pinned:
                torch.cuda.cudart().cudaHostUnregister(self._pinned)
            del self._shared
            self._segment.close()
            self._segment = None

    def _bytes_in(self, tier: Tier) -> int:
        return sum(_slot_bytes(copy) for copy, of in zip(self._copies, self.tiers, strict=True) if of == tier)

    def _place(self, tier: Tier, memory: torch.Tensor) -> None:
        """Lay the slots of a tier side by side, in plan order."""
        begin = 0
        for i, copy in enumerate(self._copies):
            if self.tiers[i] != tier:
                continue
            for k in sorted(set(copy.origin.classes)):
                flat = memory[begin : begin + copy.operand_bytes].view(copy.view.dtype)
                self._slots[i, k] = copy.packed(flat)
                begin += aligned(copy.operand_bytes)

    def _digest(self, contents: Sequence[str]) -> str:
        """Names what the host's slots hold: of which checkpoints, which elements, in which order."""
        digest = hashlib.sha256(json.dumps(list(contents)).encode())
        for i in self._rows:
            copy = self._copies[i]
            view = copy.view
            order = memory_order(copy.destination)
            cut = [view.storage_offset(), [view.shape[d] for d in order], [view.stride(d) for d in order]]
            digest.update(json.dumps([copy.origin.name, str(view.dtype), copy.origin.classes, cut]).encode())
        return digest.hexdigest()


def _slot_bytes(copy: Copy) -> int:
    return len(set(copy.origin.classes)) * aligned(copy.operand_bytes)


def _tiers(copies: Sequence[Copy], sizes: CacheSizes, device: torch.device) -> list[Tier]:
    """As `assign_tiers`; what is not averaged, or is on another device, stays on disk."""
    chosen = [i for i, c in enumerate(copies) if c.is_floating and c.destination.device == device]
    tiers: list[Tier] = ["disk"] * len(copies)
    for i, tier in zip(
        chosen, assign_tiers([_slot_bytes(copies[i]) for i in chosen], sizes.device, sizes.host), strict=True
    ):
        tiers[i] = tier
    return tiers


def _pin(memory: torch.Tensor, device: torch.device) -> int:
    """Let the GPU copy from the memory by itself; its address, or 0 where the system does not allow it."""
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error):
        with suppress(RuntimeError):  # CUDA would blame the failure on the next kernel: let that be this one
            torch.ones(1, device=device)
        log.warning(
            "the host cache cannot be pinned (CUDA error %d), so that swaps from it are slower", int(error)
        )
        return 0
    return memory.data_ptr()
