"""Weighted sums of torch tensors: any strides, many groups, equal to the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, assert_same_bits, numbers, poisoned, weight_lists

from mergemix_kernels import dispatch, reference
from mergemix_kernels.dispatch import GroupedWeightedSum, weighted_sum
from mergemix_kernels.weights import MAX_SOURCES


@st.composite
def views(draw, shape: tuple[int, ...], order: list[int], steps: list[int], dtype: torch.dtype, seed: int):
    """A tensor of `shape` that is a view into a larger one: dimensions in `order`, every step-th element."""
    stored = [shape[d] * steps[d] + draw(st.integers(0, 1)) * (steps[d] - 1) for d in order]
    whole = numbers(dtype, torch.Size(stored).numel(), seed).view(stored)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    view = whole.permute(inverse)
    return view[tuple(slice(0, shape[d] * steps[d], steps[d]) for d in range(len(shape)))]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=80, deadline=None)
@given(data=st.data(), weights=weight_lists(4), shape=st.lists(st.integers(0, 9), max_size=4).map(tuple))
def test_any_strides(dtype, data, weights, shape):
    def draw_view(seed: int) -> torch.Tensor:
        order = data.draw(st.permutations(range(len(shape))))
        steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
        return data.draw(views(shape, order, steps, DTYPES[dtype], seed))

    sources, out = [draw_view(seed) for seed in range(len(weights))], draw_view(99)
    out.fill_(float("nan"))
    weighted_sum(sources, weights, out)
    assert_same_bits(out, reference.weighted_sum(sources, weights))


def test_large_strided_tensors_go_in_bounded_pieces(monkeypatch):
    monkeypatch.setattr(dispatch, "PIECE_ELEMENTS", 100)
    sources = [numbers(torch.bfloat16, 31 * 14 * 3, seed).view(31, 14, 3)[:, ::2] for seed in range(3)]
    pieces = list(dispatch.pieces(sources, 100))
    assert max(piece[-1].numel() for piece in pieces) <= 100
    assert sum(piece[-1].numel() for piece in pieces) == 31 * 7 * 3
    whole = poisoned(3, 7, 31, dtype=torch.bfloat16)
    weighted_sum(sources, [0.5, 0.2, 0.3], whole.permute(2, 1, 0))
    assert torch.equal(whole.permute(2, 1, 0), reference.weighted_sum(sources, [0.5, 0.2, 0.3]))


def test_strided_groups_of_several_sizes_share_a_scratch_and_are_replayed(monkeypatch):
    monkeypatch.setattr(dispatch, "PIECE_ELEMENTS", 40)
    groups = []
    for g, (rows, dtype) in enumerate([(2, "BF16"), (9, "F32"), (30, "BF16"), (5, "F32")]):
        sources = [numbers(DTYPES[dtype], rows * 14, 10 * g + k).view(rows, 14)[:, ::2] for k in range(2)]
        sources.append(numbers(DTYPES[dtype], rows * 7, 10 * g + 2).view(rows, 7))  # needs no gathering
        outs = [poisoned(7, rows, dtype=DTYPES[dtype]).t(), poisoned(rows, 7, dtype=DTYPES[dtype])]
        groups.append((sources, outs))
    grouped = GroupedWeightedSum(groups)
    for weights in ([0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [2.0, 0.0, -1.0]):
        both = [weights, weights[::-1]]
        grouped(both)
        for sources, outs in groups:
            for of_output, out in zip(both, outs, strict=True):
                assert torch.equal(out, reference.weighted_sum(sources, of_output))
        groups[0][0][0].mul_(2)  # read anew by every call


def test_only_the_elements_of_a_strided_out_are_written():
    storage = torch.full((10, 10), 7.0)
    weighted_sum([torch.ones(5, 10), torch.ones(5, 10)], [1.0, 2.0], storage[::2])
    assert torch.equal(storage[::2], torch.full((5, 10), 3.0))
    assert torch.equal(storage[1::2], torch.full((5, 10), 7.0))


def test_transposed_tensors_need_no_temporaries():
    tensors = [numbers(torch.float32, 600, seed).view(20, 30).t() for seed in range(3)]
    flat = dispatch.flatten(tensors)
    assert [view.data_ptr() for view in flat] == [tensor.data_ptr() for tensor in tensors]


def test_out_may_be_a_source_and_may_require_grad():
    sources = [torch.nn.Parameter(numbers(torch.float32, 64, seed).view(8, 8)) for seed in range(2)]
    expected = reference.weighted_sum(sources, [0.25, 0.75])
    weighted_sum(sources, [0.25, 0.75], sources[0])
    assert torch.equal(sources[0], expected)
    assert sources[0].requires_grad


def test_groups_are_replayed_with_new_weights():
    shapes = [((4, 5), "BF16"), ((0,), "F32"), ((), "F16"), ((3000, 40), "BF16"), ((6, 7), "F32")]
    groups, strided_out = [], poisoned(14, 6, dtype=torch.float32)
    for g, (shape, dtype) in enumerate(shapes):
        count = torch.Size(shape).numel()
        sources = [numbers(DTYPES[dtype], count, 10 * g + k).view(shape) for k in range(3)]
        out = strided_out[::2].t() if g == 4 else poisoned(*shape, dtype=DTYPES[dtype])
        groups.append((sources, [out]))
    grouped = GroupedWeightedSum(groups)
    for weights in ([0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [2.0, -1.0, 0.0]):
        grouped([weights])
        for sources, [out] in groups:
            assert torch.equal(out, reference.weighted_sum(sources, weights))


def test_no_groups_is_nothing_to_do():
    GroupedWeightedSum([])([[1.0]])


def test_refused_weights_write_nothing():
    out = torch.zeros(4)
    outs = [out, torch.zeros(4)]
    grouped = GroupedWeightedSum([([torch.ones(4), torch.ones(4)], outs)])
    for weights in ([1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weight"):
            grouped([[1.0, 1.0], weights])
    with pytest.raises(ValueError, match="for 2 outs, but got 1"):
        grouped([[1.0, 1.0]])
    assert torch.equal(torch.stack(outs), torch.zeros(2, 4))


def test_several_outs_of_any_strides():
    sources = [numbers(torch.float16, 60, seed).view(5, 12) for seed in range(3)]
    storage = poisoned(12, 10, dtype=torch.float16)
    outs = [poisoned(5, 12, dtype=torch.float16), storage[:, ::2].t()]
    weights = [[0.5, 0.0, 0.25], [0.0, -1.0, 3.0]]
    GroupedWeightedSum([(sources, outs)])(weights)
    for of_output, out in zip(weights, outs, strict=True):
        assert torch.equal(out, reference.weighted_sum(sources, of_output))


@pytest.mark.parametrize(
    ("sources", "out", "message"),
    [
        ([torch.ones(4)], torch.ones(4, dtype=torch.float16), "same dtype"),
        ([torch.ones(4), torch.ones(2, 2)], torch.ones(4), "source 1 and out must have the same shape"),
        ([torch.ones(4, device="meta")], torch.ones(4), "same device"),
        ([torch.ones(4, device="meta")], torch.ones(4, device="meta"), "must be on a CPU or a GPU"),
        ([torch.ones(4, dtype=torch.float64)], torch.ones(4, dtype=torch.float64), "dtype must be one of"),
        ([], torch.ones(4), f"from 1 to {MAX_SOURCES}"),
        ([torch.ones(4)] * (MAX_SOURCES + 1), torch.ones(4), f"from 1 to {MAX_SOURCES}"),
    ],
)
def test_refuses(sources, out, message):
    with pytest.raises(ValueError, match=message):
        weighted_sum(sources, [1.0] * len(sources), out)


def test_groups_must_agree():
    one, two = ([torch.ones(4)], [torch.ones(4)]), ([torch.ones(4)] * 2, [torch.ones(4)])
    with pytest.raises(ValueError, match="one number of sources"):
        GroupedWeightedSum([one, two])
    two_outs = ([torch.ones(4)], [torch.ones(4), torch.ones(4)])
    with pytest.raises(ValueError, match="one of outs"):
        GroupedWeightedSum([one, two_outs])
    with pytest.raises(ValueError, match="at least one out"):
        GroupedWeightedSum([([torch.ones(4)], [])])


def test_of_several_outs_none_may_be_another_or_a_source():
    source, out = torch.ones(4), torch.ones(4)
    for outs in ([out, out], [out, source]):
        with pytest.raises(ValueError, match="none may be another, or a source"):
            GroupedWeightedSum([([source], outs)])
