"""The mean of the last steps' weights: by definition, through checkpoints, and in a whole training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergemix.errors import ConfigError
from mergemix.train import train
from mergemix.train.averaging import WeightMean
from tests.train.files import tiny_config


def process(rank: int = 0, processes: int = 1, kind: DistributedType = DistributedType.NO) -> Any:
    return SimpleNamespace(
        process_index=rank, num_processes=processes, distributed_type=kind, is_main_process=rank == 0
    )


def changed(model: torch.nn.Module, generator: torch.Generator) -> list[torch.Tensor]:
    """Other weights; copies of them."""
    with torch.no_grad():
        for each in model.parameters():
            each += torch.randn(each.shape, generator=generator)
    return [each.detach().clone() for each in model.parameters()]


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 12), window=st.integers(1, 12), killed=st.integers(0, 12), seed=st.integers(0, 99)
)
def test_it_is_the_mean_of_the_last_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: int, window: int, killed: int, seed: int
) -> None:
    """After a checkpoint at step `killed`, too, which another object goes on from."""
    window = min(window, steps)
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    mean = WeightMean(model, window)
    after = []
    for step in range(steps):
        if step == killed:
            directory = tmp_path_factory.mktemp("checkpoint")
            mean.save(directory, process())
            mean = WeightMean(model, window)
            mean.load(directory, process())
        after.append(changed(model, generator))
        mean.add(steps - step - 1)
    with mean.applied():
        for index, each in enumerate(model.parameters()):
            exact = torch.stack([weights[index].double() for weights in after[-window:]]).mean(0)
            torch.testing.assert_close(each.double(), exact, rtol=1e-5, atol=1e-6)
    for each, last in zip(model.parameters(), after[-1], strict=True):
        assert torch.equal(each, last), "the training goes on with its own weights"


def test_the_model_is_itself_again_after_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    mean = WeightMean(model, 2)
    generator = torch.Generator().manual_seed(0)
    for left in (1, 0):
        last = changed(model, generator)
        mean.add(left)

    def fail() -> None:
        with mean.applied():
            assert not torch.equal(model.weight, last[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(model.weight, last[0])


def test_processes_that_hold_parts_store_them_and_come_back_in_the_same_number(tmp_path: Path) -> None:
    """As under FSDP; where every process has the whole model, the first one's copy is for all."""
    parts = [torch.nn.Linear(2, 2) for _ in range(2)]
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    for directory, kind in ((sharded, DistributedType.FSDP), (whole, DistributedType.MULTI_CPU)):
        directory.mkdir()
        for rank, part in enumerate(parts):
            mean = WeightMean(part, 2)
            mean.add(0)
            mean.save(directory, process(rank, 2, kind))
    assert sorted(p.name for p in sharded.iterdir()) == ["mean-0.pt", "mean-1.pt"]
    assert [p.name for p in whole.iterdir()] == ["mean-0.pt"]
    for rank, part in enumerate(parts):
        wanted = part.weight.detach().clone()
        for directory, kind, source in (
            (sharded, DistributedType.FSDP, part),
            (whole, DistributedType.MULTI_CPU, parts[0]),
        ):
            model = torch.nn.Linear(2, 2)
            mean = WeightMean(model, 2)
            mean.load(directory, process(rank, 2, kind))
            with mean.applied():
                assert torch.equal(model.weight, source.weight)
        assert torch.equal(part.weight, wanted)
    with pytest.raises(ConfigError, match="stored by another number of processes than 3"):
        WeightMean(parts[0], 2).load(sharded, process(0, 3, DistributedType.FSDP))
    with pytest.raises(ConfigError, match="stored by another number of processes than 3"):
        WeightMean(parts[0], 2).load(sharded, process(2, 3, DistributedType.FSDP))


def test_a_training_ends_in_the_mean(
    tmp_path: Path, plain_base: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    add = WeightMean.add

    def watched(self: WeightMean, left: int) -> None:
        add(self, left)
        seen.append({name: each.detach().clone() for name, each in self._model.named_parameters()})

    monkeypatch.setattr(WeightMean, "add", watched)
    last = train(tiny_config(plain_base, data, tmp_path / "last"))
    record = train(tiny_config(plain_base, data, tmp_path / "mean", average_last=5))
    assert (last["average_last"], record["average_last"]) == (1, 5)
    assert record["losses"] == last["losses"], "the training itself is the same"
    assert len(seen) == 24
    files = {name: load_file(tmp_path / name / "model.safetensors") for name in ("last", "mean")}
    for name, tensor in files["mean"].items():
        if name not in seen[-1]:
            continue
        exact = torch.stack([weights[name].double() for weights in seen[-5:]]).mean(0)
        torch.testing.assert_close(tensor.double(), exact.to(tensor.dtype).double(), rtol=1e-2, atol=1e-6)
        assert torch.equal(files["last"][name], seen[-1][name].to(tensor.dtype))
        assert not torch.equal(files["last"][name], tensor)
    assert set(seen[-1]) & set(files["mean"])


def test_more_steps_than_there_are(tmp_path: Path, plain_base: Path, data: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="average_last must be at most the 12 steps, but is 13"):
        train(tiny_config(plain_base, data, tmp_path / "out", average_last=13))
    with pytest.raises(ConfigError, match="average_last must be at least 1, but is 0"):
        tiny_config(plain_base, data, tmp_path / "out", average_last=0)
