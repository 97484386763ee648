"""Reading from the page cache and around it: the same bits, and the same errors for files that change."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError
from mergemix.mixture import Mixture
from mergemix.serve import view_reader
from mergemix.serve.copies import same_bits
from mergemix.serve.recording import Recording
from mergemix.serve.swap_plan import SwapPlan
from mergemix.serve.view_reader import ViewReader

NAMES = ("math", "code")
BRANCHES = ["borrowed", "read"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def make_family(root: Path) -> Family:
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        (root / name).mkdir()
        tensors = {
            "cube": torch.randn(5, 7, 9, generator=generator),
            "large": torch.randn(3, 70, 90, generator=generator).bfloat16(),
            "odd": torch.randn(7, generator=generator).half(),
        }
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text("{}")
    return open_family(None, {name: str(root / name) for name in NAMES})


@pytest.fixture
def branch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the family may stay in the page cache, by how much memory is said to be free."""
    free = {"borrowed": 1 << 40, "read": 1000}[request.param]
    monkeypatch.setattr(view_reader, "free_memory", lambda: free)
    return str(request.param)


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda whole: whole,
    lambda whole: whole[1:],
    lambda whole: whole.transpose(0, -1),
    lambda whole: whole.flatten()[2:-1:3],
    lambda whole: whole[..., 1:4].expand(2, *whole[..., 1:4].shape),
    lambda whole: whole[:0],
]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["cube", "large", "odd"]),
    view=st.sampled_from(VIEWS),
    into=st.sampled_from([torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT if t.dim() > 1 else t]),
)
def test_views_around_the_page_cache_are_those_in_it(
    family: Family,
    name: str,
    view: Callable[[torch.Tensor], torch.Tensor],
    into: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    member = family.experts[1]
    whole = load_file(member.root / "model.safetensors")[name]
    expected, elements = view(whole), view(whole.to("meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_reader, "free_memory", lambda: 1000)
        around, inside = ViewReader(501), ViewReader(500)
    found = into(torch.zeros(expected.shape, dtype=whole.dtype))
    around.read(member.tensors[name], elements, found)
    assert same_bits(found, expected)
    assert around.borrow(member.tensors[name], elements) is None
    borrowed = inside.borrow(member.tensors[name], elements)
    assert (borrowed is None) == (
        not elements.is_contiguous() or member.tensors[name].offset % whole.itemsize > 0
    )
    if borrowed is not None:
        assert same_bits(borrowed.view(expected.shape), expected)
    for reader in (around, inside):
        reader.check_unchanged()
        reader.close()


def loaded(family: Family) -> tuple[SwapPlan, dict[str, torch.Tensor]]:
    recording = Recording(family, Mixture(NAMES, (1.0, 0.0)))
    parameters = {}
    for name, weight in recording.lazy_weights():
        parameters[name] = torch.empty(weight.shape, dtype=weight.dtype)
        parameters[name].copy_(weight)
    return recording.finish(parameters.values()), parameters


@pytest.mark.parametrize("branch", BRANCHES, indirect=True)
def test_swaps_of_a_family_that_memory_does_not_hold(family: Family, branch: str) -> None:
    plan, parameters = loaded(family)
    assert plan._sums.reader._forget == (branch == "read")
    for weights in ((0.25, 0.75), (0.0, 1.0), (0.5, 0.5)):
        plan.write(plan.change_to(Mixture(NAMES, weights)))
        members = [load_file(expert.root / "model.safetensors") for expert in family.experts]
        for name, parameter in parameters.items():
            first, second = (member[name].float() for member in members)
            wanted = (first * weights[0] + second * weights[1]).to(parameter.dtype)
            assert same_bits(parameter, wanted), name
    assert bool(plan._sums.reader._mapped) == (branch == "borrowed")
    plan.close()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [truncate, replace, Path.unlink])
@pytest.mark.parametrize("branch", BRANCHES, indirect=True)
def test_a_file_that_changed_since_the_load_is_named(
    tmp_path: Path, branch: str, change: Callable[[Path], None]
) -> None:
    family = make_family(tmp_path)
    plan, _ = loaded(family)
    path = family.experts[1].root / "model.safetensors"
    change(path)
    wanted = Mixture(NAMES, (0.25, 0.75))
    with pytest.raises(CheckpointError) as error:
        plan.write(plan.change_to(wanted))
    assert str(path) in str(error.value)
    assert plan.change_to(wanted).skipped == 0, "nothing is known of what was written"
    plan.close()
