"""Inputs and comparisons that the tests of all kernels share."""

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

one_weight = st.one_of(
    st.floats(-4, 4),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-30, 3e38]),
)


def weight_lists(max_size: int) -> st.SearchStrategy[list[float]]:
    """Weights of every size and sign, not all of them zero in fp32."""
    return st.lists(one_weight, min_size=1, max_size=max_size).filter(lambda w: np.float32(w).any())


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()


def any_bits(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    """Every kind of number: uniform bit patterns, so subnormals, huge values, NaN and Inf are among them."""
    bits = np.random.default_rng(seed).integers(0, 256, max(count, 1) * dtype.itemsize, np.uint8)
    return torch.from_numpy(bits).view(dtype)[:count]


def numbers(dtype: torch.dtype, count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def guarded(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned output, and the memory behind it, which is full of sevens and must stay so."""
    whole = poisoned(count + 16, dtype=dtype)
    whole[count:] = 7
    return whole[:count], whole[count:]


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, except that any NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers_only = ~expected.isnan()
    # As bytes: to a comparison of float32s 0.0 and -0.0 are the same.
    assert as_array(actual[numbers_only]).tobytes() == as_array(expected[numbers_only]).tobytes()
