"""Sums streamed through a ring of slots: real arithmetic on CPU tensors, by lanes that run late and out of turn."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import DTYPES, assert_same_bits, numbers, poisoned
from late_lanes import LateLanes

from mergemix_kernels import reference
from mergemix_kernels.pinned import Ring, StreamedSum, Unread


def check(lanes: LateLanes, streamed: StreamedSum, groups, weights) -> bool:
    """Whether a call gives what the reference gives. Spoils everything that it has promised to be done with."""
    expected = [
        [
            reference.weighted_sum(sources, of_output).to(out.dtype)
            for of_output, out in zip(weights, outs, strict=True)
        ]
        for sources, outs in groups
    ]
    saved = [[source.clone() for source in sources] for sources, _ in groups]
    resident = [
        (source, clone)
        for (sources, _), clones in zip(groups, saved, strict=True)
        for source, clone in zip(sources, clones, strict=True)
        if lanes.where(source) == "device"
    ]
    for source, _ in resident:
        source.fill_(float("nan"))

    def fill() -> None:  # work that the caller's lane still has before it when the call is made
        for source, clone in resident:
            source.copy_(clone)
        for _, outs in groups:
            for out in outs:
                if lanes.where(out) == "device":
                    out.fill_(float("nan"))

    lanes.run("caller", fill)
    streamed(weights)
    for sources, _ in groups:
        for source in sources:
            if lanes.where(source) != "device":
                source.fill_(float("nan"))
    actual = [[out.clone() for out in outs] for _, outs in groups]  # those on the host are there

    def read() -> None:  # and work that it gets afterwards
        for (_, outs), copies in zip(groups, actual, strict=True):
            for out, copy in zip(outs, copies, strict=True):
                if lanes.where(out) == "device":
                    copy.copy_(out)

    lanes.run("caller", read)
    lanes.finish()
    for (sources, _), clones in zip(groups, saved, strict=True):
        for source, clone in zip(sources, clones, strict=True):
            source.copy_(clone)
    try:
        for of_group, wanted in zip(actual, expected, strict=True):
            for one, other in zip(of_group, wanted, strict=True):
                assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


PLACES = ["pageable", "pinned", "device"]


def streamed_sum(lanes: LateLanes, groups, ring: Ring) -> StreamedSum:
    """With the sources whose place is "nowhere" shown as `meta` tensors, and read when they are needed."""

    def shown(source: torch.Tensor) -> torch.Tensor:
        if lanes.where(source) != "nowhere":
            return source
        whole = torch.empty(source.untyped_storage().nbytes() // source.element_size(), dtype=source.dtype)
        return whole.to("meta").as_strided(source.shape, source.stride(), source.storage_offset())

    def read(parts: Sequence[Unread]) -> None:
        for part in parts:
            view, source = part.view, groups[part.group][0][part.source]
            assert part.into.is_contiguous()
            part.into.copy_(source.as_strided(view.shape, view.stride(), view.storage_offset()))

    return StreamedSum(
        [([shown(source) for source in sources], outs) for sources, outs in groups], ring, read
    )


LAYOUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda whole: whole[:, ::2].clone(),
    lambda whole: whole[:, ::2],
    lambda whole: whole[:, ::2].t().clone().t(),
]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_mix_of_places_strides_and_dtypes_equals_the_reference(data):
    lanes = LateLanes(data.draw(st.integers(0, 1 << 20)))
    source_count, outputs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))

    def tensor(rows: int, columns: int, dtype: torch.dtype, seed: int, places: list[str]) -> torch.Tensor:
        whole = numbers(dtype, rows * columns * 2, seed).view(rows, columns * 2)
        return lanes.put(data.draw(st.sampled_from(LAYOUTS))(whole), data.draw(st.sampled_from(places)))

    groups = []
    for g in range(data.draw(st.integers(1, 4))):
        rows, columns = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
        dtype = DTYPES[data.draw(st.sampled_from(list(DTYPES)))]
        of_out = data.draw(st.sampled_from([dtype, dtype, torch.bfloat16, torch.float32]))
        sources = [
            tensor(rows, columns, dtype, 10 * g + k, [*PLACES, "nowhere"]) for k in range(source_count)
        ]
        groups.append((sources, [tensor(rows, columns, of_out, 7, PLACES) for _ in range(outputs)]))
    slot_bytes = 256 * (source_count + outputs) * data.draw(st.integers(1, 6))
    slots = data.draw(st.integers(1, 3))
    streamed = streamed_sum(lanes, groups, Ring(lanes, slot_bytes=slot_bytes, slots=slots))
    one = st.sampled_from([0.0, 0.25, -1.0, 1 / 3])
    for _ in range(2):
        row = st.lists(one, min_size=source_count, max_size=source_count).filter(any)
        weights = data.draw(st.lists(row, min_size=outputs, max_size=outputs))
        assert check(lanes, streamed, groups, weights)
    assert lanes.allocated <= 2 * slots * slot_bytes


def scenario(seed: int, ignored: frozenset[tuple[str, str]], place: str, out_place: str) -> bool:
    """Whether everything is right where sources and outs are in the given places."""
    lanes = LateLanes(seed, ignored)
    groups = []
    for g in range(2):
        layout = LAYOUTS[place == "device"]
        sources = [
            lanes.put(layout(numbers(torch.float32, 1600, 10 * g + k).view(20, 80)), place) for k in range(2)
        ]
        groups.append((sources, [lanes.put(poisoned(20, 40, dtype=torch.float32), out_place)]))
    streamed = streamed_sum(lanes, groups, Ring(lanes, slot_bytes=3 * 512, slots=2))
    return all(check(lanes, streamed, groups, [[0.5, w]]) for w in (0.25, 2.0))


SEEDS = range(25)
NEEDED = {
    ("sum", "in"): ("pageable", "device"),  # sums what has not come in
    ("in", "sum"): ("pinned", "device"),  # the next sources overwrite what is not summed yet
    ("host", "in"): (
        "pageable",
        "device",
    ),  # the next sources overwrite the staging that is still copied from
    ("out", "sum"): ("pageable", "pinned"),  # copies results back that are not there yet
    ("sum", "out"): ("pageable", "pinned"),  # the next results overwrite those that are not copied back yet
    ("host", "out"): ("pageable", "pageable"),  # hands over what has not come back
    ("in", "caller"): ("device", "device"),  # reads what the caller has not written yet
    ("caller", "sum"): ("pageable", "device"),  # the caller reads what is not summed yet
}


@pytest.mark.parametrize(
    ("wait", "places"), NEEDED.items(), ids=[" waits for ".join(pair) for pair in NEEDED]
)
def test_every_wait_is_needed_and_together_they_suffice(wait, places):
    assert all(scenario(seed, frozenset(), *places) for seed in SEEDS)
    assert not all(scenario(seed, frozenset([wait]), *places) for seed in SEEDS)


def test_nothing_is_read_into_memory_that_is_still_copied_from():
    wait = ("host", "in")
    assert all(scenario(seed, frozenset(), "nowhere", "device") for seed in SEEDS)
    assert not all(scenario(seed, frozenset([wait]), "nowhere", "device") for seed in SEEDS)


def test_what_cannot_be_read_ends_the_call_and_the_next_one_is_right():
    lanes = LateLanes(3)
    sources = [lanes.put(numbers(torch.bfloat16, 5000, k), "nowhere") for k in range(2)]
    out = lanes.put(poisoned(5000, dtype=torch.bfloat16), "device")
    groups = [(sources, [out])]
    streamed = streamed_sum(lanes, groups, Ring(lanes, slot_bytes=3 * 1024, slots=2))
    read, calls = streamed._read, []

    def fail(parts: Sequence[Unread]) -> None:
        calls.append(parts)
        if len(calls) == 4:
            raise OSError("injected")
        read(parts)

    streamed._read = fail
    with pytest.raises(OSError, match="injected"):
        streamed([[0.5, 0.25]])
    assert check(lanes, streamed, groups, [[0.5, 0.25]])
    with pytest.raises(ValueError, match="need `read`"):
        StreamedSum([([torch.empty(4, device="meta")], [torch.ones(4)])], Ring(lanes, slot_bytes=1 << 12))


def test_a_source_of_weight_zero_is_neither_staged_nor_copied():
    lanes = LateLanes(0)
    sources = [lanes.put(numbers(torch.bfloat16, 500, k), "pageable") for k in range(3)]
    out = lanes.put(poisoned(500, dtype=torch.bfloat16), "device")
    ring = Ring(lanes, slot_bytes=1 << 13)
    StreamedSum([(sources, [out])], ring)([[0.5, 0.0, 0.5]])
    lanes.finish()
    second_row = slice((1 << 13) // 4, (1 << 13) // 4 + 1000)
    assert (ring.slots[0].staging[second_row] == 0xFF).all()
    assert (ring.slots[0].device[second_row] == 0xFF).all()
    assert torch.equal(out, reference.weighted_sum(sources, [0.5, 0.0, 0.5]))


def test_contiguous_pinned_sources_and_outs_need_no_staging():
    lanes = LateLanes(0)
    sources = [lanes.put(numbers(torch.float16, 5000, k), "pinned") for k in range(2)]
    out = lanes.put(poisoned(5000, dtype=torch.float16), "pinned")
    ring = Ring(lanes, slot_bytes=3 * 1024)
    StreamedSum([(sources, [out])], ring)([[0.5, 0.25]])
    assert lanes.allocated == 3 * 3 * 1024, "three slots on the device, none on the host"
    assert torch.equal(out, reference.weighted_sum(sources, [0.5, 0.25]))


def test_parts_of_one_source_that_are_staged_side_by_side_are_one_copy():
    lanes = LateLanes(0)
    groups = [([numbers(torch.float32, 8, 10 * g + k) for k in range(2)], [torch.zeros(8)]) for g in range(9)]
    streamed = StreamedSum(groups, Ring(lanes, slot_bytes=1 << 16))
    [batch] = streamed._batches
    assert [len(pairs) for pairs in batch.copied_in.values()] == [1, 1]
    assert check(lanes, streamed, groups, [[1.0, 2.0]])


def test_refuses_before_anything_is_written():
    sources, out = [torch.ones(4), torch.ones(4)], poisoned(4, dtype=torch.float32)
    ring = Ring(LateLanes(0), slot_bytes=1 << 12)
    streamed = StreamedSum([(sources, [out])], ring)
    for weights in ([1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weight"):
            streamed([weights])
    assert out.isnan().all()
    with pytest.raises(ValueError, match="shapes must be equal"):
        StreamedSum([(sources, [torch.ones(2, 2)])], ring)
    with pytest.raises(ValueError, match="256 bytes for each of 3"):
        StreamedSum([(sources, [out])], Ring(LateLanes(0), slot_bytes=700))
