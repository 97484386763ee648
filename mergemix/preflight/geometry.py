"""Norms and angles of task vectors, from their inner products."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class TensorGeometry:
    """One floating-point tensor of K experts.

    gram: float64 [1 + K, 1 + K], inner products of the reference (row 0) and the K task vectors. The reference is the
    base; without one, the experts' mean. moved: int64 [K], elements that are not the reference's.
    Products with a NaN or Inf are themselves not finite. is_matrix: of two dimensions or more.
    """

    name: str
    is_matrix: bool
    elements: int
    gram: np.ndarray
    moved: np.ndarray

    @property
    def relative_norms(self) -> np.ndarray:
        """[K]: norms of the task vectors over the reference's; NaN where that is zero."""
        return _ratio(np.sqrt(np.diag(self.gram)[1:]), math.sqrt(self.gram[0, 0]))

    @property
    def cosines(self) -> np.ndarray:
        """[K, K] between task vectors; NaN with one that is zero."""
        norms = np.sqrt(np.diag(self.gram)[1:])
        return np.clip(_ratio(self.gram[1:, 1:], np.outer(norms, norms)), -1, 1)

    @property
    def alignments(self) -> np.ndarray:
        """[K]: cosine of each expert with the reference; NaN where one of them is zero."""
        base, along, own = self.gram[0, 0], self.gram[0, 1:], np.diag(self.gram)[1:]
        norms = np.sqrt(np.maximum(base + 2 * along + own, 0.0) * base)
        return np.clip(_ratio(base + along, norms), -1, 1)

    @property
    def distances(self) -> np.ndarray:
        """[K, K]: norms of the differences of experts over the reference's norm."""
        own = np.diag(self.gram)[1:]
        squared = own[:, None] + own[None, :] - 2 * self.gram[1:, 1:]
        return _ratio(np.sqrt(np.maximum(squared, 0.0)), math.sqrt(self.gram[0, 0]))


@dataclass(frozen=True)
class FamilyGeometry:
    """Of all tensors that are averaged. names: of the experts. bytes_read: of tensors. seconds: wall time."""

    names: tuple[str, ...]
    has_base: bool
    tensors: tuple[TensorGeometry, ...]
    bytes_read: int
    seconds: float

    @cached_property
    def whole(self) -> TensorGeometry:
        """All tensors as one vector."""
        return _together("", self.tensors, len(self.names))

    @cached_property
    def matrices(self) -> TensorGeometry:
        """All tensors but vectors and scalars, as one vector: scales of norms are near 1 in any two models."""
        return _together("", [tensor for tensor in self.tensors if tensor.is_matrix], len(self.names))

    @cached_property
    def layers(self) -> tuple[TensorGeometry, ...]:
        """Tensors by layer, numbered layers in their order; the others each by its module's name."""
        by_layer: dict[str, list[TensorGeometry]] = {}
        for tensor in self.tensors:
            by_layer.setdefault(layer_of(tensor.name), []).append(tensor)
        numbered = sorted((name for name in by_layer if name.isdigit()), key=int)
        order = [*numbered, *(name for name in by_layer if not name.isdigit())]
        return tuple(_together(name, by_layer[name], len(self.names)) for name in order)


def layer_of(tensor: str) -> str:
    """ "3" for model.layers.3.mlp.up_proj.weight; "model.embed_tokens" for a tensor outside of numbered layers."""
    match = LAYER.search(tensor)
    return match[1] if match else tensor.removesuffix(".weight").removesuffix(".bias")


def _ratio(values: np.ndarray, by: np.ndarray | float) -> np.ndarray:
    """values / by; NaN instead of what has no value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray(values / by)
    return np.where(np.isfinite(found), found, np.nan)


def _together(name: str, tensors: Sequence[TensorGeometry], num_experts: int) -> TensorGeometry:
    """Tensors as one vector. Inner products of vectors laid end to end add up."""
    rows = 1 + num_experts
    return TensorGeometry(
        name,
        all(tensor.is_matrix for tensor in tensors),
        sum(tensor.elements for tensor in tensors),
        sum((tensor.gram for tensor in tensors), np.zeros((rows, rows))),
        sum((tensor.moved for tensor in tensors), np.zeros(num_experts, np.int64)),
    )
