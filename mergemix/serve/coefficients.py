"""From a mixture to one fp32 coefficient per operand. Needs no torch."""

from __future__ import annotations

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture


def operands(family: Family) -> tuple[Checkpoint, ...]:
    """Who is summed, in the order of summation: the base where there is one, then the experts.

    Raises ConfigError for an expert that is a LoRA adapter.
    """
    whole = tuple(member for member in family.members if isinstance(member, Checkpoint))
    if len(whole) < len(family.members):
        adapter = next(each for each in family.experts if not isinstance(each, Checkpoint))
        base = "BASE" if family.base is None else family.base.source
        raise ConfigError(
            f"LoRA adapters cannot be served live yet, and {adapter.name} ({adapter.source}) is one: write each such "
            f"expert with `mergemix merge --base {base} --experts {adapter.name}={adapter.source} "
            f"--weights {adapter.name}=1 --out DIR` and give DIR"
        )
    return whole


def coefficients(family: Family, mixture: Mixture) -> list[float]:
    """The fp32 coefficient of each of `operands(family)`; 0.0: it is not read.

    Raises ConfigError when the mixture is not over the family's experts, or needs a base that is not there.
    """
    return family.coefficients(mixture)
