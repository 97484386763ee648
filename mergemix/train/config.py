"""What a training is asked to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture

# AdamW as in the paper (arXiv 2601.17858); the norm of the gradient is bounded as is usual beside it.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of matrices: biases and the scales of norms are not pulled towards zero
MAX_GRADIENT_NORM = 1.0
MAX_WARMUP = 100  # steps; or a tenth of a shorter training


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One model to be trained. Raises ConfigError when values cannot go together."""

    base: str
    """Directory or Hub id of the checkpoint to start from; the output has its tensors, types and tokenizer."""
    data: Mapping[str, Path]
    """Domain -> JSON Lines file of {"text": ...}, or of {"prompt": ..., "answer": ...}, trained on the answers."""
    mixture: Mapping[str, float]
    """Domain -> share of the tokens; normalised."""
    out: Path
    """New directory for the trained checkpoint."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole steps; None: as many as there are before a domain repeats."""
    sequence_length: int | None = None
    """Tokens of a sequence; None: as many as the model takes, at most 2048."""
    batch: int = 32
    """Sequences of one step, all processes together."""
    learning_rate: float = 3e-4
    """Constant after the warm-up."""
    warmup: int | None = None
    """Steps over which the learning rate rises from zero; None: a tenth of all, at most 100."""
    average_last: int = 1
    """Steps whose weights the result is the mean of: the last ones; 1: it is the last one's weights."""
    general: Mapping[str, float] = field(default_factory=dict)
    """Mixture of the general data: the same sequences at the same places, whatever `mixture` is."""
    general_share: float = 0.0
    """Share of all tokens that is general data."""
    seed: int = 0
    save_every: int = 500
    """Steps between two checkpoints to resume from."""
    max_epochs: float = 4.0
    """How often the tokens of a domain may be repeated."""
    micro_batch: int | None = None
    """Sequences that one process computes at a time; None: all of its share of a batch."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("a training needs data; give --data NAME=FILE.jsonl")
        for key, least in (("tokens", 1), ("sequence_length", 2), ("batch", 1), ("warmup", 0), ("save_every", 1),
                           ("micro_batch", 1), ("average_last", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key} must be at least {least}, but is {value}")
        for key in ("learning_rate", "max_epochs"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"{key} must be a positive number, but is {getattr(self, key)}")
        if not 0 <= self.general_share < 1:
            raise ConfigError(
                f"general_share must be at least 0 and below 1 of the tokens, but is {self.general_share}"
            )
        if bool(self.general) != bool(self.general_share):
            raise ConfigError("general data needs both its mixture (general) and its share (general_share)")
        self.own_shares()
        self.general_shares()

    def own_shares(self) -> dict[str, float]:
        """Domains with a share in the mixture, by name, so that no order of options matters; they sum to 1."""
        return _shares(self.mixture, sorted(self.data), "mixture")

    def general_shares(self) -> dict[str, float]:
        """The same of the general data; empty without any."""
        return _shares(self.general, sorted(self.data), "general") if self.general else {}


def expert_configs(
    *, out: Path, data: Mapping[str, Path], domains: Iterable[str] | None = None, **settings: Any
) -> dict[str, TrainConfig]:
    """A configuration per expert, OUT/<domain>, of each of `domains` (all of `data` when None).

    Raises ConfigError without `tokens`: corpora differ in size, and experts that were trained for different times
    cannot stand for shares of one training.
    """
    if settings.get("tokens") is None:
        raise ConfigError(
            "experts of a family must be trained on equally many tokens; give their number (--tokens)"
        )
    names = list(data) if domains is None else list(domains)
    for name in names:
        if name in (".", "..") or "/" in name:
            raise ConfigError(f"an expert's directory is called after its domain, which cannot be {name!r}")
    return {n: TrainConfig(out=out / n, data=data, mixture={n: 1.0}, **settings) for n in names}


def _shares(given: Mapping[str, float], domains: list[str], what: str) -> dict[str, float]:
    unknown = sorted(set(given) - set(domains))
    if unknown:
        raise ConfigError(
            f"{what}: there is no data of {', '.join(map(repr, unknown))}; the domains are {', '.join(domains)}"
        )
    shares = Mixture.of(domains, given).as_dict()
    return {domain: share for domain, share in shares.items() if share}
