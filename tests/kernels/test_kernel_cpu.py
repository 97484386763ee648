"""The CPU kernels equal the reference bit for bit, whatever the sizes, the weights and the values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import (
    DTYPES,
    any_bits,
    as_array,
    assert_same_bits,
    guarded,
    numbers,
    one_weight,
    weight_lists,
)

from mergemix_kernels import cpu, cpu_tiles, reference
from mergemix_kernels.weights import MAX_SOURCES

SIZES = [
    0,
    1,
    2,
    31,
    cpu_tiles.BLOCK_ELEMENTS - 1,
    cpu_tiles.BLOCK_ELEMENTS + 1,
    3 * cpu.MIN_RANGE_ELEMENTS + 17,
]


def run(sources: list[torch.Tensor], weights: list[float], dtype: str) -> torch.Tensor:
    out, behind = guarded(sources[0].numel(), sources[0].dtype)
    cpu.weighted_sum([as_array(source) for source in sources], weights, as_array(out), dtype)
    assert (behind == 7).all()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.sampled_from(SIZES), make=st.sampled_from([any_bits, numbers]))
def test_equals_the_reference(dtype, data, count, make):
    weights = data.draw(weight_lists(2 * cpu_tiles.SIDE_BY_SIDE + 2))
    sources = [make(DTYPES[dtype], count, seed) for seed in range(len(weights))]
    assert_same_bits(run(sources, weights, dtype), reference.weighted_sum(sources, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [65, MAX_SOURCES])
def test_as_many_sources_as_there_may_be(dtype, count):
    sources = [numbers(DTYPES[dtype], 1001, seed) for seed in range(count)]
    weights = np.random.default_rng(0).dirichlet(np.ones(count)).tolist()
    assert torch.equal(run(sources, weights, dtype), reference.weighted_sum(sources, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    sources=st.integers(1, 10),
    outputs=st.integers(1, 5),
    count=st.sampled_from([*SIZES[:-1], 5 * cpu_tiles.BLOCK_ELEMENTS + 40]),
    past_cache=st.booleans(),
    make=st.sampled_from([any_bits, numbers]),
)
def test_several_outputs_wherever_they_begin(dtype, data, sources, outputs, count, past_cache, make):
    """Each equals a sum of its own, whether or not stores pass the caches; nothing else is written."""
    weights = [
        data.draw(
            st.lists(one_weight, min_size=sources, max_size=sources).filter(lambda w: np.float32(w).any())
        )
        for _ in range(outputs)
    ]
    held = [make(DTYPES[dtype], count, seed) for seed in range(sources)]
    around = [torch.full((count + 70,), 7.0).to(DTYPES[dtype]) for _ in range(outputs)]
    starts = [data.draw(st.integers(0, 33)) for _ in range(outputs)]
    outs = [memory[start : start + count].fill_(np.nan) for memory, start in zip(around, starts, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "PAST_CACHE_BYTES", 0 if past_cache else 1 << 60)
        patch.setattr(cpu, "MIN_RANGE_ELEMENTS", cpu_tiles.BLOCK_ELEMENTS)
        arrays = [as_array(out) for out in outs]
        finite = cpu.WeightedSums(weights, sources)([as_array(source) for source in held], arrays, dtype)
    for out, row in zip(outs, weights, strict=True):
        assert_same_bits(out, reference.weighted_sum(held, row))
    assert finite == all(bool(out.isfinite().all()) for out in outs)
    for memory, start in zip(around, starts, strict=True):
        assert (memory[:start] == 7).all()
        assert (memory[start + count :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.sampled_from(SIZES[1:]), outputs=st.integers(1, 3))
def test_finite_means_every_element_that_is_written(dtype, data, count, outputs):
    """Each source is finite; only in the last output does one element overflow."""
    source = torch.ones(count).to(DTYPES[dtype])
    outs = [torch.empty_like(source) for _ in range(outputs)]
    sums = cpu.WeightedSums([[0.5]] * (outputs - 1) + [[2.0]], 1)
    call = [as_array(source)], [as_array(out) for out in outs], dtype
    assert sums(*call)
    source[data.draw(st.integers(0, count - 1))] = (
        data.draw(st.sampled_from([1, -1])) * 0.75 * torch.finfo(source.dtype).max
    )
    assert not sums(*call)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_hot_weights_give_every_bit_pattern_back(dtype, position):
    patterns = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16)).view(DTYPES[dtype])
    sources = [any_bits(DTYPES[dtype], 1 << 16, seed) for seed in range(3)]
    sources[position] = patterns
    weights = [0.0, 0.0, 0.0]
    weights[position] = 1.0
    assert_same_bits(run(sources, weights, dtype), patterns)
    assert_same_bits(reference.weighted_sum(sources, weights), patterns)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding_case(dtype):
    """Ties, carries into the exponent, overflow to Inf and underflow, from products with a second source."""
    high = any_bits(DTYPES["F32"], 1 << 18, 5)
    sources = [high.to(DTYPES[dtype]), (high * 2**-9).to(DTYPES[dtype]), (high * 2**-11).to(DTYPES[dtype])]
    for weights in ([1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [1.5, 1.5, 0.0], [3e38, 0.0, 0.0]):
        assert_same_bits(run(sources, weights, dtype), reference.weighted_sum(sources, weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_survive_a_caller_that_flushes_them(dtype):
    tiny = np.arange(1, 128, dtype=np.uint32 if dtype == "F32" else np.uint16).view(cpu.numpy_dtype(dtype))
    out = np.zeros_like(tiny)
    assert torch.set_flush_denormal(True)
    try:
        cpu.weighted_sum([tiny], [1.0], out, dtype)
        still_flushing = (torch.tensor([1e-40]) * 1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert out.tobytes() == tiny.tobytes()
    assert still_flushing, "the caller's own setting must be left as it was"


@pytest.mark.parametrize("count", [1, 2, cpu_tiles.SIDE_BY_SIDE + 1, 40])
def test_sums_of_minus_zero_keep_the_sign(count):
    minus = torch.full((100,), -0.0)
    assert_same_bits(run([minus] * count, [1.0] * count, "F32"), minus)


def test_out_may_be_a_source():
    sources = [numbers(DTYPES["BF16"], 100_000, seed) for seed in range(3)]
    expected = reference.weighted_sum(sources, [0.2, 0.3, 0.5])
    cpu.weighted_sum([as_array(s) for s in sources], [0.2, 0.3, 0.5], as_array(sources[1]), "BF16")
    assert torch.equal(sources[1], expected)


def test_sources_of_weight_zero_are_absent():
    sources = [numbers(DTYPES["F32"], 10, 0), torch.full((10,), float("nan")), numbers(DTYPES["F32"], 10, 2)]
    assert torch.equal(run(sources, [0.5, 0.0, 0.5], "F32"), run(sources[::2], [0.5, 0.5], "F32"))
    assert torch.equal(run(sources, [0.5, 1e-60, 0.5], "F32"), run(sources[::2], [0.5, 0.5], "F32"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F64"}, "dtype must be one of"),
        ({"out": np.zeros(5, np.uint16)}, "source 0 must be"),
        ({"out": np.zeros(4, np.float32)}, "out must be"),
        ({"out": np.zeros((2, 2), np.uint16)}, "out must be"),
        ({"out": np.zeros(8, np.uint16)[::2]}, "out must be"),
        ({"out": np.frombuffer(bytes(8), np.uint16)}, "out must be writeable"),
        ({"sources": []}, "from 1 to 1024"),
        ({"sources": [np.zeros(4, np.uint16)] * 1025, "weights": [1.0] * 1025}, "from 1 to 1024"),
        ({"weights": [1.0]}, "one weight per source"),
        ({"weights": [0.0, -0.0]}, "at least one weight"),
        ({"weights": [1.0, float("nan")]}, "finite in fp32"),
        ({"weights": [1.0, 1e39]}, "finite in fp32"),
    ],
)
def test_refuses(change, message):
    call = {"sources": [np.zeros(4, np.uint16)] * 2, "weights": [0.5, 0.5]}
    call |= {"out": np.ones(4, np.uint16), "dtype": "BF16"}
    with pytest.raises(ValueError, match=message):
        cpu.weighted_sum(**(call | change))


@pytest.mark.parametrize(
    ("weights", "sources", "outs", "message"),
    [
        ([], 0, 0, "at least one output"),
        ([[1.0]], 2, 1, "1 sources and 1 outs"),
        ([[1.0], [1.0]], 1, 1, "1 sources and 2 outs"),
        ([[1.0], [0.0]], 1, 2, "at least one weight"),
        ([[1.0, 1.0], [1.0]], 2, 2, "one weight per source"),
    ],
)
def test_refuses_numbers_that_do_not_match(weights, sources, outs, message):
    arrays = list(np.zeros((sources + outs, 4), np.uint16))
    with pytest.raises(ValueError, match=message):
        cpu.WeightedSums(weights, len(weights[0]) if weights else 0)(
            arrays[:sources], arrays[sources:], "BF16"
        )


def test_refuses_outputs_that_would_overwrite_what_others_need():
    one, two = np.zeros((2, 4), np.uint16)
    for outs in ([two, two], [one, two]):
        with pytest.raises(ValueError, match="none may be another, or a source"):
            cpu.WeightedSums([[1.0], [2.0]], 1)([one], outs, "BF16")


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), count=st.sampled_from(SIZES[1:]))
def test_bitwise_equal_and_all_finite_see_any_single_element(dtype, data, count):
    values = numbers(DTYPES[dtype], count, 0)
    others = [values.clone(), values.clone()]
    assert cpu.bitwise_equal([as_array(values), *map(as_array, others)])
    assert cpu.all_finite(as_array(values), dtype)
    where = data.draw(st.integers(0, count - 1))
    others[data.draw(st.integers(0, 1))][where] = data.draw(st.sampled_from([np.inf, -np.inf, np.nan]))
    assert not cpu.bitwise_equal([as_array(values), *map(as_array, others)])
    assert [cpu.all_finite(as_array(other), dtype) for other in others].count(False) == 1


def test_bitwise_equal_tells_zeros_apart_and_nan_from_nothing():
    zero, minus = np.zeros(3, np.float32), np.array([0, -0.0, 0], np.float32)
    nan = np.full(3, np.nan, np.float32)
    assert not cpu.bitwise_equal([zero, minus])
    assert cpu.bitwise_equal([nan, nan.copy()])
    assert cpu.bitwise_equal([zero])
    assert cpu.bitwise_equal([])
    with pytest.raises(ValueError, match="source 1 must be"):
        cpu.bitwise_equal([zero, zero.astype(np.float64)])


def test_all_finite_takes_the_largest_numbers():
    for dtype, torch_dtype in DTYPES.items():
        lowest = torch.full((9,), torch.finfo(torch_dtype).min, dtype=torch_dtype)
        assert cpu.all_finite(as_array(lowest), dtype)
