"""Surrogates by name."""

from __future__ import annotations

from mergemix.errors import ConfigError
from mergemix.search.surrogates.auto import MEMBERS, Stack
from mergemix.search.surrogates.base import Surrogate
from mergemix.search.surrogates.trees import LightGBM

_MODELS: tuple[type[Surrogate], ...] = (LightGBM, *MEMBERS)
SURROGATES: dict[str, type[Surrogate]] = {model.name: model for model in _MODELS}
AUTO = "auto"


def open_surrogate(name: str) -> Surrogate:
    """The surrogate of that name, not fitted. Raises ConfigError when there is none."""
    if name not in (*SURROGATES, AUTO):
        raise ConfigError(f"the surrogate must be one of {', '.join((AUTO, *SURROGATES))}, but is {name!r}")
    if name == AUTO:
        return Stack()
    return SURROGATES[name]()
