"""What a merge reads, computes and writes, tensor by tensor: decided before any tensor byte is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergemix.checkpoints.checkpoint import FLOATING, Checkpoint, TensorInfo
from mergemix.checkpoints.family import Family
from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix_kernels.weights import MAX_SOURCES


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One tensor of the result. operands: where to read, and the fp32 coefficient, in the order of summation.

    action: "sum" computes; "copy" takes the bytes of the only operand.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    operands: tuple[tuple[TensorInfo, float], ...]
    action: Literal["sum", "copy"]


@dataclass(frozen=True)
class MergePlan:
    """tasks: in the template's order. operand_names: whose tensors are read ("base" or the expert's name).

    bytes_read: of tensors; a tensor whose operands are equal up to some point costs up to one operand more.
    bytes_written: of tensors.
    """

    tasks: tuple[TensorTask, ...]
    operand_names: tuple[str, ...]
    bytes_read: int
    bytes_written: int


def plan_merge(family: Family, mixture: Mixture) -> MergePlan:
    """merged = (1 - sum a_k) base + sum a_k expert_k, over the operands whose fp32 coefficient is not zero.

    Tensors that are not floating point are copied from the first operand.
    Raises ConfigError when the mixture is not over the family's experts, needs a base that is not there,
    has a coefficient beyond fp32, or reads more operands than the kernels take.
    """
    operands = _operands(family, mixture)
    tasks = tuple(_task(tensor, operands) for tensor in family.template.tensors.values())
    return MergePlan(
        tasks=tasks,
        operand_names=tuple(checkpoint.name for checkpoint, _ in operands),
        bytes_read=sum(task.nbytes * len(task.operands) for task in tasks),
        bytes_written=sum(task.nbytes for task in tasks),
    )


def _operands(family: Family, mixture: Mixture) -> list[tuple[Checkpoint, float]]:
    """The checkpoints that are read, each with its fp32 coefficient."""
    members = zip(family.members, family.coefficients(mixture), strict=True)
    operands = [(checkpoint, coefficient) for checkpoint, coefficient in members if coefficient != 0.0]
    if len(operands) > MAX_SOURCES:
        raise ConfigError(f"at most {MAX_SOURCES} checkpoints can be merged at once, not {len(operands)}")
    return operands


def _task(template: TensorInfo, operands: list[tuple[Checkpoint, float]]) -> TensorTask:
    read = tuple((checkpoint.tensors[template.name], coefficient) for checkpoint, coefficient in operands)
    summed = template.dtype in FLOATING and len(read) > 1  # a single operand has all of the weight
    return TensorTask(
        name=template.name,
        dtype=template.dtype,
        shape=template.shape,
        nbytes=template.nbytes,
        operands=read if summed else read[:1],
        action="sum" if summed else "copy",
    )
