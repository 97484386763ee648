"""From a mixture to one fp32 coefficient per operand. Needs no torch."""

from __future__ import annotations

import numpy as np

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture


def operands(family: Family) -> tuple[Checkpoint, ...]:
    """Who is summed, in the order of summation: the base where there is one, then the experts."""
    return (*([family.base] if family.base else []), *family.experts)


def coefficients(family: Family, mixture: Mixture) -> list[float]:
    """The fp32 coefficient of each of `operands(family)`; 0.0: it is not read.

    Raises ConfigError when the mixture is not over the family's experts, or needs a base that is not there.
    """
    if mixture.names != family.names:
        raise ConfigError(
            f"the mixture is over {', '.join(mixture.names)}, but the experts are {', '.join(family.names)}"
        )
    if family.base is None and mixture.base_weight != 0.0:
        raise ConfigError(
            f"the weights sum to {1 - mixture.base_weight:g}, not 1, so the base has a share of "
            f"{mixture.base_weight:g}: give --base, or weights that sum to 1"
        )
    given = [*([mixture.base_weight] if family.base else []), *mixture.weights]
    with np.errstate(over="ignore", under="ignore"):
        rounded = [float(np.float32(coefficient)) for coefficient in given]
    if not np.isfinite(rounded).all() or not any(rounded):
        raise ConfigError(f"weights must be within the range of fp32, but are {mixture.as_dict()}")
    return rounded
