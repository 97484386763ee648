"""How fast `mergemix train` trains, beside a bare loop of transformers and torch on the same model and batches.

    python -m benchmarks.bench_train [--sizes 0.5M,10M] [--repeats 5] [--scratch DIR] [--out FILE]

Both train in turn in this process, from the same base, on the same sequences in the same order, in fp32 on all threads,
with fused AdamW; the bare loop has its batches in memory as tensors, and reads its loss at every step as anybody would.
Timed are the steps; the whole call of `train` (tokenised corpora opened, base loaded, result written) is a row of its
own. Prints the roofline (the bare loop), a table, what must be shown and whether it was, and one JSON line. Nothing
is timed unless both give the same losses.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.children import BenchmarkError
from benchmarks.common import conditions, format_table, timing_of, write_results
from benchmarks.merges import RATIO_COLUMNS, Rows, ratio_row, verdict, verdict_lines
from benchmarks.models import Shape
from benchmarks.storage import scratch_directory, storage_conditions
from mergemix.demo.tokenizer import build_tokenizer
from mergemix.train import TrainConfig, train
from mergemix.train.batches import Batches
from mergemix.train.observer import Silent, StepProgress
from mergemix.train.prepare import prepare

OURS, WHOLE, BARE = "mergemix train, steps", "mergemix train, whole call", "bare transformers loop, steps"
BAR = 0.80
LOSS_TOLERANCE = 1e-3  # of the losses of two ways to sum the same numbers
COLUMNS = ["case", "provider", "repeats", "tokens_per_s", "median_s", "p20_s", "p80_s"]


@dataclass(frozen=True)
class Size:
    shape: Shape
    steps: int
    batch: int
    length: int


SIZES = {
    "test": Size(Shape(64, 160, 2, 4, 2, 16, 512), 4, 4, 32),
    "0.5M": Size(Shape(96, 256, 4, 4, 2, 24, 512), 20, 16, 128),
    "10M": Size(Shape(320, 896, 8, 8, 4, 40, 512), 5, 8, 128),
}


def write_base(directory: Path, shape: Shape) -> Path:
    """A fresh fp32 model with transformers' own initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape.config()))
    model.save_pretrained(directory)
    build_tokenizer(4096).save_pretrained(directory)
    return directory


def write_corpus(path: Path, seed: int, tokens: int) -> Path:
    """Documents of words, about 150 characters (tokens) each, `tokens` in all."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=25))}) for _ in range(-(-tokens // 100))]
    path.write_text("\n".join(lines) + "\n")
    return path


class Watch(Silent):
    """The losses, and the processor seconds between the first step and the writing of the result."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.marks: list[float] = []

    def stage(self, text: str) -> None:
        if text == "training" or text.startswith("writing"):
            self.marks.append(time.process_time())

    def step(self, progress: StepProgress) -> None:
        self.losses.append(progress.loss)


def batches_of(config: TrainConfig) -> list[torch.Tensor]:
    """What `train` reads, in memory."""
    prepared = prepare(config, Silent())
    batches = Batches(prepared.plan, prepared.corpora, config.seed)
    return [torch.from_numpy(batches.next()[0]) for _ in range(prepared.plan.steps)]


def bare(config: TrainConfig, batches: Sequence[torch.Tensor]) -> tuple[list[float], float, float]:
    """(losses, seconds of the steps, processor seconds of them) of the shortest loop that trains the same."""
    model = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    losses = []
    began, cpu = time.perf_counter(), time.process_time()
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - began, time.process_time() - cpu


def check_same(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of the losses. Raises BenchmarkError where they are of different trainings."""
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    if not apart <= LOSS_TOLERANCE:
        raise BenchmarkError(f"the losses differ by {apart:.2%}, so nothing was timed: {ours} and {theirs}")
    return apart


def measure(name: str, scratch: Path, repeats: int) -> tuple[Rows, Rows]:
    """(rows, verdicts) of one size: rounds of ours and theirs in turn, after one that checks and is not counted."""
    size = SIZES[name]
    tokens = size.steps * size.batch * size.length
    data = {
        domain: write_corpus(scratch / f"{domain}.jsonl", seed, tokens) for seed, domain in enumerate("ab")
    }
    config = TrainConfig(
        base=str(write_base(scratch / "base", size.shape)), data=data, mixture={"a": 0.7, "b": 0.3},
        out=scratch / "out", tokens=tokens, sequence_length=size.length, batch=size.batch, warmup=0,
    )  # fmt: skip
    batches = batches_of(config)
    seconds: dict[str, list[float]] = {OURS: [], WHOLE: [], BARE: []}
    cpu: dict[str, list[float]] = {OURS: [], BARE: []}
    for round_number in range(repeats + 1):
        watch = Watch()
        began = time.perf_counter()
        record = train(replace(config, out=scratch / f"out-{round_number}"), watch)
        whole = time.perf_counter() - began
        losses, loop, loop_cpu = bare(config, batches)
        if round_number == 0:
            apart = check_same(watch.losses, losses)
            continue
        for way, taken in ((OURS, record["seconds"]), (WHOLE, whole), (BARE, loop)):
            seconds[way].append(taken)
        cpu[OURS].append(watch.marks[1] - watch.marks[0])
        cpu[BARE].append(loop_cpu)
    rows: list[dict[str, Any]] = []
    for way, found in seconds.items():
        timing = timing_of(found)
        rows.append(
            {"case": name, "provider": way, "repeats": repeats, "tokens": tokens, "parameters": record["parameters"],
             "tokens_per_s": tokens / timing.median_s, "loss_difference": apart, **vars(timing)}
        )  # fmt: skip
    what = "tokens/s of the steps, mergemix train / bare loop"
    rows.append(ratio_row(name, what, seconds[BARE], seconds[OURS]))
    rows.append(ratio_row(name, "the same by processor seconds", cpu[BARE], cpu[OURS]))
    return rows, [verdict(f"{name}: {what}", rows[-2]["median"], BAR, at_least=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", default="0.5M,10M", help=f"some of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where to put models and corpora")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    rows, verdicts = [], []
    try:
        with scratch_directory(options.scratch, 10**9) as scratch:
            taken_under = conditions(["mergemix", "torch", "transformers", "accelerate"])
            taken_under |= storage_conditions(scratch) | {"torch_threads": torch.get_num_threads()}
            print(json.dumps(taken_under))
            for name in options.sizes.split(","):
                (scratch / name).mkdir()
                found, shown = measure(name, scratch / name, options.repeats)
                print(f"roofline: {found[2]['provider']}: {found[2]['tokens_per_s']:,.0f} tokens/s")
                print(format_table(found[:3], COLUMNS))
                print(format_table(found[3:], RATIO_COLUMNS))
                print(verdict_lines(shown))
                rows += found
                verdicts += shown
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        write_results(options.out, rows + verdicts, taken_under)
    outcome = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "train", "shown": outcome}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
