"""The steps of a training, on whatever accelerate was started for."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mergemix.errors import TrainingError
from mergemix.train.averaging import WeightMean
from mergemix.train.batches import IGNORED, Batches
from mergemix.train.config import BETAS, MAX_GRADIENT_NORM, WEIGHT_DECAY
from mergemix.train.observer import Observer, StepProgress
from mergemix.train.prepare import Prepared
from mergemix.train.states import Progress, States


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW with the paper's settings; weight decay on matrices only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=BETAS, fused=fused)


def run_steps(
    prepared: Prepared,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    mean: WeightMean,
    states: States,
    observer: Observer,
) -> Progress:
    """Train from the last checkpoint of `states` to the end of the plan.

    Raises KeyboardInterrupt after SIGINT or SIGTERM, once the step is done and stored; TrainingError when the loss or
    the gradient is not a number; OutputError when a checkpoint cannot be written.
    """
    config, plan = prepared.config, prepared.plan
    progress = states.load(accelerator, mean)
    batches = Batches(plan, prepared.corpora, config.seed, progress.step)
    rows = _rows(plan.batch, accelerator)
    began, first, before = time.perf_counter(), progress.step, progress.seconds
    model.train()
    with _stop_requests() as stop:
        while progress.step < plan.steps:
            torch.manual_seed(_step_seed(config.seed, progress.step, accelerator.process_index))
            rate = config.learning_rate * min(1.0, (progress.step + 1) / max(prepared.warmup, 1))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, stopping = _backward(accelerator, model, *batches.next(), rows, config.micro_batch, stop)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            if hasattr(norm, "full_tensor"):  # FSDP gives this process's part
                norm = norm.full_tensor()
            if not (math.isfinite(loss) and math.isfinite(float(norm))):
                raise TrainingError(_not_a_number(loss, progress, plan.steps, rate, states))
            optimizer.step()
            optimizer.zero_grad()
            progress.step += 1
            mean.add(plan.steps - progress.step)
            progress.losses.append(loss)
            taken = time.perf_counter() - began
            progress.seconds = before + taken
            speed = (progress.step - first) * plan.batch * plan.sequence_length / taken
            observer.step(StepProgress(progress.step, plan.steps, loss, rate, speed))
            if progress.step < plan.steps and (stopping or progress.step % config.save_every == 0):
                states.save(accelerator, progress, mean)
            if stopping and progress.step < plan.steps:
                raise KeyboardInterrupt
    return progress


def _backward(
    accelerator: Any,
    model: Any,
    ids: np.ndarray,
    targets: np.ndarray,
    rows: slice,
    micro_batch: int | None,
    stop: Callable[[], bool],
) -> tuple[float, bool]:
    """Gradients of the mean loss over the learned tokens of the whole batch.

    Returns that loss, and whether any process was told to stop.

    Every process sees the whole batch and computes its rows of it, so that the mean is right whatever the processes.
    """
    learned = max(1, int((targets != IGNORED).sum()))
    own_ids = torch.from_numpy(ids[rows]).to(accelerator.device)
    own_targets = torch.from_numpy(targets[rows]).to(accelerator.device)
    size = micro_batch or len(own_ids)
    parts = list(zip(own_ids.split(size), own_targets.split(size), strict=True))
    total = torch.zeros((), device=accelerator.device)
    for index, (part_ids, part_targets) in enumerate(parts):
        last = index == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            output = model(input_ids=part_ids, use_cache=False)
            loss = functional.cross_entropy(
                output.logits.flatten(0, 1).float(),
                part_targets.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            total += loss.detach()
            # Accelerate's processes average their gradients; here they belong to parts of one sum.
            objective = loss * (accelerator.num_processes / learned) + _router_loss(model, output, len(parts))
            accelerator.backward(objective)
    reduced = accelerator.reduce(torch.stack([total, torch.full_like(total, float(stop()))]), "sum").tolist()
    return reduced[0] / learned, reduced[1] > 0


def _router_loss(model: Any, output: Any, parts: int) -> Any:
    """The balance loss of a mixture of experts, where the base's configuration asks for it."""
    config = getattr(model, "module", model).config
    if getattr(output, "aux_loss", None) is None or not getattr(config, "output_router_logits", False):
        return 0.0
    return output.aux_loss * config.router_aux_loss_coef / parts


def _rows(batch: int, accelerator: Any) -> slice:
    """The sequences of each batch that this process computes."""
    share = batch // accelerator.num_processes
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def _step_seed(seed: int, step: int, process: int) -> int:
    """Of dropout: by step, so that a resumed training needs no random state."""
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _not_a_number(loss: float, progress: Progress, steps: int, rate: float, states: States) -> str:
    what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    kept = states.latest()
    there = f"the last good checkpoint, {kept}, is kept" if kept else "no checkpoint was due before"
    recent: Sequence[float] = progress.losses[-3:]
    trend = f" after losses of {', '.join(f'{value:.3g}' for value in recent)}" if recent else ""
    return (
        f"{what} at step {progress.step + 1} of {steps}{trend}, at a learning rate of {rate:g}; {there}. Lower the "
        "learning rate and train into another directory, or look for broken documents in the data"
    )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """A call that says whether SIGINT or SIGTERM came. The first waits for the end of a step; the second is not kept
    waiting.
    """
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
