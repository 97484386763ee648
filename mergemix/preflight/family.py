"""What the weights alone tell of a family: the part of the preflight that every run does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mergemix.checkpoints.family import Family
from mergemix.preflight.geometry import FamilyGeometry, TensorGeometry
from mergemix.preflight.tokenizers import tokenizer_check
from mergemix.preflight.verdict import worst
from mergemix.preflight.weight_checks import weight_checks
from mergemix.preflight.weights import measure_weights


def preflight_family(
    family: Family, *, memory_bytes: int = 256 << 20, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Can these experts be averaged? From one read of all weights, within `memory_bytes`; for programs.

    verdict, checks: see `verdict.Check`. Without a base everything is relative to the experts' mean, and what cannot be
    told then is null. By expert: norms, of the task vector over the base's; moved, the share of elements that are not
    the base's; alignment, the cosine with the base, of matrices. cosine: between task vectors. distance: between
    experts, over the base's norm. layers: norms and moved of each layer, in model order. Numbers that are not finite
    are null.
    Raises CheckpointError when a file is gone or changed, ConfigError when memory_bytes is too small.
    """
    geometry = measure_weights(family, memory_bytes=memory_bytes, progress=progress)
    checks = [tokenizer_check(family), *weight_checks(geometry)]
    return {
        "verdict": worst(check.verdict for check in checks),
        "checks": [check.as_dict() for check in checks],
        **describe(geometry),
    }


def describe(geometry: FamilyGeometry) -> dict[str, Any]:
    """The measurements, by expert's name."""
    names, whole = geometry.names, geometry.whole
    by_name = {
        "norms": _by_expert(names, whole.relative_norms),
        "moved": _by_expert(names, _moved(geometry, whole)),
        "alignment": _by_expert(names, geometry.matrices.alignments) if geometry.has_base else None,
        "cosine": {a: _by_expert(names, row) for a, row in zip(names, whole.cosines, strict=True)},
        "distance": {a: _by_expert(names, row) for a, row in zip(names, whole.distances, strict=True)},
        "layers": [
            {
                "layer": layer.name,
                "parameters": layer.elements,
                "norms": _by_expert(names, layer.relative_norms),
                "moved": _by_expert(names, _moved(geometry, layer)),
            }
            for layer in geometry.layers
        ],
    }
    return {
        "reference": "base" if geometry.has_base else "mean of the experts",
        "parameters": whole.elements,
        **by_name,
        "bytes_read": geometry.bytes_read,
        "seconds": geometry.seconds,
    }


def _moved(geometry: FamilyGeometry, part: TensorGeometry) -> np.ndarray:
    # Nearly no element is its experts' mean: that says nothing.
    return (
        part.moved / part.elements
        if geometry.has_base and part.elements
        else np.full(len(part.moved), np.nan)
    )


def _by_expert(names: tuple[str, ...], values: np.ndarray) -> dict[str, float | None]:
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in zip(names, values, strict=True)
    }
