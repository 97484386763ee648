"""Training: experts, or one model on a mixture, from a base checkpoint and corpora."""

from typing import TYPE_CHECKING

from mergemix.train.config import TrainConfig, expert_configs
from mergemix.train.observer import Observer, StepProgress

__all__ = ["Observer", "StepProgress", "TrainConfig", "expert_configs", "train", "train_family"]

if TYPE_CHECKING:
    from mergemix.train.family import train_family
    from mergemix.train.run import train


def __getattr__(name: str) -> object:
    """`train` and `train_family` import torch, which reading a configuration does not need."""
    if name == "train":
        from mergemix.train.run import train

        return train
    if name == "train_family":
        from mergemix.train.family import train_family

        return train_family
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
