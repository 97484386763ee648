"""The Triton kernels in Triton's interpreter, on CPU tensors.

Not collected by name: Triton decides at import whether it interprets, so test_kernel_triton.py runs this
file in a process of its own, with TRITON_INTERPRET=1.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, any_bits, assert_same_bits, guarded, numbers, poisoned, weight_lists
from triton.runtime.interpreter import InterpretedFunction

from mergemix_kernels import reference, triton_kernels
from mergemix_kernels.tiles import Tiling

TILE = 64  # of BF16 and F16; 32 of F32. Parts of 16 and 8.
SMALL = Tiling(TILE, 4, 3, "small, so that few elements make many tiles and a program has several")
COUNTS = [0, 1, 7, 15, 17, 31, 32, 33, TILE - 1, TILE, TILE + 1, 5 * TILE + 5]
ELEMENTS = {torch.bfloat16: tl.uint16, torch.float16: tl.float16, torch.float32: tl.float32}


def run(groups: list[list[torch.Tensor]], weights: list[list[float]], shifts=(0,), tiling=SMALL):
    """Outs [group][p], each `shift` elements into its storage. What lies behind an out must stay as it is."""
    outs, behinds = [], []
    for g, sources in enumerate(groups):
        shift = shifts[g % len(shifts)]
        wholes = [guarded(sources[0].numel() + shift, sources[0].dtype) for _ in weights]
        outs.append([whole[shift:] for whole, _ in wholes])
        behinds += [behind for _, behind in wholes]
    triton_kernels.GroupedWeightedSum(list(zip(groups, outs, strict=True)), tiling)(weights)
    assert all((behind == 7).all() for behind in behinds)
    return outs


def assert_equals_the_reference(groups, weights, outs):
    for sources, of_group in zip(groups, outs, strict=True):
        for of_output, out in zip(weights, of_group, strict=True):
            assert_same_bits(out, reference.weighted_sum(sources, of_output))


def test_this_process_interprets():
    assert isinstance(triton_kernels.weighted_sum_kernel, InterpretedFunction)


@settings(max_examples=35, deadline=None)
@given(data=st.data(), outputs=st.integers(1, 4), make=st.sampled_from([any_bits, numbers]))
def test_one_launch_equals_the_reference(data, outputs, make):
    """Groups of every dtype, length and alignment at once; each output with zeros of its own."""
    first = data.draw(weight_lists(5))
    same_length = weight_lists(5).filter(lambda weights: len(weights) >= len(first))
    weights = [first, *(data.draw(same_length)[: len(first)] for _ in range(outputs - 1))]
    weights = [of_output if any(of_output) else first for of_output in weights]
    group = st.tuples(st.sampled_from(COUNTS), st.sampled_from(list(DTYPES)), st.sampled_from([0, 0, 1, 3]))
    shapes = data.draw(st.lists(group, min_size=1, max_size=5))
    groups = [
        [make(DTYPES[dtype], count + shift, 100 * g + k)[shift:] for k in range(len(first))]
        for g, (count, dtype, shift) in enumerate(shapes)
    ]
    try:
        triton_kernels.make_terms(weights, len(first))
    except ValueError:  # an output whose weights all round to zero
        weights = [first] * outputs
    outs = run(groups, weights, [shift for _, _, shift in shapes])
    assert_equals_the_reference(groups, weights, outs)


def test_a_source_of_weight_zero_is_absent_from_that_output_only():
    negative_zeros = torch.full((100,), -0.0, dtype=torch.bfloat16)
    nans = poisoned(100, dtype=torch.bfloat16)
    ones = torch.ones(100, dtype=torch.bfloat16)
    weights = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [1.0, 0.0, 1.0]]
    outs = run([[negative_zeros, nans, ones]], weights)
    assert_same_bits(outs[0][0], negative_zeros)
    assert outs[0][1].isnan().all()
    assert_same_bits(outs[0][2], ones * 2)
    assert_same_bits(outs[0][3], ones)


@pytest.mark.parametrize("outputs", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_64_experts_and_the_base(dtype, outputs):
    sources = [numbers(DTYPES[dtype], 1001, seed) for seed in range(65)]
    weights = torch.rand(outputs, 65, generator=torch.Generator().manual_seed(0)).tolist()
    assert_equals_the_reference([sources], weights, run([sources], weights, tiling=None))


def test_many_more_sources():
    sources = [numbers(torch.bfloat16, 65, seed) for seed in range(300)]
    weights = [[1 / 300] * 300, [0.0] * 299 + [1.0]]
    assert_equals_the_reference([sources], weights, run([sources], weights))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_hot_weights_give_every_bit_pattern_back(dtype):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(DTYPES[dtype])
    sources = [any_bits(DTYPES[dtype], 1 << 16, 1), patterns, any_bits(DTYPES[dtype], 1 << 16, 2)]
    outs = run([sources], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], tiling=None)
    assert_same_bits(outs[0][0], patterns)
    assert_same_bits(outs[0][1], sources[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_ties_overflow_and_underflow(dtype):
    high = any_bits(torch.float32, 1 << 14, 5)
    sources = [(high * scale).to(DTYPES[dtype]) for scale in (1.0, 2**-9, 2**-11)]
    weights = [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.5, 1.5, 0.0], [3e38, 0.0, 0.0]]
    assert_equals_the_reference([sources], weights, run([sources], weights, tiling=None))


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
    _convert[(1,)](values, stored, ELEMENT=ELEMENTS[out.dtype], COUNT=1 << 16)
    assert_same_bits(out, values.to(out.dtype))


def unbacked(nbytes: int) -> torch.Tensor:
    """Bytes of zero that take up memory only where they are written."""
    return torch.from_numpy(np.zeros(nbytes, np.uint8))


def test_elements_beyond_the_reach_of_32_bits():
    """Only the last two tiles are summed: the group's first tile is given a number below zero."""
    count = (1 << 31) + TILE + 5
    source, out = (unbacked(2 * count).view(torch.bfloat16) for _ in range(2))
    source[-2 * TILE :] = numbers(torch.bfloat16, 2 * TILE, 3)
    last_tiles = 2
    begin = (count // TILE + 1 - last_tiles) * TILE
    row = triton_kernels._row((out, source), -(begin // TILE))
    triton_kernels.weighted_sum_kernel[(1,)](
        torch.tensor([row]),
        len(row),
        torch.zeros(last_tiles, dtype=torch.int32),
        last_tiles,
        triton_kernels.make_terms([[2.0]], 1),
        1,
        OUTPUTS=1,
        SIZE=TILE,
    )
    assert torch.equal(out[begin:], source[begin:] * 2)
    assert out[-1] != 0
    assert torch.equal(out[: 4 * TILE], torch.zeros(4 * TILE, dtype=torch.bfloat16))


def test_a_launch_is_replayed_with_new_weights_and_reads_what_the_sources_hold_then():
    sources = [numbers(torch.bfloat16, TILE + 3, seed) for seed in range(3)]
    out = poisoned(TILE + 3, dtype=torch.bfloat16)
    grouped = triton_kernels.GroupedWeightedSum([(sources, [out])], SMALL)
    for weights in ([0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]):
        grouped([weights])
        assert torch.equal(out, reference.weighted_sum(sources, weights))
    sources[0].mul_(2)
    grouped([[1.0, 0.0, 0.0]])
    assert torch.equal(out, sources[0])


def test_out_may_be_a_source():
    sources = [numbers(torch.float16, 2 * TILE + 1, seed) for seed in range(2)]
    expected = reference.weighted_sum(sources, [0.25, 0.75])
    triton_kernels.GroupedWeightedSum([(sources, [sources[1]])], SMALL)([[0.25, 0.75]])
    assert torch.equal(sources[1], expected)


def test_nothing_to_do():
    triton_kernels.GroupedWeightedSum([([torch.empty(0)], [torch.empty(0)])])([[1.0]])


def test_refuses():
    grouped = triton_kernels.GroupedWeightedSum([([torch.ones(4)] * 2, [torch.ones(4)] * 2)])
    for weights in ([1.0], [0.0, 0.0], [float("inf"), 1.0]):
        with pytest.raises(ValueError, match="weight"):
            grouped([[1.0, 1.0], weights])
    with pytest.raises(ValueError, match="from 1 to 8, but got 9"):
        triton_kernels.GroupedWeightedSum([([torch.ones(4)], [torch.ones(4)] * 9)])


def test_the_default_device_of_torch_is_of_no_account():
    """A serving engine makes the GPU the default device while weights change."""
    groups = [[numbers(torch.bfloat16, count, 10 * count + k) for k in range(2)] for count in (65, 7)]
    outs = [[poisoned(sources[0].numel(), dtype=torch.bfloat16)] for sources in groups]
    with torch.device("meta"):
        triton_kernels.GroupedWeightedSum(list(zip(groups, outs, strict=True)), SMALL)([[0.5, 0.25]])
    assert_equals_the_reference(groups, [[0.5, 0.25]], outs)
