"""Weighted sums plus low-rank products on the CPU: bit-equal to the reference, however a matrix is cut."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, any_bits, as_array, assert_same_bits, numbers, poisoned

from mergemix_kernels import cpu, cpu_tiles, reference

SMALL = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 9))
# More than one strip, and panel, of columns; more rows than are multiplied together; ranges for threads.
LARGE = st.sampled_from(
    [(3, cpu_tiles.STRIP_COLUMNS + 33, 5), (9, 460, 300), (1, 1200, 2), (300, 3, 4), (130, 1031, 3)]
)


def factors(rows: int, columns: int, ranks: int, outputs: int, make=numbers) -> list[torch.Tensor]:
    """left, right and scales, float32."""
    shapes = [(rows, ranks), (ranks, columns), (outputs, ranks)]
    parts = [make(torch.float32, height * width, seed) for seed, (height, width) in enumerate(shapes)]
    parts[2] = numbers(torch.float32, outputs * ranks, 2)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def run(
    sources, weights, left, right, scales, dtype, cuts=(), threads=None
) -> tuple[list[torch.Tensor], bool]:
    """All outputs, computed in pieces that end at `cuts`, and whether every piece was finite.

    Each piece has memory of its own, in which nothing around it may be written.
    """
    count = sources[0].numel()
    sums = cpu.WeightedSums(weights, len(sources))
    arrays = [as_array(source.reshape(-1)) for source in sources]
    outs: list[list[torch.Tensor]] = [[] for _ in weights]
    finite = True
    for begin, end in itertools.pairwise([0, *sorted(cuts), count]):
        memory = poisoned(len(weights), end - begin + 32, dtype=DTYPES[dtype])
        memory[:, :16] = memory[:, -16:] = 7
        part = cpu.LowRank(left.numpy(), right.numpy(), scales.numpy(), begin)
        targets = [as_array(piece) for piece in memory[:, 16:-16]]
        finite &= sums([array[begin:end] for array in arrays], targets, dtype, low_rank=part, threads=threads)
        assert (memory[:, :16] == 7).all()
        assert (memory[:, -16:] == 7).all()
        for pieces, piece in zip(outs, memory[:, 16:-16], strict=True):
            pieces.append(piece)
    return [torch.cat(pieces) for pieces in outs], finite


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    shape=st.one_of(SMALL, LARGE),
    terms=st.integers(1, 10),
    outputs=st.integers(1, 3),
    make=st.sampled_from([any_bits, numbers]),
    column_order=st.booleans(),
    threads=st.sampled_from([None, 1]),
)
def test_equals_the_reference(dtype, data, shape, terms, outputs, make, column_order, threads):
    rows, columns, ranks = shape
    left, right, scales = factors(rows, columns, ranks, outputs, make)
    scales *= torch.tensor(
        [[data.draw(st.booleans()) for _ in range(min(ranks, 9))] for _ in range(outputs)]
    ).repeat(1, -(-ranks // 9) if ranks else 1)[:, :ranks]
    weights = [
        [data.draw(st.sampled_from([0.0, 0.3, 1.0, -0.7])) for _ in range(terms - 1)] + [0.5]
    ] * outputs
    sources = [make(DTYPES[dtype], rows * columns, 10 + k).reshape(rows, columns) for k in range(terms)]
    cuts = data.draw(st.lists(st.integers(0, rows * columns), max_size=4))
    stored = left.T.contiguous().T if column_order else left
    outs, finite = run(sources, weights, stored, right, scales, dtype, cuts, threads)
    for p, out in enumerate(outs):
        expected = reference.low_rank_sum(sources, weights[p], left, right, scales[p])
        assert_same_bits(out.reshape(rows, columns), expected)
    assert finite == all(bool(out.isfinite().all()) for out in outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype, monkeypatch):
    left, right, scales = factors(777, 333, 19, 2)
    sources = [numbers(DTYPES[dtype], 777 * 333, k).reshape(777, 333) for k in range(2)]
    weights = [[0.4, 0.6], [1.0, 0.0]]
    one, _ = run(sources, weights, left, right, scales, dtype, threads=1)
    monkeypatch.setattr(cpu, "thread_count", lambda: 3)
    several, _ = run(sources, weights, left, right, scales, dtype)
    for p, (left_out, right_out) in enumerate(zip(one, several, strict=True)):
        assert torch.equal(left_out, right_out)
        expected = reference.low_rank_sum(sources, weights[p], left, right, scales[p])
        assert torch.equal(left_out.reshape(777, 333), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(ranks=st.integers(1, 200), terms=st.integers(1, 5), seed=st.integers(0, 99))
def test_error_against_exact_arithmetic(dtype, ranks, terms, seed):
    """Products and sums lose 2**-24 each (Higham, section 3.1), the one rounding half a unit in the last place."""
    generator = np.random.default_rng(seed)
    left, right = (generator.standard_normal(shape, np.float32) for shape in ((7, ranks), (ranks, 40)))
    scales = generator.uniform(-2, 2, (1, ranks)).astype(np.float32)
    weights = generator.uniform(-1, 2, terms).astype(np.float32)
    sources = [numbers(DTYPES[dtype], 280, 100 * seed + k).reshape(7, 40) for k in range(terms)]
    tensors = [torch.from_numpy(part) for part in (left, right, scales)]
    [out], _ = run(sources, [weights.tolist()], *tensors, dtype)
    dense = [
        weight * source.double().numpy()
        for weight, source in zip(weights.astype(np.float64), sources, strict=True)
    ]
    low_rank = (left.astype(np.float64) * scales) @ right.astype(np.float64)
    magnitude = sum(map(np.abs, dense)) + np.abs(left * scales.astype(np.float64)) @ np.abs(right).astype(
        np.float64
    )
    lost = (terms + ranks + 3) * 2.0**-24 * magnitude
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    exact = sum(dense) + low_rank
    assert (np.abs(out.double().numpy().reshape(7, 40) - exact) <= lost + unit * (np.abs(exact) + lost)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_any_float32(dtype):
    """NaN with any payload included: a GPU's own is 0x7FFFFFFF, which a careless carry makes -0.0.

    Any float32 reaches the rounding as the addend of -0.0: as the right factor of a product of rank 1.
    """
    values = any_bits(torch.float32, 1 << 18, 7)
    values[:4] = torch.tensor([-1, 0x7FFFFFFF, 0x7F800001, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    zeros, one = torch.full_like(values, -0.0).to(DTYPES[dtype]), torch.ones(1, 1)
    [out], finite = run([zeros], [[1.0]], one, values[None], one, dtype)
    assert not finite
    assert_same_bits(out, values.to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_of_scale_zero_are_absent(dtype):
    """Neither their NaN spreads nor does -0.0 become +0.0; without any rank the weighted sum is all there is."""
    left, right = torch.ones(2, 2), torch.ones(2, 40)
    left[:, 0] = right[0] = np.nan
    base = torch.full((2, 40), -0.0).to(DTYPES[dtype])
    outs, finite = run([base], [[1.0], [1.0]], left, right, torch.tensor([[0.0, 0.0], [0.0, 2.0]]), dtype)
    assert_same_bits(outs[0].reshape(2, 40), base)
    assert (outs[1] == 2).all()
    assert finite


def test_subnormals_survive_a_caller_that_flushes_them():
    left, right, one = torch.full((5, 1), 2.0**-70), torch.full((1, 40), 2.0**-70), torch.ones(1, 1)
    tiny = torch.full((5, 40), 1e-40)
    expected = reference.low_rank_sum([tiny], [1.0], left, right, one[0])
    assert (expected != tiny).all()
    assert torch.set_flush_denormal(True)
    try:
        [out], _ = run([tiny], [[1.0]], left, right, one, "F32")
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(out.reshape(5, 40), expected)


def test_out_may_be_a_source_and_factors_may_be_read_only():
    left, right, scales = factors(50, 60, 3, 1)
    sources = [numbers(DTYPES["BF16"], 3000, k).reshape(50, 60) for k in range(2)]
    expected = reference.low_rank_sum(sources, [0.5, 0.5], left, right, scales[0])
    arrays = [as_array(source.reshape(-1)) for source in sources]
    held = [
        np.frombuffer(part.numpy().tobytes(), np.float32).reshape(part.shape)
        for part in (left, right, scales)
    ]
    assert cpu.WeightedSums([[0.5, 0.5]], 2)(arrays, [arrays[0]], "BF16", low_rank=cpu.LowRank(*held, 0))
    assert torch.equal(sources[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"left": np.ones((3, 2))}, "must be float32 matrices"),
        ({"left": np.ones(6, np.float32)}, "must be float32 matrices"),
        ({"left": np.ones((3, 3), np.float32)}, "low-rank shapes"),
        ({"scales": np.ones((2, 2), np.float32)}, "low-rank shapes"),
        ({"scales": np.full((1, 2), np.inf, np.float32)}, "must be finite"),
        ({"left": np.ones((3, 4), np.float32)[:, ::2]}, "C or Fortran order"),
        ({"right": np.ones((4, 2), np.float32).T}, "C order"),
        ({"first": -1}, "must lie in a 3 x 4 matrix"),
        ({"first": 1}, "must lie in a 3 x 4 matrix"),
    ],
)
def test_refuses(change, message):
    low_rank = {"left": np.ones((3, 2), np.float32), "right": np.ones((2, 4), np.float32)}
    low_rank |= {"scales": np.ones((1, 2), np.float32), "first": 0}
    source, out = np.zeros((2, 12), np.uint16)
    with pytest.raises(ValueError, match=message):
        cpu.WeightedSums([[1.0]], 1)([source], [out], "BF16", low_rank=cpu.LowRank(**(low_rank | change)))
    assert not out.any()
