"""One training, from the base and the corpora to a checkpoint that a search takes as an expert."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from mergemix.checkpoints.writer import check_output
from mergemix.errors import CheckpointError, ConfigError, OutputError, TrainingError
from mergemix.train.averaging import WeightMean
from mergemix.train.config import TrainConfig
from mergemix.train.loop import make_optimizer, run_steps
from mergemix.train.observer import Observer, Silent
from mergemix.train.output import RECORD, write_output
from mergemix.train.prepare import Prepared, prepare
from mergemix.train.record import make_record
from mergemix.train.states import Progress, States, check_same

# Processes wait for the first one while it tokenises; a launcher ends them all when one of them dies.
PATIENCE = timedelta(hours=12)
# A base of this size is collected at once, for the next training needs the memory; collecting takes half a second.
COLLECTED_BYTES = 256 << 20
STATE_BYTES = 12  # of a parameter, in a checkpoint to resume from: fp32 weight and two fp32 moments


def train(config: TrainConfig, observer: Observer | None = None) -> dict[str, Any]:
    """Train one model and write it to config.out; returns its record, which training.json in that directory holds.

    Goes on where an interrupted or killed training into the same directory was stored last; returns the record of a
    finished one at once ("reused" is then true). A resumed training ends in the same weights, bit for bit on a CPU
    with as many threads. Raises ConfigError, CorpusError, CheckpointError, OutputError and TrainingError;
    KeyboardInterrupt when it was interrupted and can be resumed.
    """
    observer = observer or Silent()
    out = Path(os.path.abspath(config.out))
    if not os.path.lexists(out):
        check_output(out)
    accelerator = make_accelerator()
    if config.batch % accelerator.num_processes:
        raise ConfigError(
            f"batch must be a multiple of the {accelerator.num_processes} processes, but is {config.batch}"
        )
    with accelerator.main_process_first():
        prepared = prepare(config, observer)
    if os.path.lexists(out):
        return finished_before(out, prepared)
    for domain, tokens in prepared.plan.tokens_of(prepared.corpora).items():
        there = len(prepared.corpora[domain].tokens)
        if tokens > there:
            observer.repeats(domain, tokens / there, there)
    states = States(out, prepared.identity, main=accelerator.is_main_process)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _no_bars():
            record = _train(prepared, accelerator, states, observer, out)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the memory of {accelerator.device} is full: {str(error).splitlines()[0]}; compute fewer sequences at a "
            "time (micro_batch), or start more processes and divide the model among them (FSDP)"
        ) from error
    finally:
        size = sum(tensor.nbytes for tensor in prepared.base.tensors.values())
        if accelerator.device.type == "cuda" or size > COLLECTED_BYTES:
            accelerator.free_memory()
        states.close()
    return record


def _train(
    prepared: Prepared, accelerator: Any, states: States, observer: Observer, out: Path
) -> dict[str, Any]:
    observer.stage("loading the base")
    model = _load(prepared)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _check_space(out, prepared, parameters, states.nbytes())
    model, optimizer = accelerator.prepare(model, make_optimizer(model, prepared.config.learning_rate))
    mean = WeightMean(model, prepared.config.average_last)
    observer.stage("training")
    progress = run_steps(prepared, accelerator, model, optimizer, mean, states, observer)
    observer.stage(f"writing {prepared.config.out}")
    record = make_record(prepared, progress, parameters, accelerator)
    failure: BaseException | None = None
    with mean.applied():
        try:
            state = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                plain = accelerator.unwrap_model(model)
                write_output(plain, state, prepared.base, out, states.directory / "weights", record)
                states.remove()
        except (OutputError, CheckpointError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
            failure = error
    failed = torch.tensor(float(failure is not None), device=accelerator.device)
    if accelerator.reduce(failed, "sum").item():
        _keep(accelerator, states, progress, mean, failure)
    return record


def _keep(
    accelerator: Any, states: States, progress: Progress, mean: WeightMean, failure: BaseException | None
) -> NoReturn:
    """The result could not be written: store what was trained, and raise `failure` (of the first process)."""
    with suppress(OutputError):
        if progress.resumed_at[-1:] != [progress.step]:  # else it is stored already
            states.save(accelerator, progress, mean)
    if isinstance(failure, KeyboardInterrupt | CheckpointError):
        raise failure
    kept = states.latest()
    there = f"{kept} is kept, and the same command goes on there" if kept else "no checkpoint could be kept"
    raise OutputError(f"{failure or 'the first process could not write the result'}; {there}") from failure


def finished_before(out: Path, prepared: Prepared) -> dict[str, Any]:
    """The record of the training that made `out`. Raises ConfigError when it was another one, OutputError when none."""
    path = out / RECORD
    if not path.is_file():
        raise OutputError(f"{out} exists already, and is no trained checkpoint; give another directory")
    record: dict[str, Any] = json.loads(path.read_text())
    check_same(record.get("identity", {}), prepared.identity, f"the training that made {out}", out)
    shutil.rmtree(out.parent / f".{out.name}.training", ignore_errors=True)
    return {**record, "reused": True}


def make_accelerator() -> Any:
    """Set up by `accelerate launch`, or for one process.

    On GPUs it computes in bf16; weights and optimizer are in fp32 everywhere.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    precision = "bf16" if torch.cuda.is_available() else "no"
    return Accelerator(mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def _load(prepared: Prepared) -> Any:
    """The base in fp32, whatever type it is stored in: steps are smaller than what bf16 resolves."""
    from transformers import AutoModelForCausalLM

    root = prepared.base.root
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(root), dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load {root} as a causal language model: {error}"
        ) from error
    if found["missing_keys"] or found["mismatched_keys"]:
        wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
        raise CheckpointError(f"{root} lacks tensors of its architecture, {wrong[0]} among them")
    return model


def _check_space(out: Path, prepared: Prepared, parameters: int, stored: int) -> None:
    """Two checkpoints to resume from at a time, and the result twice, once as transformers saves it.

    stored: bytes of these that are on the disk already.
    """
    size = sum(tensor.nbytes for tensor in prepared.base.tensors.values())
    state = STATE_BYTES + (4 if prepared.config.average_last > 1 else 0)  # a parameter
    states = 2 * state * parameters if prepared.plan.steps > prepared.config.save_every else 0
    free = shutil.disk_usage(out.parent).free
    needed = max(states, states // 2 + 2 * size) - stored
    if free < needed:
        raise OutputError(
            f"this training needs {needed} bytes for its checkpoints, but only {free} are free on the disk of {out}; "
            "free some space or give a directory on another disk"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars over ours."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
