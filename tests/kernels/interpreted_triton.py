"""The Triton kernels in Triton's interpreter, on CPU tensors.

Not collected by name: Triton decides at import whether it interprets, so test_kernel_triton.py runs this
file in a process of its own, with TRITON_INTERPRET=1.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, any_bits, assert_same_bits, guarded, numbers, poisoned, weight_lists
from triton.runtime.interpreter import InterpretedFunction

from mergemix_kernels import reference, triton_kernels

TILE = triton_kernels.TILE_ELEMENTS
COUNTS = [0, 1, 7, TILE - 1, TILE, TILE + 1, 2 * TILE + 5]


def run(groups: list[list[torch.Tensor]], weights: list[float]) -> list[torch.Tensor]:
    outs, behinds = zip(*(guarded(sources[0].numel(), sources[0].dtype) for sources in groups), strict=True)
    triton_kernels.GroupedWeightedSum(list(zip(groups, outs, strict=True)))(weights)
    assert all((behind == 7).all() for behind in behinds)
    return list(outs)


def test_this_process_interprets():
    assert isinstance(triton_kernels.weighted_sum_kernel, InterpretedFunction)


@settings(max_examples=45, deadline=None)
@given(
    weights=weight_lists(4),
    shapes=st.lists(
        st.tuples(st.sampled_from(COUNTS), st.sampled_from(list(DTYPES))),
        min_size=1,
        max_size=3,
    ),
    make=st.sampled_from([any_bits, numbers]),
    shift=st.integers(0, 3),
)
def test_equals_the_reference(weights, shapes, make, shift):
    """`shift` elements into their storage, so that addresses are not multiples of 16 bytes."""
    groups = [
        [make(DTYPES[dtype], count + shift, 100 * g + k)[shift:] for k in range(len(weights))]
        for g, (count, dtype) in enumerate(shapes)
    ]
    for sources, out in zip(groups, run(groups, weights), strict=True):
        assert_same_bits(out, reference.weighted_sum(sources, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_64_experts_and_the_base(dtype):
    sources = [numbers(DTYPES[dtype], 1001, seed) for seed in range(65)]
    weights = torch.rand(65, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(run([sources], weights)[0], reference.weighted_sum(sources, weights))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_hot_weights_give_every_bit_pattern_back(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(DTYPES[dtype])
    sources = [any_bits(DTYPES[dtype], 1 << 16, 1), patterns, any_bits(DTYPES[dtype], 1 << 16, 2)]
    assert_same_bits(run([sources], [0.0, 1.0, 0.0])[0], patterns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_ties_overflow_and_underflow(dtype):
    high = any_bits(torch.float32, 1 << 14, 5)
    sources = [(high * scale).to(DTYPES[dtype]) for scale in (1.0, 2**-9, 2**-11)]
    for weights in ([1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.5, 1.5, 0.0], [3e38, 0.0, 0.0]):
        assert_same_bits(run([sources], weights)[0], reference.weighted_sum(sources, weights))


@triton.jit
def _convert(values, out, ELEMENT: tl.constexpr, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    tl.store(out + offsets, triton_kernels._round(tl.load(values + offsets), ELEMENT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_any_float32(dtype):
    """NaN with any payload included: a GPU's own is 0x7FFFFFFF, which a careless carry makes -0.0."""
    values = any_bits(torch.float32, 1 << 16, 7)
    values[:4] = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    out = poisoned(1 << 16, dtype=DTYPES[dtype])
    stored = out.view(torch.uint16) if dtype == "BF16" else out
    _convert[(1,)](values, stored, ELEMENT=triton_kernels.ELEMENT_TYPES[out.dtype], COUNT=1 << 16)
    assert_same_bits(out, values.to(out.dtype))


def test_a_launch_is_replayed_with_new_weights_and_reads_what_the_sources_hold_then():
    sources = [numbers(torch.bfloat16, TILE + 3, seed) for seed in range(3)]
    out = poisoned(TILE + 3, dtype=torch.bfloat16)
    grouped = triton_kernels.GroupedWeightedSum([(sources, out)])
    for weights in ([0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]):
        grouped(weights)
        assert torch.equal(out, reference.weighted_sum(sources, weights))
    sources[0].mul_(2)
    grouped([1.0, 0.0, 0.0])
    assert torch.equal(out, sources[0])


def test_out_may_be_a_source():
    sources = [numbers(torch.float16, 2 * TILE + 1, seed) for seed in range(2)]
    expected = reference.weighted_sum(sources, [0.25, 0.75])
    triton_kernels.GroupedWeightedSum([(sources, sources[1])])([0.25, 0.75])
    assert torch.equal(sources[1], expected)


def test_nothing_to_do():
    triton_kernels.GroupedWeightedSum([([torch.empty(0)], torch.empty(0))])([1.0])


def test_refuses_weights():
    grouped = triton_kernels.GroupedWeightedSum([([torch.ones(4)] * 2, torch.ones(4))])
    for weights in ([1.0], [0.0, 0.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="weight"):
            grouped(weights)
