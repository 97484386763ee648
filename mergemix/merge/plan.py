"""What a merge reads, computes and writes, tensor by tensor: decided before any tensor byte is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergemix.checkpoints.adapter import LowRankDelta
from mergemix.checkpoints.checkpoint import FLOATING
from mergemix.checkpoints.family import Family
from mergemix.checkpoints.header import TensorInfo
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix_kernels.weights import MAX_SOURCES

Coefficients = tuple[tuple[float, ...], ...]  # [P][K] in fp32; 0.0: this output does not use that operand


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """The share of one adapter in a tensor: scales[p] * up @ down is added to output p (0.0: it is absent)."""

    member: int
    delta: LowRankDelta
    scales: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor of the result, of which each of P outputs has its own.

    operands: K tensors that at least one output reads, in the order of summation; members: whose they are, as
    positions in MergePlan.members. is_copy: every output takes the bytes of its one operand.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    members: tuple[int, ...]
    operands: tuple[TensorInfo, ...]
    coefficients: Coefficients
    low_rank: tuple[LowRankTerm, ...]
    is_copy: bool

    @property
    def factor_bytes(self) -> int:
        """Memory for the low-rank factors of all adapters, widened to fp32."""
        rank = sum(term.delta.rank for term in self.low_rank)
        return 4 * rank * sum(self.shape) if rank else 0


@dataclass(frozen=True)
class MergePlan:
    """tasks: in the template's order. members: the names of the family's members, "base" and the experts'.

    dense_members: positions in members of those that are read as whole tensors somewhere. bytes_read: of tensors and
    low-rank factors, each once. bytes_written: of the tensors of all outputs.
    """

    tasks: tuple[TensorTask, ...]
    members: tuple[str, ...]
    dense_members: tuple[int, ...]
    num_outputs: int
    bytes_read: int
    bytes_written: int

    @property
    def operand_names(self) -> tuple[str, ...]:
        """Whose tensors are read, in the order of summation."""
        low_rank = {term.member for task in self.tasks for term in task.low_rank}
        return tuple(self.members[member] for member in sorted({*self.dense_members, *low_rank}))


def plan_merge(family: Family, mixtures: Sequence[Mixture]) -> MergePlan:
    """One output per mixture: (1 - sum a_k) base + sum a_k expert_k, from one read of all that they use.

    Tensors that are not floating point are copied from the first operand. A tensor that an adapter changes gets its
    low-rank product added, and the adapter's share of the base.
    Raises ConfigError when a mixture is not over the family's experts, needs a base that is not there, has a
    coefficient beyond fp32 or a layer group that holds no tensor, or when more operands are read than the kernels take.
    """
    for mixture in mixtures:
        family.check_groups(mixture)
    # Equal coefficients become one object: by that a merge knows which tensors it may sum together.
    cache: dict[Coefficients, Coefficients] = {}
    tasks = tuple(_task(family, template, mixtures, cache) for template in family.template.tensors.values())
    dense = sorted({member for task in tasks for member in task.members})
    used = sorted({*dense, *(term.member for task in tasks for term in task.low_rank)})
    if len(used) > MAX_SOURCES:
        raise ConfigError(f"at most {MAX_SOURCES} checkpoints can be merged at once, not {len(used)}")
    return MergePlan(
        tasks=tasks,
        members=tuple(member.name for member in family.members),
        dense_members=tuple(dense),
        num_outputs=len(mixtures),
        bytes_read=sum(_bytes_read(task) for task in tasks),
        bytes_written=len(mixtures) * sum(task.nbytes for task in tasks),
    )


def _task(
    family: Family, template: TensorInfo, mixtures: Sequence[Mixture], cache: dict[Coefficients, Coefficients]
) -> TensorTask:
    """The union of what the outputs read of one tensor, and each one's coefficients."""
    dense: dict[int, TensorInfo] = {}
    deltas: dict[int, LowRankDelta] = {}
    weights: list[dict[int, float]] = []
    scales: list[dict[int, float]] = []
    for mixture in mixtures:
        terms = family.terms(template.name, mixture)
        operands = list(terms.dense)
        if template.dtype not in FLOATING:
            operands = [(*operands[0][:2], 1.0)]
        dense.update({member: tensor for member, tensor, _ in operands})
        deltas.update({member: delta for member, delta, _ in terms.low_rank})
        weights.append({member: coefficient for member, _, coefficient in operands})
        scales.append({member: scale for member, _, scale in terms.low_rank})
    members = tuple(sorted(dense))
    coefficients = tuple(tuple(weight.get(member, 0.0) for member in members) for weight in weights)
    low_rank = tuple(
        LowRankTerm(member, deltas[member], tuple(scale.get(member, 0.0) for scale in scales))
        for member in sorted(deltas)
    )
    return TensorTask(
        name=template.name,
        dtype=template.dtype,
        shape=template.shape,
        nbytes=template.nbytes,
        members=members,
        operands=tuple(dense[member] for member in members),
        coefficients=cache.setdefault(coefficients, coefficients),
        low_rank=low_rank,
        is_copy=not low_rank and all(len(weight) == 1 for weight in weights),
    )


def _bytes_read(task: TensorTask) -> int:
    factors = sum(term.delta.down.nbytes + term.delta.up.nbytes for term in task.low_rank)
    return sum(tensor.nbytes for tensor in task.operands) + factors
