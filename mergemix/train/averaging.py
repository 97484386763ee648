"""The mean of the weights after the last steps, in place of a learning rate that decays (arXiv 2601.17858, WSM)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mergemix.errors import ConfigError


class WeightMean:
    """A running mean in fp32 of what this process holds of a model's parameters.

    steps: of how many of the last steps; with 1 nothing is held, and the result is the model as it is.
    """

    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        self.steps = steps
        self._model = model
        self._count = 0
        # Before the first step: memory that does not suffice is then found at once.
        self._means = (
            [torch.zeros_like(each, dtype=torch.float32) for each in self._parameters()] if steps > 1 else []
        )

    @torch.no_grad()
    def add(self, left: int) -> None:
        """After a step: its weights belong to the mean when at most `steps` - 1 steps are `left`."""
        if self.steps == 1 or left >= self.steps:
            return
        self._count += 1
        torch._foreach_lerp_(self._means, self._parameters(), 1 / self._count)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the mean; after it, its own weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, directory: Path, accelerator: Any) -> None:
        """Into a checkpoint: once where every process holds the whole model, else every process's part."""
        rank, processes = _part(accelerator)
        if self._count and rank is not None:
            held = {"count": self._count, "processes": processes, "means": self._means}
            torch.save(held, directory / f"mean-{rank}.pt")

    def load(self, directory: Path, accelerator: Any) -> None:
        """What `save` wrote. Raises ConfigError when another number of processes did."""
        rank, processes = _part(accelerator)
        if not any(directory.glob("mean-*.pt")):
            return
        path = directory / f"mean-{rank or 0}.pt"
        held = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
        if held.get("processes") != processes:
            raise ConfigError(
                f"{directory} was stored by another number of processes than {processes}, which each hold a part of "
                "the model: start as many as then"
            )
        self._count = held["count"]
        for mean, stored in zip(self._means, held["means"], strict=True):
            mean.copy_(stored)

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._count:
            return
        for mean, parameter in zip(self._means, self._parameters(), strict=True):
            own = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(own)

    def _parameters(self) -> list[torch.Tensor]:
        """Asked for anew each time: FSDP may exchange them."""
        return [
            (each.to_local() if hasattr(each, "to_local") else each).detach()
            for each in self._model.parameters()
        ]


def _part(accelerator: Any) -> tuple[int | None, int]:
    """(number of this process's file or None, of files)."""
    from accelerate.utils import DistributedType

    if accelerator.distributed_type == DistributedType.FSDP:
        return accelerator.process_index, accelerator.num_processes
    return (0 if accelerator.is_main_process else None), 1
