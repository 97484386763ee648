"""Conversions between the floating types of safetensors: to fp32 exactly, from fp32 rounded to nearest even."""

from __future__ import annotations

import numpy as np


def widen(data: np.ndarray, dtype: str, target: np.ndarray) -> None:
    """target (fp32, any shape) = the values that `data` (contiguous uint8) holds in `dtype`, exactly."""
    if dtype == "BF16":
        words = target.view(np.uint32)
        words[...] = data.view(np.uint16).reshape(target.shape)
        words <<= 16
    else:
        target[...] = data.view({"F16": np.float16, "F32": np.float32}[dtype]).reshape(target.shape)


def narrow(values: np.ndarray, dtype: str, target: np.ndarray) -> None:
    """target (contiguous uint8) = `values` (fp32, 1-D) rounded once to `dtype`; overflow gives Inf, NaN stays NaN."""
    if dtype == "BF16":
        words = values.view(np.uint32)
        rounded = (words + (np.uint32(0x7FFF) + ((words >> 16) & 1))) >> 16
        # The carry would turn a NaN into Inf or into zero.
        target.view(np.uint16)[...] = np.where(np.isnan(values), (words >> 16) | 0x40, rounded)
    else:
        with np.errstate(over="ignore"):
            target.view({"F16": np.float16, "F32": np.float32}[dtype])[...] = values
