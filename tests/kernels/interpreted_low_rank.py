"""The low-rank Triton kernel in Triton's interpreter, on CPU tensors; run by test_low_rank_torch.py.

Not collected by name: Triton decides at import whether it interprets.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, any_bits, assert_same_bits, numbers, poisoned
from triton.runtime.interpreter import InterpretedFunction

from mergemix_kernels import low_rank_triton, reference
from mergemix_kernels.low_rank import LowRankGroup

TILE = (4, 16)


def test_this_process_interprets():
    assert isinstance(low_rank_triton.low_rank_kernel, InterpretedFunction)


def matrix(dtype: torch.dtype, rows: int, columns: int, wider: int, shift: int, seed: int, make=numbers):
    """A matrix in memory whose rows are `wider` elements longer, from element `shift` on, and that memory."""
    memory = make(dtype, rows * (columns + wider) + shift, seed)
    return memory[shift:].view(rows, columns + wider)[:, :columns], memory


@st.composite
def groups(draw, sources: int):
    """A group, the memory behind its out, and whether the factors hold any bits."""
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    rows, columns = draw(st.sampled_from([1, 3, 4, 5, 9])), draw(st.sampled_from([1, 7, 8, 16, 17, 32, 40]))
    ranks, make = draw(st.integers(0, 5)), draw(st.sampled_from([numbers, any_bits]))
    wider, shift = draw(st.sampled_from([0, 8, 3])), draw(st.sampled_from([0, 0, 1, 8]))
    operands = [matrix(dtype, rows, columns, wider, shift, 10 + k, make)[0] for k in range(sources)]
    out, memory = matrix(dtype, rows, columns, draw(st.sampled_from([0, 8, 5])), shift, 99)
    left = make(torch.float32, rows * ranks, 1).view(rows, ranks)
    if draw(st.booleans()):
        left = left.t().contiguous().t()
    right = make(torch.float32, ranks * columns, 2).view(ranks, columns)
    return LowRankGroup(operands, left, right, out), memory


@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), sources=st.integers(1, 3))
def test_one_launch_equals_the_reference(data, count, sources):
    """Groups of every dtype, shape, rank, alignment and distance of rows at once, then again with other numbers."""
    drawn = [data.draw(groups(sources)) for _ in range(count)]
    sums = low_rank_triton.GroupedSums([group for group, _ in drawn], TILE)
    for _ in range(2):
        weights = [data.draw(st.sampled_from([0.0, 0.3, 1.0, -0.7])) for _ in range(sources - 1)] + [0.25]
        scales = [
            torch.tensor(
                [data.draw(st.sampled_from([0.0, 0.7, -1.3, 2.0])) for _ in range(group.left.shape[1])]
            )
            for group, _ in drawn
        ]
        untouched = []
        for group, memory in drawn:
            memory.fill_(7)
            group.out.fill_(float("nan"))
            untouched.append(memory.eq(7))
        sums(weights, scales)
        for (group, memory), outside, of_group in zip(drawn, untouched, scales, strict=True):
            expected = reference.low_rank_sum(group.sources, weights, group.left, group.right, of_group)
            assert_same_bits(group.out.contiguous(), expected)
            assert (memory[outside] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_tiles_of_the_size_for_gpus(dtype):
    rows, columns = 2 * low_rank_triton.TILE[0] + 1, 2 * low_rank_triton.TILE[1] + 8
    sources = [numbers(DTYPES[dtype], rows * columns, k).view(rows, columns) for k in range(2)]
    left, right = (
        numbers(torch.float32, rows * 3, 5).view(rows, 3),
        numbers(torch.float32, 3 * columns, 6).view(3, columns),
    )
    out = poisoned(rows, columns, dtype=DTYPES[dtype])
    scales = torch.tensor([0.5, 0.0, -2.0])
    low_rank_triton.GroupedSums([LowRankGroup(sources, left, right, out)])([0.4, 0.6], [scales])
    assert_same_bits(out, reference.low_rank_sum(sources, [0.4, 0.6], left, right, scales))


def test_absent_ranks_and_sources():
    """Their NaN does not spread, and -0.0 stays what it is where nothing is added."""
    negative, nan = torch.full((5, 20), -0.0), torch.full((5, 20), float("nan"))
    left, right = torch.full((5, 2), float("nan")), torch.full((2, 20), float("nan"))
    out = torch.ones(5, 20)
    sums = low_rank_triton.GroupedSums([LowRankGroup([nan, negative], left, right, out)], TILE)
    sums([0.0, 1.0], [torch.zeros(2)])
    assert_same_bits(out, negative)
    sums([0.0, 1.0], [torch.tensor([0.0, 1.0])])
    assert out.isnan().all()


def test_the_default_device_of_torch_is_of_no_account():
    """A serving engine makes the GPU the default device while weights change."""
    source, out = numbers(torch.bfloat16, 100, 1).view(5, 20), poisoned(5, 20, dtype=torch.bfloat16)
    left, right = numbers(torch.float32, 10, 2).view(5, 2), numbers(torch.float32, 40, 3).view(2, 20)
    scales = torch.tensor([0.5, 2.0])
    with torch.device("meta"):
        low_rank_triton.GroupedSums([LowRankGroup([source], left, right, out)], TILE)([0.25], [scales])
    assert_same_bits(out, reference.low_rank_sum([source], [0.25], left, right, scales))
