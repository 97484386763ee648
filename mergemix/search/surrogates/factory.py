"""Surrogates by name."""

from __future__ import annotations

from mergemix.errors import ConfigError
from mergemix.search.surrogates.base import Surrogate
from mergemix.search.surrogates.gp import GaussianProcess
from mergemix.search.surrogates.loglinear import LogLinear
from mergemix.search.surrogates.scheffe import Scheffe
from mergemix.search.surrogates.trees import LightGBM

SURROGATES: dict[str, type[Surrogate]] = {
    model.name: model for model in (LightGBM, GaussianProcess, LogLinear, Scheffe)
}
AUTO = "auto"


def open_surrogate(name: str) -> Surrogate:
    """The surrogate of that name, not fitted. Raises ConfigError when there is none."""
    if name not in (*SURROGATES, AUTO):
        raise ConfigError(f"the surrogate must be one of {', '.join((AUTO, *SURROGATES))}, but is {name!r}")
    if name == AUTO:
        return GaussianProcess()
    return SURROGATES[name]()
