"""Who is to blame for NaN or Inf in a result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergemix.checkpoints.ranges import read_range
from mergemix.errors import NonFiniteError
from mergemix.merge.plan import LowRankTerm, MergePlan, TensorTask
from mergemix_kernels import cpu


def non_finite_error(
    plan: MergePlan, task: TensorTask, sources: Sequence[np.ndarray], outs: Sequence[np.ndarray]
) -> NonFiniteError:
    """The error for outputs (uint8, one piece of each) that are not finite, given the operands' same piece.

    An operand that an output does not use cannot be its fault.
    """
    kind = cpu.numpy_dtype(task.dtype)
    bad = [p for p, out in enumerate(outs) if not cpu.all_finite(out.view(kind), task.dtype)]
    used = {k for p in bad for k, weight in enumerate(task.coefficients[p]) if weight != 0.0}
    holders = [
        f"{plan.members[task.members[k]]} ({task.operands[k].path})"
        for k, source in enumerate(sources)
        if k in used and not cpu.all_finite(source.view(kind), task.dtype)
    ]
    holders += [
        f"{plan.members[term.member]} ({term.delta.down.path})"
        for term in task.low_rank
        if any(term.scales[p] != 0.0 for p in bad) and not _finite_factors(term)
    ]
    if holders:
        return NonFiniteError(f"tensor {task.name!r} holds NaN or Inf in {', '.join(holders)}")
    coefficients = task.coefficients[bad[0]]
    weights = [
        *(f"{plan.members[m]} {c:g}" for m, c in zip(task.members, coefficients, strict=True) if c != 0.0),
        *(f"{plan.members[t.member]} {t.scales[bad[0]]:g}" for t in task.low_rank if t.scales[bad[0]] != 0.0),
    ]
    return NonFiniteError(
        f"tensor {task.name!r}: the weighted sum is beyond the range of {task.dtype}, though all of its "
        f"inputs are finite; use smaller weights than {', '.join(weights)}"
    )


def _finite_factors(term: LowRankTerm) -> bool:
    return all(
        cpu.all_finite(
            np.frombuffer(read_range(factor, 0, factor.nbytes), cpu.numpy_dtype(factor.dtype)), factor.dtype
        )
        for factor in (term.delta.down, term.delta.up)
    )
