"""The plan: what is read, summed and copied, decided without reading a tensor byte."""

from pathlib import Path

import pytest
import torch

from mergemix.errors import ConfigError
from mergemix.merge.plan import plan_merge
from mergemix.mixture import Mixture
from mergemix_kernels.weights import MAX_SOURCES
from tests.merge.families import NAMES, tiny_family, write_family


def test_a_mixture_reads_its_experts_once_and_not_the_base(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True)
    plan = plan_merge(family, [Mixture(NAMES, (0.25, 0.0, 0.75))])
    assert plan.operand_names == ("math", "web")
    assert {task.is_copy for task in plan.tasks} == {False}
    assert plan.tasks[0].coefficients == ((0.25, 0.75),)
    assert plan.bytes_written == sum(info.nbytes for info in family.experts[0].tensors.values())
    assert plan.bytes_read == 2 * plan.bytes_written
    assert [task.name for task in plan.tasks] == list(family.template.tensors)


def test_one_hot_and_base_are_copies(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True)
    for mixture, name in ((Mixture.one_hot(NAMES, "code"), "code"), (Mixture.base_only(NAMES), "base")):
        plan = plan_merge(family, [mixture])
        assert plan.operand_names == (name,)
        assert {task.is_copy for task in plan.tasks} == {True}
        assert plan.bytes_read == plan.bytes_written


def test_a_sum_other_than_one_reads_the_base_first(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True)
    plan = plan_merge(family, [Mixture(NAMES, (0.5, 0.25, 0.5))])
    assert plan.operand_names == ("base", *NAMES)
    assert plan.tasks[0].coefficients == ((-0.25, 0.5, 0.25, 0.5),)


def test_tensors_that_are_not_floating_point_are_copied_from_the_first_operand(tmp_path: Path) -> None:
    tensors = {"steps": torch.tensor([1, 2]), "mask": torch.tensor([True]), "w": torch.ones(2)}
    family = write_family(tmp_path, None, dict.fromkeys(NAMES, tensors))
    plan = plan_merge(family, [Mixture(NAMES, (0.0, 0.5, 0.5))])
    tasks = {task.name: task for task in plan.tasks}
    assert {name: task.is_copy for name, task in tasks.items()} == {"steps": True, "mask": True, "w": False}
    assert [info.path.parent.name for info in tasks["steps"].operands] == ["code"]


def test_a_weight_that_is_zero_in_fp32_is_not_read(tmp_path: Path) -> None:
    plan = plan_merge(tiny_family(tmp_path), [Mixture(NAMES, (1.0, 1e-60, 0.0))])
    assert plan.operand_names == ("math",)
    assert {task.is_copy for task in plan.tasks} == {True}


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    with pytest.raises(ConfigError, match=r"sum to 0.5.*--base"):
        plan_merge(family, [Mixture(NAMES, (0.25, 0.25, 0.0))])
    with pytest.raises(ConfigError, match="the experts are math, code, web"):
        plan_merge(family, [Mixture(("math", "web", "code"), (0.5, 0.5, 0.0))])
    with pytest.raises(ConfigError, match="beyond the range of fp32"):
        plan_merge(family, [Mixture(NAMES, (1e300, -1e300, 1.0))])
    tensors = {"w": torch.ones(1)}
    names = [f"e{k}" for k in range(MAX_SOURCES + 1)]
    with pytest.raises(ConfigError, match=f"at most {MAX_SOURCES}"):
        plan_merge(
            write_family(tmp_path / "many", None, dict.fromkeys(names, tensors)), [Mixture.uniform(names)]
        )


def test_a_base_and_64_experts_are_merged_at_once(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(1)}
    names = [f"e{k}" for k in range(64)]
    family = write_family(tmp_path, tensors, dict.fromkeys(names, tensors))
    assert len(plan_merge(family, [Mixture(tuple(names), (0.5,) * 64)]).operand_names) == 65


def test_several_mixtures_read_the_union_of_what_each_reads(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True)
    mixtures = [
        Mixture(NAMES, (0.5, 0.0, 0.5)),
        Mixture(NAMES, (0.5, 0.0, 0.25)),
        Mixture.one_hot(NAMES, "web"),
    ]
    plan = plan_merge(family, mixtures)
    assert plan.operand_names == ("base", "math", "web")
    assert plan.tasks[0].coefficients == ((0.0, 0.5, 0.5), (0.25, 0.5, 0.25), (0.0, 0.0, 1.0))
    assert all(task.coefficients is plan.tasks[0].coefficients for task in plan.tasks)
    assert plan.bytes_read == plan.bytes_written == 3 * sum(task.nbytes for task in plan.tasks)


def test_each_output_copies_integers_from_its_own_first_operand(tmp_path: Path) -> None:
    experts = {name: {"steps": torch.tensor([k])} for k, name in enumerate(NAMES)}
    mixtures = [Mixture(NAMES, (0.0, 0.5, 0.5)), Mixture(NAMES, (0.5, 0.0, 0.5))]
    (task,) = plan_merge(write_family(tmp_path, None, experts), mixtures).tasks
    assert [info.path.parent.name for info in task.operands] == ["math", "code"]
    assert task.coefficients == ((0.0, 1.0), (1.0, 0.0))
