"""Kills, interrupts, second trainings and disks that fail: what was trained is not lost, and ends in the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergemix.checkpoints.writer import DirectoryWriter
from mergemix.errors import CheckpointError, ConfigError, OutputError, TrainingError
from mergemix.train import StepProgress, TrainConfig, expert_configs, train, train_family
from mergemix.train import output as output_module
from mergemix.train.observer import Silent
from mergemix.train.states import States
from tests.train.files import tiny_config, weights_of, write_lines


class At(Silent):
    """Does something after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self._step, self._act = step, act
        self.steps: list[int] = []

    def step(self, progress: StepProgress) -> None:
        self.steps.append(progress.step)
        if progress.step == self._step:
            self._act()


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(config: TrainConfig, point: str, number: int) -> None:
    """point: "step" after `number` steps; "save" when the `number`-th checkpoint is whole, but not yet in its place;
    "output" when the result is whole, but not yet in its place.
    """
    torch.set_num_threads(1)
    if point == "output":
        DirectoryWriter.commit = die  # type: ignore[method-assign]
    if point == "save":
        save, saved = States.save, iter(range(1, 1000))

        def fatal(self: States, *arguments: Any) -> None:
            if next(saved) == number:
                os.rename = die  # type: ignore[assignment]
            save(self, *arguments)

        States.save = fatal  # type: ignore[method-assign]
    train(config, At(number, die) if point == "step" else None)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, data: dict[str, Path]) -> TrainConfig:
    """A training that nothing interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    config = tiny_config(base, data, out, general={"texts": 1.0}, general_share=0.25, average_last=7)
    train(config)
    return config


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".mergemix-tokens")


def test_after_kills_at_the_worst_moments_the_weights_are_the_same_bits(
    tmp_path: Path, base: Path, data: dict[str, Path], whole: TrainConfig
) -> None:
    config = replace(whole, out=tmp_path / "out")

    def killed_at(point: str, number: int = 0) -> list[str]:
        """Train in a process of its own until it kills itself; what it had stored."""
        context = multiprocessing.get_context("spawn")  # a fork would share the threads of this process
        child = context.Process(target=train_until_killed, args=(config, point, number))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not config.out.exists()
        return sorted(path.name for path in (tmp_path / ".out.training").glob("step-*"))

    assert killed_at("step", 5) == ["step-000000003"]
    assert killed_at("save", 2) == ["step-000000006"]  # saved at 6, killed in the one at 9
    assert killed_at("output") == ["step-000000009"]
    record = train(config)
    assert record["resumed_at"] == [3, 6, 9]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)
    finished = json.loads((whole.out / "training.json").read_text())
    assert record["losses"] == [tuple(point) for point in finished["losses"]]
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stores_the_step_that_it_met(
    tmp_path: Path, whole: TrainConfig, number: signal.Signals
) -> None:
    config = replace(whole, out=tmp_path / "out", save_every=1000)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    observer = At(4, lambda: os.kill(os.getpid(), number))
    with torch.random.fork_rng():
        torch.manual_seed(99)  # whatever the caller's state is
        with pytest.raises(KeyboardInterrupt):
            train(config, observer)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert observer.steps == [1, 2, 3, 4, 5]  # the signal came when step 4 was done
    assert left_in(tmp_path) == [".out.training"]
    resumed = At(0, None)
    record = train(config, resumed)
    assert resumed.steps == list(range(6, 13))
    assert record["resumed_at"] == [5]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_the_callers_random_states_are_left_alone(tmp_path: Path, whole: TrainConfig) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    config = replace(whole, out=tmp_path / "out")
    before = states()
    with pytest.raises(KeyboardInterrupt):
        train(config, At(4, interrupt))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert states() != before
    before = states()
    train(config)
    assert states() == before
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_a_finished_training_is_not_done_again(whole: TrainConfig) -> None:
    observer = At(0, None)
    before = weights_of(whole.out)
    record = train(replace(whole, save_every=7), observer)  # which does not change the weights
    assert record["reused"]
    assert observer.steps == []
    assert weights_of(whole.out) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 there, 0.002 asked for"),
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"mixture": {"sums": 1.0}}, "mixture of texts: 0.6 there, None asked for"),
        ({"tokens": 2000}, "steps: 12 there, 16 asked for"),
        ({"general_share": 0.5}, "general_share: 0.25 there, 0.5 asked for"),
        ({"batch": 2}, "batch: 4 there, 2 asked for"),
        ({"warmup": 5}, "warmup: 1 there, 5 asked for"),
        ({"average_last": 1}, "average_last: 7 there, 1 asked for"),
    ],
)
def test_another_configuration_is_refused_by_a_finished_training(
    whole: TrainConfig, changed: dict[str, Any], said: str
) -> None:
    before = weights_of(whole.out)
    with pytest.raises(ConfigError) as error:
        train(replace(whole, **changed))
    assert said in str(error.value)
    assert "or another directory than" in str(error.value)
    assert weights_of(whole.out) == before


def test_another_configuration_or_corpus_is_refused_by_a_begun_training(
    tmp_path: Path, data: dict[str, Path], whole: TrainConfig
) -> None:
    for path in data.values():
        shutil.copy(path, tmp_path)
    moved = {name: tmp_path / path.name for name, path in data.items()}
    config = replace(whole, data=moved, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(config, At(4, interrupt))
    stored = sorted((tmp_path / ".out.training").glob("step-*"))
    with pytest.raises(ConfigError, match=r"begun in .*learning_rate: 0.001 there, 0.01 asked for"):
        train(replace(config, learning_rate=0.01))
    os.utime(moved["sums"])  # the same contents: the same corpus
    moved["texts"].write_text(moved["texts"].read_text() + '{"text": "more"}\n')
    with pytest.raises(ConfigError, match=r"\(data of texts: [0-9a-f]{12} there, [0-9a-f]{12} asked for\)"):
        train(config)
    assert sorted((tmp_path / ".out.training").glob("step-*")) == stored
    shutil.copy(data["texts"], moved["texts"])
    assert train(config)["resumed_at"] == [5]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_two_trainings_into_one_directory(tmp_path: Path, whole: TrainConfig) -> None:
    config = replace(whole, out=tmp_path / "out")
    errors: list[BaseException] = []

    def second() -> None:
        try:
            train(config)
        except OutputError as error:
            errors.append(error)

    def beside() -> None:
        other = threading.Thread(target=second)
        other.start()
        other.join()

    train(config, At(2, beside))
    assert len(errors) == 1
    assert "another training uses" in str(errors[0])
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path, whole: TrainConfig) -> None:
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out" / "precious", [])
    with pytest.raises(OutputError, match="exists already, and is no trained checkpoint"):
        train(replace(whole, out=tmp_path / "out"))
    with pytest.raises(OutputError, match="is not a directory; create it first"):
        train(replace(whole, out=tmp_path / "absent" / "out"))
    assert left_in(tmp_path) == ["out"]


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    config = replace(whole, out=tmp_path / "out")
    real = torch.nn.functional.cross_entropy
    calls = iter(range(1, 1000))

    def broken(*arguments: Any, **options: Any) -> Any:
        return real(*arguments, **options) * (float("nan") if next(calls) == 8 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", broken)
        with pytest.raises(TrainingError) as error:
            train(config)
    kept = tmp_path / ".out.training" / "step-000000006"
    for said in ("the loss became nan at step 8 of 12", str(kept), "learning rate of 0.001"):
        assert said in str(error.value)
    assert kept.is_dir()
    assert train(config)["resumed_at"] == [6]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_a_learning_rate_that_is_far_too_high_ends_in_a_message(
    tmp_path: Path, base: Path, data: dict[str, Path]
) -> None:
    config = tiny_config(base, data, tmp_path / "out", learning_rate=1e38, tokens=6000, save_every=1000)
    with pytest.raises(TrainingError, match=r"step \d+ of 47.*no checkpoint was due before"):
        train(config)
    assert left_in(tmp_path) == []


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    """The limit on the size of files is the kernel's own refusal to write more."""
    config = replace(whole, out=tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError) as error:
            train(config, At(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000000006, and the same command goes on there" in str(error.value)
    assert sorted(p.name for p in (tmp_path / ".out.training").iterdir()) == [
        "identity.json",
        "step-000000006",
    ]
    assert train(config)["resumed_at"] == [6]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


def test_a_full_disk_at_the_end_keeps_the_last_checkpoint(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    config = replace(whole, out=tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match="cannot write"):
            train(config, At(12, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path) == [".out.training"]
    assert train(config)["resumed_at"] == [9]
    assert weights_of(tmp_path / "out") == weights_of(whole.out)


@pytest.mark.parametrize("trouble", ["interrupt", "refusal", "no base", "no memory"])
def test_a_result_that_cannot_be_written_costs_no_step(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any, trouble: str
) -> None:
    """Even where no checkpoint was due: the finished training is stored."""
    config = replace(whole, out=tmp_path / "out", save_every=1000)

    commit = DirectoryWriter.commit

    def fail(self: DirectoryWriter) -> None:
        if self.out != config.out:  # the tokenised corpus
            commit(self)
            return
        if trouble == "interrupt":
            interrupt()
        if trouble == "no base":
            raise CheckpointError("the base vanished")
        if trouble == "no memory":
            raise RuntimeError("can't allocate memory")
        raise OutputError("cannot write out: No space left on device")

    raised = {"interrupt": KeyboardInterrupt, "no base": CheckpointError}.get(trouble, OutputError)
    for _ in range(2):  # the second time it is stored already
        with monkeypatch.context() as patch:
            patch.setattr(DirectoryWriter, "commit", fail)
            with pytest.raises(raised) as error:
                train(config)
        if trouble == "refusal":
            assert "No space left on device; " in str(error.value)
            assert "step-000000012 is kept, and the same command goes on there" in str(error.value)
        assert [path.name for path in (tmp_path / ".out.training").glob("step-*")] == ["step-000000012"]
    observer = At(0, None)
    train(config, observer)
    assert observer.steps == []
    assert weights_of(tmp_path / "out") == weights_of(whole.out)
    assert left_in(tmp_path) == ["out"]


def test_a_resumed_training_has_some_of_its_space_already(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    config = replace(whole, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(config, At(4, interrupt))
    # A new training needs 2893824: two checkpoints of half of that.
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1_900_000, 1_900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="needs 2893824 bytes"):
        train(replace(config, out=tmp_path / "new"))
    assert train(config)["resumed_at"] == [5]


def test_a_full_accelerator(tmp_path: Path, whole: TrainConfig, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    with pytest.raises(TrainingError, match=r"cpu is full: CUDA out of memory.*\(micro_batch\)"):
        train(replace(whole, out=tmp_path / "out"))


def test_too_little_space_is_said_before_the_first_step(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    observer = At(0, None)
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        OutputError, match="needs 2893824 bytes for its checkpoints, but only 1000000 are free"
    ):
        train(replace(whole, out=tmp_path / "out"), observer)
    assert observer.steps == []
    assert left_in(tmp_path) == []


def test_a_family_goes_on_where_it_stopped(tmp_path: Path, base: Path, data: dict[str, Path]) -> None:
    settings: dict[str, Any] = {
        "base": str(base), "data": data, "tokens": 512, "sequence_length": 32, "batch": 4, "learning_rate": 1e-3,
        "general": {"sums": 0.5, "texts": 0.5}, "general_share": 0.5, "save_every": 2,
    }  # fmt: skip
    configs = expert_configs(out=tmp_path / "family", **settings)
    steps: list[int] = []

    class Stop(Silent):
        def step(self, progress: StepProgress) -> None:
            steps.append(progress.step)
            if len(steps) == 6:
                interrupt()

    with pytest.raises(KeyboardInterrupt):
        train_family(configs, Stop())
    records = train_family(configs, Stop())
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [(r["reused"], r["resumed_at"]) for r in records.values()] == [(True, []), (False, [3])]
    assert left_in(tmp_path / "family") == ["sums", "texts"]
    # Each differs from the other by its own domain only.
    assert [{n: d["general_tokens"] for n, d in r["domains"].items()} for r in records.values()] == [
        {"sums": 128, "texts": 128}
    ] * 2


def test_a_family_is_checked_before_the_first_expert_is_trained(
    tmp_path: Path, base: Path, data: dict[str, Path]
) -> None:
    files = {**data, "empty": write_lines(tmp_path / "empty.jsonl", [])}
    configs = expert_configs(
        out=tmp_path / "family", base=str(base), data=files, tokens=512, sequence_length=32
    )
    with pytest.raises(Exception, match="holds no documents"):
        train_family(configs)
    assert left_in(tmp_path / "family") == []
    (tmp_path / "family" / "texts").mkdir()
    with pytest.raises(OutputError, match="texts exists already, and is no trained checkpoint"):
        train_family({name: replace(configs[name], save_every=1) for name in data})
    assert left_in(tmp_path / "family") == ["texts"]


def test_a_result_that_holds_no_numbers_is_not_written(
    tmp_path: Path, whole: TrainConfig, monkeypatch: Any
) -> None:
    config = replace(whole, out=tmp_path / "out")
    monkeypatch.setattr(output_module, "read_range", _with_nan(output_module.read_range))
    with pytest.raises(TrainingError, match=r"model.norm.weight holds NaN or Inf"):
        train(config)
    assert left_in(tmp_path) == [".out.training"]


def _with_nan(read: Any) -> Any:
    def reading(tensor: Any, begin: int, nbytes: int) -> bytes:
        data = bytearray(read(tensor, begin, nbytes))
        if tensor.name == "model.norm.weight":
            data[:2] = b"\xff\x7f"
        return bytes(data)

    return reading
