"""The merge loop: exact on every sink, dtype, layout and memory size, and plain words for what goes wrong."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergemix.checkpoints.family import Family
from mergemix.errors import CheckpointError, FamilyError, NonFiniteError
from mergemix.merge import stream as stream_module
from mergemix.merge.plan import plan_merge
from mergemix.merge.sinks import ParameterSink, SafetensorsSink
from mergemix.merge.stream import MergeStats, stream
from mergemix.mixture import Mixture
from mergemix_kernels import cpu, cpu_tiles
from tests.merge.families import (
    NAMES,
    Tensors,
    bits,
    expected,
    poisoned_parameters,
    tiny_family,
    write_family,
)

Merge = Callable[..., tuple[Tensors, MergeStats]]


def merge_to_parameters(
    family: Family, mixture: Mixture, root: Path, **options: int
) -> tuple[Tensors, MergeStats]:
    plan = plan_merge(family, [mixture])
    parameters = poisoned_parameters(plan)
    stats = stream(plan, ParameterSink(plan, parameters), **options)
    return {name: torch.from_numpy(data) for name, data in parameters.items()}, stats


def merge_to_files(
    family: Family, mixture: Mixture, root: Path, **options: int
) -> tuple[Tensors, MergeStats]:
    plan = plan_merge(family, [mixture])
    with SafetensorsSink(root / "merged", plan, family.template) as sink:
        stats = stream(plan, sink, **options)
    merged: Tensors = {}
    for path in (root / "merged").glob("*.safetensors"):
        merged |= load_file(path)
    return {name: bits(tensor) for name, tensor in merged.items()}, stats


def merge_in_steps(
    family: Family, mixture: Mixture, root: Path, **options: int
) -> tuple[Tensors, MergeStats]:
    """As large blocks are merged whose operands are in the page cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_tiles, "STEP_BYTES", 512)
        patch.setattr(stream_module, "CACHED_BLOCK_BYTES", 1)
        return merge_to_files(family, mixture, root, **options)


@pytest.fixture(
    params=[merge_to_parameters, merge_to_files, merge_in_steps], ids=["parameters", "files", "steps"]
)
def merge(request: pytest.FixtureRequest) -> Merge:
    return request.param


SHAPES = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.just((1,)),
    st.tuples(st.integers(1, 9000)),
    st.tuples(*[st.integers(1, 20)] * 2),
)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
KINDS = st.sampled_from(["different", "equal", "equal at first"])


