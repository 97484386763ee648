"""From a mixture to one fp32 coefficient per operand. Needs no torch."""

from __future__ import annotations

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.mixture import Mixture


def operands(family: Family) -> tuple[Checkpoint, ...]:
    """Who is summed, in the order of summation: the base where there is one, then the experts."""
    return family.members


def coefficients(family: Family, mixture: Mixture) -> list[float]:
    """The fp32 coefficient of each of `operands(family)`; 0.0: it is not read.

    Raises ConfigError when the mixture is not over the family's experts, or needs a base that is not there.
    """
    return family.coefficients(mixture)
