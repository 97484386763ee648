"""The demo's numbers: how much is written, how large the models are, how long they train."""

from __future__ import annotations

from dataclasses import dataclass, field

# What the base has read, and what fills half of every expert's batches: a crawl, with its share of spam.
GENERAL = {"math": 0.2, "code": 0.2, "facts": 0.3, "language": 0.2, "spam": 0.1}


@dataclass(frozen=True)
class Shape:
    """The tiny Llama: grouped-query attention, gated MLP, tied embeddings."""

    layers: int = 3
    hidden: int = 128
    intermediate: int = 256
    heads: int = 4
    kv_heads: int = 2
    max_length: int = 256


@dataclass(frozen=True)
class Horizon:
    """How long and how fast to train.

    batch: sequences a step. learning_rate: constant, but for a linear rise over the first `warmup` steps
    and, where final_learning_rate is given, a linear fall to it over the second half.
    """

    steps: int
    batch: int
    learning_rate: float
    final_learning_rate: float | None = None
    warmup: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1 ... steps - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.final_learning_rate is None:
            return self.learning_rate
        fallen = max(0.0, 2 * (step + 1) / self.steps - 1)
        return self.learning_rate + fallen * (self.final_learning_rate - self.learning_rate)


@dataclass(frozen=True)
class Settings:
    """How large everything is.

    documents: of each domain. items: of each benchmark, and as many for the test (of facts, at most half of
    those known). people: of whom three facts each are known. length: tokens of a training sequence.
    general_share: the part of every expert's batches that is general data; component models that keep about
    half merge better (DeMix, arXiv 2602.00747).
    """

    seed: int = 0
    documents: int = 30_000
    items: int = 300
    people: int = 120
    shape: Shape = field(default_factory=Shape)
    length: int = 64
    base: Horizon = Horizon(steps=680, batch=32, learning_rate=2e-3, final_learning_rate=2e-4, warmup=50)
    expert: Horizon = Horizon(steps=80, batch=32, learning_rate=2e-4)
    general_share: float = 0.5
    threads: int = (
        1  # matrices this small gain nothing from more, and threads that share a core wait for each other
    )

    @classmethod
    def quick(cls, seed: int) -> Settings:
        """Seconds instead of minutes: the way is the same, the result is not worth reading."""
        return cls(
            seed,
            documents=2000,
            items=24,
            people=20,
            shape=Shape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=1),
            base=Horizon(steps=60, batch=16, learning_rate=3e-3, final_learning_rate=4e-4, warmup=10),
            expert=Horizon(steps=20, batch=16, learning_rate=1e-3),
        )