@st.composite
def families(draw: st.DrawFn) -> tuple[Tensors, dict[str, Tensors]]:
    """A base and K experts with the same names, shapes and dtypes; some tensors equal, some up to a point."""
    specs = draw(st.lists(st.tuples(SHAPES, DTYPES, KINDS), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    num_experts = draw(st.integers(1, 5))
    members: list[Tensors] = [{} for _ in range(num_experts + 1)]
    for number, (shape, dtype, kind) in enumerate(specs):
        first = torch.randn(shape, generator=generator) * 10
        for member in members:
            values = torch.randn(shape, generator=generator) * 10
            same = (
                values.numel()
                if kind == "equal"
                else values.numel() * 2 // 3
                if kind == "equal at first"
                else 0
            )
            values.view(-1)[:same] = first.view(-1)[:same]
            member[f"t{number}"] = values.to(dtype)
    return members[0], {f"e{k}": member for k, member in enumerate(members[1:])}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), members=families(), shards=st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_every_mixture_is_the_reference_bit_for_bit(
    merge: Merge,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    members: tuple[Tensors, dict[str, Tensors]],
    shards: list[int],
) -> None:
    base, experts = members
    weight = st.one_of(st.just(0.0), st.floats(0.01, 1.0))
    weights = data.draw(st.lists(weight, min_size=len(experts), max_size=len(experts)), label="weights")
    total = sum(weights)
    if total > 0 and data.draw(st.booleans(), label="normalised"):
        weights = [weight / total for weight in weights]
    mixture = Mixture(tuple(experts), tuple(weights))
    memory_bytes = data.draw(st.sampled_from([7 * 4096, 100_000, 400_000, 1 << 22]), label="memory_bytes")
    root = tmp_path_factory.mktemp("family")
    family = write_family(root, base, experts, [min(count, len(base)) for count in shards])
    merged, stats = merge(family, mixture, root, memory_bytes=memory_bytes)
    reference = expected(base, experts, mixture)
    assert merged.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(merged[name], bits(tensor)), name
    assert stats.tensors == len(reference)
    assert stats.bytes_written == sum(tensor.nbytes for tensor in reference.values())


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8),
)
def test_a_mixture_of_neighbours_is_within_one_ulp_of_fp64(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtype: torch.dtype, shares: list[float]
) -> None:
    # Experts that share a base have values of one sign and size; where values cancel, no fp32 sum has that bound.
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(500, generator=generator)
    base += base.sign() * 0.01
    names = [f"e{k}" for k in range(len(shares))]
    experts = {
        name: {"w": (base * (1 + 0.1 * torch.rand(500, generator=generator))).to(dtype)} for name in names
    }
    root = tmp_path_factory.mktemp("family")
    mixture = Mixture.of(names, dict(zip(names, shares, strict=True)))
    merged, _ = merge_to_parameters(write_family(root, None, experts), mixture, root)
    truth = sum(a * experts[name]["w"].double() for name, a in zip(names, mixture.weights, strict=True))
    assert isinstance(truth, torch.Tensor)
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(truth.abs())))
    # fp32 output: K products and weights and K-1 sums, each off by half an ulp of fp32 at most.
    bound = ulp if dtype != torch.float32 else ulp * (len(shares) + 1)
    assert bool(((merged["w"].view(dtype).double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_gives_the_expert_bit_for_bit(merge: Merge, tmp_path: Path, name: str) -> None:
    odd = torch.tensor([0x8000, 0x0001, 0x8001, 0x7F7F, 0xFF7F, 0x0000, 0x007F], dtype=torch.uint16)
    experts = {n: {"w": odd.view(torch.bfloat16).roll(k)} for k, n in enumerate(NAMES)}
    merged, stats = merge(write_family(tmp_path, None, experts), Mixture.one_hot(NAMES, name), tmp_path)
    assert torch.equal(merged["w"], bits(experts[name]["w"]))
    assert stats.bytes_read == stats.bytes_written == 14


def test_equal_fp32_tensors_stay_what_they_are(merge: Merge, tmp_path: Path) -> None:
    tensors = {"w": torch.randn(5000, generator=torch.Generator().manual_seed(0))}
    mixture = Mixture.of(NAMES, {"math": 0.3, "code": 0.3, "web": 0.4})
    rounded = sum(np.float32(a) * tensors["w"].numpy() for a in mixture.weights)
    assert not np.array_equal(rounded, tensors["w"].numpy())  # so a sum would have changed them
    family = write_family(tmp_path, None, dict.fromkeys(NAMES, tensors))
    merged, _ = merge(family, mixture, tmp_path, memory_bytes=4 * 4096)
    assert torch.equal(merged["w"], bits(tensors["w"]))


@pytest.mark.parametrize("num_equal", [1, 1000, 1500, 4999])
def test_fp32_tensors_equal_up_to_a_point_are_summed_throughout(
    merge: Merge, tmp_path: Path, num_equal: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    experts = {name: {"w": torch.randn(5000, generator=generator)} for name in NAMES}
    for tensors in experts.values():
        tensors["w"][:num_equal] = experts["math"]["w"][:num_equal]
    mixture = Mixture.of(NAMES, {"math": 0.3, "code": 0.3, "web": 0.4})
    merged, stats = merge(write_family(tmp_path, None, experts), mixture, tmp_path, memory_bytes=4 * 4096)
    assert torch.equal(merged["w"], bits(expected(None, experts, mixture)["w"]))
    assert stats.bytes_read <= 4 * stats.bytes_written  # three operands, and one of them once more


def test_an_expert_without_a_share_and_a_base_that_cancels_are_never_read(
    merge: Merge, tmp_path: Path
) -> None:
    family = tiny_family(tmp_path, with_base=True)
    for name in ("base", "code"):
        for path in (tmp_path / name).glob("*.safetensors"):
            path.unlink()
    _, stats = merge(family, Mixture(NAMES, (0.5, 0.0, 0.5)), tmp_path)
    assert stats.bytes_read == 2 * stats.bytes_written
    plan = plan_merge(family, [Mixture.uniform(NAMES)])
    with pytest.raises(CheckpointError, match=r"cannot read tensor .*code.*No such file"):
        stream(plan, ParameterSink(plan, poisoned_parameters(plan)))


def test_progress_adds_up(tmp_path: Path) -> None:
    equal_at_first = torch.ones(8000)
    experts = {"math": {"w": equal_at_first}, "code": {"w": equal_at_first.clone()}}
    experts["code"]["w"][-1] = 2
    plan = plan_merge(write_family(tmp_path, None, experts), [Mixture(("math", "code"), (0.5, 0.5))])
    done: list[int] = []
    stream(plan, ParameterSink(plan, poisoned_parameters(plan)), memory_bytes=3 * 4096, progress=done.append)
    assert sum(done) == plan.bytes_written
    assert len(done) > 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_and_inf_are_told_with_tensor_and_expert(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    experts = {name: {"good": torch.ones(9).to(dtype), "bad": torch.ones(700).to(dtype)} for name in NAMES}
    experts["code"]["bad"][699] = value
    family = write_family(tmp_path, None, experts)
    for mixture in (Mixture.uniform(NAMES), Mixture.one_hot(NAMES, "code")):
        plan = plan_merge(family, [mixture])
        with pytest.raises(NonFiniteError, match=r"'bad' holds NaN or Inf in code \(") as caught:
            stream(plan, ParameterSink(plan, poisoned_parameters(plan)), memory_bytes=4 * 4096)
        assert "math" not in str(caught.value)
    plan = plan_merge(family, [Mixture(NAMES, (0.5, 0.0, 0.5))])
    stream(plan, ParameterSink(plan, poisoned_parameters(plan)))


def test_an_overflow_is_told_as_such(tmp_path: Path) -> None:
    names = ("math", "code")
    experts = {
        name: {"w": torch.full((3,), 60000.0 * sign).half()}
        for name, sign in zip(names, (1, -1), strict=True)
    }
    plan = plan_merge(write_family(tmp_path, None, experts), [Mixture(names, (1.5, -0.5))])
    with pytest.raises(NonFiniteError, match=r"'w'.*beyond the range of F16.*math 1.5, code -0.5"):
        stream(plan, ParameterSink(plan, poisoned_parameters(plan)))


def test_a_file_that_shrinks_after_opening_is_told(tmp_path: Path) -> None:
    experts = {name: {"w": torch.full((50_000,), float(k))} for k, name in enumerate(NAMES)}
    family = write_family(tmp_path, None, experts)
    plan = plan_merge(family, [Mixture.uniform(NAMES)])
    path = family.experts[0].tensors["w"].path
    size = path.stat().st_size - 1
    before = len(os.listdir("/proc/self/fd"))

    def shrink(done: int) -> None:
        os.truncate(path, size)

    with pytest.raises(CheckpointError, match=rf"{path} was (truncated while it was read|changed after)"):
        stream(plan, ParameterSink(plan, poisoned_parameters(plan)), memory_bytes=4 * 4096, progress=shrink)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", ["vanished", "replaced", "rewritten"])
def test_a_file_that_changes_while_it_is_read_is_told_at_the_end(tmp_path: Path, change: str) -> None:
    family = tiny_family(tmp_path)
    plan = plan_merge(family, [Mixture.uniform(NAMES)])
    path = family.experts[2].tensors["norm"].path
    changes = {"vanished": Path.unlink, "replaced": replaced, "rewritten": rewritten}
    message = "vanished while" if change == "vanished" else "was changed after"

    def after_reading(done: int) -> None:
        changes.pop(change, lambda path: None)(path)

    with pytest.raises(CheckpointError, match=rf"{path} {message}"):
        stream(plan, ParameterSink(plan, poisoned_parameters(plan)), progress=after_reading)


def replaced(path: Path) -> None:
    """Another file of the same size and time in one step, as a download that starts again makes it."""
    before = path.stat()
    path.with_suffix(".new").write_bytes(bytes(before.st_size))
    os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").replace(path)


def rewritten(path: Path) -> None:
    """The same file of the same size, written again in place, at no moment shorter."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def grown(path: Path) -> None:
    before = path.stat()
    os.truncate(path, before.st_size + 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [replaced, rewritten, grown])
def test_a_file_that_changes_after_opening_is_never_read(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    family = tiny_family(tmp_path)
    plan = plan_merge(family, [Mixture.uniform(NAMES)])
    path = family.experts[1].tensors["norm"].path
    change(path)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=rf"{path} was changed after it was opened"):
        stream(plan, ParameterSink(plan, poisoned_parameters(plan)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, mixture = tiny_family(tmp_path), Mixture.uniform(NAMES)
    whole, _ = merge_to_parameters(family, mixture, tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:37]], offset))
    pieces, _ = merge_to_parameters(family, mixture, tmp_path)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_parameters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = plan_merge(tiny_family(tmp_path), [Mixture.uniform(NAMES)])
    parameters = poisoned_parameters(plan)
    for wrong in (parameters["norm"][:-1], parameters["norm"].view(np.uint16)):
        with pytest.raises(FamilyError, match="'norm' has 32 bytes"):
            ParameterSink(plan, parameters | {"norm": wrong})
    del parameters["norm"]
    with pytest.raises(FamilyError, match=r"'norm' .*no live parameter"):
        ParameterSink(plan, parameters)


@pytest.mark.parametrize(("free_memory", "forgotten"), [(1 << 40, False), (100, True)])
def test_inputs_that_memory_cannot_hold_are_not_left_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_memory: int, forgotten: bool
) -> None:
    plan = plan_merge(tiny_family(tmp_path), [Mixture.uniform(NAMES)])
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(stream_module, "free_memory", lambda: free_memory)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, offset, nbytes, advice: told.append((advice, nbytes))
    )
    stream(plan, ParameterSink(plan, poisoned_parameters(plan)))
    assert {advice for advice, _ in told} == ({os.POSIX_FADV_DONTNEED} if forgotten else set())
    assert sum(nbytes for _, nbytes in told) == (plan.bytes_read if forgotten else 0)


def test_large_blocks_are_summed_as_they_are_read_from_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And others are not: those whose operands begin alike, and what is not in the cache."""
    generator = torch.Generator().manual_seed(0)
    members = [{"t": torch.randn(1_000_001, generator=generator).bfloat16()} for _ in range(4)]
    for member in members:
        member["equal"] = members[0]["t"] + 1
    base, *rest = members
    experts = {f"e{k}": member for k, member in enumerate(rest)}
    family = write_family(tmp_path, base, experts)
    mixture = Mixture(tuple(experts), (0.2, 0.3, 0.5))
    found: list[bool | None] = []
    of_cached_files = cpu.WeightedSums.of_cached_files

    def watched(self: cpu.WeightedSums, *arguments: object) -> bool | None:
        found.append(of_cached_files(self, *arguments))
        return found[-1]

    monkeypatch.setattr(cpu.WeightedSums, "of_cached_files", watched)
    reference = expected(base, experts, mixture)
    for path in tmp_path.rglob("*.safetensors"):
        path.read_bytes()
    merged, stats = merge_to_parameters(family, mixture, tmp_path)
    assert found == [True]
    assert stats.bytes_read == sum(tensor.nbytes for each in experts.values() for tensor in each.values())
    assert all(torch.equal(merged[name], bits(tensor)) for name, tensor in reference.items())
    found.clear()
    for path in tmp_path.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    merged, _ = merge_to_parameters(family, mixture, tmp_path)
    assert not any(found)
    assert all(torch.equal(merged[name], bits(tensor)) for name, tensor in reference.items())


def test_heads_that_are_not_wholly_at_hand_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal operands are copied, though a read of the page cache alone may give only the first bytes of a head."""
    values = {"t": torch.randn(1_000_001, generator=torch.Generator().manual_seed(0))}
    family = write_family(tmp_path, None, {"a": values, "b": values})
    preadv, reads = os.preadv, iter(range(10**6))

    def cut(descriptor: int, views: list[bytearray], offset: int, flags: int = 0) -> int:
        if flags and next(reads) % 2:  # b's
            views = [memoryview(views[0])[:32]]
        return preadv(descriptor, views, offset, flags)

    monkeypatch.setattr(os, "preadv", cut)
    merged, _ = merge_to_parameters(family, Mixture(("a", "b"), (0.3, 0.7)), tmp_path)
    assert torch.equal(merged["t"], bits(values["t"]))
