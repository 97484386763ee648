"""Checkpoints that can be averaged: one optional base and K experts that agree tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

from mergemix.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    """base: None when no mixture needs it. experts: K >= 1, in the user's order."""

    base: Checkpoint | None
    experts: tuple[Checkpoint, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @property
    def template(self) -> Checkpoint:
        """Where config.json, the tokenizer and the shard layout come from: the base, else the first expert."""
        return self.base or self.experts[0]
