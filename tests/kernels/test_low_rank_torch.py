"""Sums plus low-rank products of torch matrices: on the CPU, in Triton's interpreter, and as machine code."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_interpreter import run_interpreted
from kernel_samples import DTYPES, any_bits, assert_same_bits, numbers, poisoned

from mergemix_kernels import low_rank, reference
from mergemix_kernels.ahead_of_time import CAPABILITIES, machine_code
from mergemix_kernels.low_rank import GroupedLowRankSum, LowRankGroup


def laid_out(draw, shape: tuple[int, ...], values: torch.Tensor) -> torch.Tensor:
    """`values` in memory of any order of dimensions, with gaps or without."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([0, 0, 3])) for _ in shape]
    memory = torch.full([shape[d] + gaps[d] for d in order], 7.0).to(values.dtype)
    view = memory[tuple(slice(shape[d]) for d in order)].permute([order.index(d) for d in range(len(shape))])
    view.copy_(values.view(shape))
    return view


@st.composite
def groups(draw, sources: int):
    """A group of which every tensor has strides of its own, and its matrices' values."""
    dtype = DTYPES[draw(st.sampled_from(list(DTYPES)))]
    over_rows = draw(st.lists(st.sampled_from([1, 2, 3, 5]), max_size=3))
    over_columns = draw(st.lists(st.sampled_from([1, 4, 7, 16]), max_size=2))
    rows, columns = int(torch.tensor([1, *over_rows]).prod()), int(torch.tensor([1, *over_columns]).prod())
    ranks, make = draw(st.integers(0, 6)), draw(st.sampled_from([numbers, any_bits]))
    values = [make(dtype, rows * columns, 10 + k).view(rows, columns) for k in range(sources)]
    left = make(torch.float32, rows * ranks, 1).view(rows, ranks)
    if draw(st.booleans()):
        left = left.t().contiguous().t()
    right = make(torch.float32, ranks * columns, 2).view(ranks, columns)
    shape = (*over_rows, *over_columns)
    operands = [laid_out(draw, shape, each) for each in values]
    out_dtype = draw(st.sampled_from([dtype, dtype, torch.float32]))
    out = laid_out(draw, shape, torch.full((rows * columns,), 9.0).to(out_dtype))
    return LowRankGroup(operands, left, right, out), values


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    count=st.integers(1, 4),
    sources=st.integers(1, 3),
    piece=st.sampled_from([1, 20, 1 << 20]),
)
def test_any_strides_equal_the_reference(data, count, sources, piece):
    """Groups of every dtype, shape and layout at once, in pieces or whole; then again with other numbers."""
    drawn = [data.draw(groups(sources)) for _ in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "PIECE_ELEMENTS", piece)
        sums = GroupedLowRankSum([group for group, _ in drawn])
    for _ in range(2):
        weights = [data.draw(st.sampled_from([0.0, 0.3, 1.0, -0.7])) for _ in range(sources - 1)] + [0.25]
        scales = [
            torch.tensor([data.draw(st.sampled_from([0.0, 0.7, -1.3])) for _ in range(group.left.shape[1])])
            for group, _ in drawn
        ]
        sums(weights, scales)
        for (group, values), of_group in zip(drawn, scales, strict=True):
            expected = reference.low_rank_sum(values, weights, group.left, group.right, of_group)
            expected = expected.to(group.out.dtype).view(group.out.shape)
            assert_same_bits(group.out.contiguous(), expected)
            storage = torch.empty(0, dtype=group.out.dtype).set_(group.out.untyped_storage())
            inside = torch.zeros_like(storage, dtype=torch.bool)
            inside.as_strided(group.out.shape, group.out.stride(), group.out.storage_offset()).fill_(True)
            assert (storage[~inside] == 7).all()


def test_out_may_be_a_source_and_empty_groups_do_nothing():
    source = numbers(torch.bfloat16, 60, 0).view(5, 12)
    left, right = numbers(torch.float32, 10, 1).view(5, 2), numbers(torch.float32, 24, 2).view(2, 12)
    scales = torch.tensor([0.5, -1.0])
    expected = reference.low_rank_sum([source], [1.0], left, right, scales)
    empty = LowRankGroup([torch.empty(0, 4)], torch.empty(0, 3), torch.empty(3, 4), torch.empty(0, 4))
    GroupedLowRankSum([empty, LowRankGroup([source], left, right, source)])([1.0], [torch.zeros(3), scales])
    assert torch.equal(source, expected)
    GroupedLowRankSum([])([], [])


def group(**changes) -> LowRankGroup:
    parts = {
        "sources": [torch.ones(3, 4)],
        "left": torch.ones(3, 2),
        "right": torch.ones(2, 4),
        "out": torch.zeros(3, 4),
    }
    return LowRankGroup(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "number of sources must be from 1 to"),
        ({"sources": [torch.ones(3, 4).double()]}, "sources must be torch.bfloat16"),
        ({"sources": [torch.ones(3, 4), torch.ones(3, 4).half()]}, "all sources must be torch.float32"),
        ({"out": torch.zeros(3, 4, dtype=torch.int32)}, "out floating point"),
        ({"out": torch.zeros(4, 3)}, r"left must be \[m, R\]"),
        ({"left": torch.ones(4, 2)}, r"left must be \[m, R\]"),
        ({"right": torch.ones(3, 4)}, r"left must be \[m, R\]"),
        ({"sources": [torch.ones(2, 6)], "out": torch.ones(2, 6)}, r"left must be \[m, R\]"),
        ({"left": torch.ones(3, 2).half()}, "factors must be float32"),
        ({"left": torch.ones(3, 2, device="meta")}, "one device, but got"),
    ],
)
def test_refuses_groups(changes, message):
    with pytest.raises(ValueError, match=message):
        GroupedLowRankSum([group(**changes)])


