"""Small families on disk, and what their merge must be, from the kernels' torch reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mergemix.checkpoints.family import Family, open_family
from mergemix.merge.plan import MergePlan
from mergemix.mixture import Mixture
from mergemix_kernels.reference import weighted_sum
from tests.tiny import random_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]
NAMES = ("math", "code", "web")


def write_family(
    root: Path, base: Tensors | None, experts: Mapping[str, Tensors], shards: Sequence[int] = (1,)
) -> Family:
    """Write and open a family. shards: how many files each checkpoint gets, the base first, used in turn."""
    counts = [shards[k % len(shards)] for k in range(len(experts) + 1)]
    base_root = None if base is None else str(write_checkpoint(root / "base", base, shards=counts[0]))
    sources = {
        name: str(write_checkpoint(root / name, tensors, shards=count))
        for (name, tensors), count in zip(experts.items(), counts[1:], strict=True)
    }
    return open_family(base_root, sources)


def tiny_family(root: Path, *, with_base: bool = False, shards: Sequence[int] = (1, 2, 1, 3)) -> Family:
    """Three bf16 experts, and a base when asked for, in different shard layouts."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (40, 16), "layer.weight": (16, 16), "norm": (16,)}
    experts = {name: random_tensors(shapes, seed) for seed, name in enumerate(NAMES)}
    return write_family(root, random_tensors(shapes, 9) if with_base else None, experts, shards)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def expected(base: Tensors | None, experts: Mapping[str, Tensors], mixture: Mixture) -> Tensors:
    """The merge, tensor by tensor, by the rules of the design and the torch reference."""
    result = {}
    for name in next(iter(experts.values())):
        sources, weights = [], []
        for operand, coefficient in mixture.at(name).coefficients():
            tensors = experts[operand] if operand is not None else base
            assert tensors is not None
            if np.float32(coefficient) != 0:
                sources.append(tensors[name])
                weights.append(coefficient)
        equal = all(torch.equal(bits(sources[0]), bits(source)) for source in sources)
        copied = equal or not sources[0].is_floating_point()
        result[name] = sources[0] if copied else weighted_sum(sources, weights)
    return result


def poisoned_parameters(plan: MergePlan) -> dict[str, np.ndarray]:
    """Memory for every tensor of the plan, each byte 0xFF, which is NaN in every floating type."""
    return {task.name: np.full(task.nbytes, 0xFF, np.uint8) for task in plan.tasks}
