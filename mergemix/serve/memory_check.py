"""Compares the memory of whole tensors with the fp32 reference, for engines that have one place for each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mergemix.checkpoints.family import Family
from mergemix.mixture import Mixture
from mergemix.serve.copies import Copy, Numbers, copy_of, numbers_of
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix.serve.lazy import Origin
from mergemix.serve.low_rank import Folded
from mergemix.serve.origins import family_bytes, origin_of
from mergemix.serve.reference_check import differs
from mergemix.serve.sample_check import Part, Sampler, differing, part_count
from mergemix.serve.view_reader import ViewReader

SAMPLED_PARTS = 64


class MemoryCheck:
    """Of one family. Which operands are equal in a tensor is found out when it is first compared."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._reader = ViewReader(family_bytes(family))
        self._views = {
            name: torch.empty(tensor.shape, dtype=TORCH_DTYPES[tensor.dtype], device="meta")
            for name, tensor in family.template.tensors.items()
        }
        self._origins: dict[str, Origin] = {}
        self._factors: dict[tuple[object, ...], Folded] = {}
        self._sampler = Sampler(part_count(view) for view in self._views.values())

    def mismatches(
        self, mixture: Mixture, memory: Mapping[str, torch.Tensor], *, sample: bool = False
    ) -> list[str]:
        """Names of tensors whose memory (flat, uint8) does not hold what the reference makes of the original files.

        sample: only parts of bounded number and size are looked at, others each time (see Sampler). Raises
        CheckpointError when a file cannot be read.
        """
        names = list(self._views)
        if not sample:
            return [name for name in names if differs(*self._copy(mixture, memory, name), self._reader)]
        chosen = self._sampler.choose(np.arange(len(names)), SAMPLED_PARTS)
        parts = [Part(*self._copy(mixture, memory, names[i]), part) for i, part in chosen]
        return differing(parts, self._reader)

    def close(self) -> None:
        self._reader.close()

    def _copy(self, mixture: Mixture, memory: Mapping[str, torch.Tensor], name: str) -> tuple[Copy, Numbers]:
        if name not in self._origins:
            self._origins[name] = origin_of(self._family, name, self._reader)
        view = self._views[name]
        copy = copy_of(
            self._origins[name], memory[name].view(view.dtype).view(view.shape), view, self._factors
        )
        assert copy is not None, "a whole matrix is a choice of rows and columns"
        return copy, numbers_of(self._family, mixture.at(name), copy.makeup)