@pytest.mark.parametrize(
    ("weights", "scales", "message"),
    [
        ([0.0], [torch.ones(2)], "must not be zero"),
        ([1.0, 1.0], [torch.ones(2)], "one weight per source"),
        ([1.0], [torch.ones(3)], r"scales of \[2\] ranks"),
        ([1.0], [], r"scales of \[2\] ranks"),
        ([1.0], [torch.tensor([1.0, float("nan")])], "scales must be finite"),
        ([1.0], [torch.ones(2).double()], "scales must be finite float32"),
    ],
)
def test_refuses_numbers_before_anything_is_written(weights, scales, message):
    one = group()
    with pytest.raises(ValueError, match=message):
        GroupedLowRankSum([one])(weights, scales)
    assert not one.out.any()
    with pytest.raises(ValueError, match="one number of sources"):
        GroupedLowRankSum([one, group(sources=[torch.ones(3, 4)] * 2)])


def test_large_matrices_go_through_bounded_scratch():
    """A transposed destination of several pieces."""
    rows, columns = 900, 1500
    source = numbers(torch.bfloat16, rows * columns, 0).view(rows, columns)
    left, right = (
        numbers(torch.float32, rows * 2, 1).view(rows, 2),
        numbers(torch.float32, columns * 2, 2).view(2, columns),
    )
    out = poisoned(columns, rows, dtype=torch.bfloat16)
    sums = GroupedLowRankSum([LowRankGroup([source], left, right, out.t())])
    [(_, scratched)] = sums._steps
    assert len(scratched._steps) == 2
    buffers = {buffers[-1].untyped_storage().data_ptr() for _, buffers, _ in scratched._steps}
    assert len(buffers) == 1
    sums([1.0], [torch.tensor([0.3, 0.7])])
    assert torch.equal(
        out.t(), reference.low_rank_sum([source], [1.0], left, right, torch.tensor([0.3, 0.7]))
    )


def test_in_the_interpreter():
    run_interpreted("interpreted_low_rank.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability):
    from triton.compiler import ASTSource

    from mergemix_kernels import low_rank_triton

    constants = dict(zip(("TILE_ROWS", "TILE_COLUMNS"), low_rank_triton.TILE, strict=True))
    signature = {"table": "*i64", "row_length": "i32", "tile_group": "*i32", "tiles": "i32", "terms": "*i32"}
    signature |= {"active": "i32", "starts": "*i32", "ranks": "*i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=low_rank_triton.low_rank_kernel, signature=signature, constexprs=constants)
    code = machine_code(source, capability, low_rank_triton.WARPS)
    ptx, sass, resources = code["ptx"], code["sass"], code["resources"]
    assert "fma.rn" not in ptx
    assert "FFMA" not in sass
    assert "mul.rn.f32" in ptx, "a product without .rn may be fused by the assembler"
    assert "add.rn.f32" in ptx
    assert ".ftz" not in ptx, "subnormals must survive"
    assert re.search(r"\bLDG\.E\.128", sass), "full aligned tiles are read by vectors"
    assert re.search(r"\bSTG\.E\.128", sass)
    used = dict(re.findall(r"(\w+):(\d+)", resources))
    assert used["STACK"] == used["LOCAL"] == "0", "registers spilled to memory"
    threads = 32 * low_rank_triton.WARPS * low_rank_triton.PROGRAMS
    assert int(used["REG"]) * threads <= 65_536, "not all programs of a multiprocessor are resident"


@pytest.mark.parametrize(
    ("wider", "shift", "aligned"),
    [(0, 0, True), (8, 0, True), (4, 0, False), (1, 0, False), (0, 1, False), (0, 8, True)],
)
def test_vectors_are_for_matrices_of_which_every_row_is_aligned(wider, shift, aligned):
    """The interpreter takes no notice; a GPU would fail."""
    from mergemix_kernels import low_rank_triton

    memory = torch.zeros(4 * (16 + wider) + shift + 8, dtype=torch.bfloat16)
    begin = -memory.data_ptr() // 2 % 8 + shift
    source = torch.as_strided(memory, (4, 16), (16 + wider, 1), begin)
    out = torch.zeros(4, 16, dtype=torch.bfloat16)
    for group in (
        LowRankGroup([source], torch.ones(4, 1), torch.ones(1, 16), out),
        LowRankGroup([out], torch.ones(4, 1), torch.ones(1, 16), source),
    ):
        row = low_rank_triton._row(group, group.right, 0)
        assert row[low_rank_triton.ALIGNED.value] == aligned
