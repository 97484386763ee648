"""How long LoRA adapters take to merge as adapters, against writing every expert whole first.

    python -m benchmarks.bench_lora [--shape 1b] [--experts 4] [--rank 16] [--scratch DIR] [--out FILE]

K adapters of all linear layers over one base, everything in the page cache, every run a process of its own:
`mergemix merge` on the adapters; base + scale * B @ A written as K checkpoints with torch, then `mergemix merge` on
those; and, where `peft` is installed, its merge_and_unload of one adapter. Prints the roofline, a table, what must be
shown and whether it was, and one JSON line. Nothing is timed unless our result is as near to the fp64 truth as
fp32 sums that are rounded once can be. The defaults need 15 GB of disk; --quick needs 3 GB.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.children import BenchmarkError, ChildRun, added, in_turn, merge, run_child
from benchmarks.common import conditions, format_table, time_side_by_side, write_results
from benchmarks.lora_ways import PREFIX, adapter_scale
from benchmarks.merges import (
    BF16_ROUNDOFF,
    RATIO_COLUMNS,
    RUN_COLUMNS,
    OpenModel,
    Rows,
    ratio_row,
    roofline_lines,
    run_row,
    uneven_weights,
    verdict,
    verdict_lines,
)
from benchmarks.models import SHAPES, Shape, weight_files, write_adapter, write_model
from benchmarks.storage import (
    DISK_WRITE,
    PAGE_CACHE_READ,
    best_row,
    disk_rooflines,
    make_warm,
    remove,
    scratch_directory,
    storage_conditions,
)

QUICK = {"shape": "small", "repeats": 3}
OURS, DENSE, PEFT = (
    "mergemix merge, adapters",
    "experts written whole, then mergemix merge",
    "peft, one adapter",
)
GATE_ROWS = 1024
TINY = 1e-300
FP32_ROUNDOFF = 2.0**-24
MATMUL = 2048  # rows and columns of the product that the processor's fp32 rate is measured with


@dataclass(frozen=True)
class Job:
    """Adapters over one base. The weights sum to one, so the base's share is that of every adapter."""

    scratch: Path
    shape: Shape
    rank: int
    base: Path
    adapters: Mapping[str, Path]
    weights: Mapping[str, float]
    memory: str

    @property
    def files(self) -> list[Path]:
        return weight_files([self.base, *self.adapters.values()])

    @property
    def moved_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files) + self.shape.nbytes

    @property
    def operations(self) -> int:
        """fp32 products and sums of the low-rank part: two per element and rank, not fused."""
        elements = sum(rows * columns for rows, columns in self.shape.linear().values())
        return 2 * elements * self.rank * len(self.adapters)

    def ours(self, out: Path) -> ChildRun:
        return merge(self.adapters, out, weights=self.weights, base=self.base, memory=self.memory)

    def dense(self, out: Path) -> ChildRun:
        experts = {name: self.scratch / f"dense-{name}" for name in self.adapters}
        wrote = self._other_way("dense", {self.adapters[name]: path for name, path in experts.items()})
        merged = merge(experts, out, weights=self.weights, memory=self.memory)
        for path in experts.values():
            remove(path)
        return added([wrote, merged])

    def peft(self, out: Path) -> ChildRun:
        return self._other_way("peft", {next(iter(self.adapters.values())): out})

    def _other_way(self, way: str, outs: Mapping[Path, Path]) -> ChildRun:
        paths = [path for adapter_and_out in outs.items() for path in adapter_and_out]
        return run_child([sys.executable, "-m", "benchmarks.lora_ways", way, self.base, *paths])

    def measured(self, run: Callable[[Path], ChildRun]) -> ChildRun:
        """One run, inputs warm; its result is removed."""
        make_warm(self.files)
        out = self.scratch / "out"
        finished = run(out)
        remove(out)
        return finished


def sampled_tensors(shape: Shape) -> list[str]:
    """Names of one tensor of each kind: every linear layer of the last block, and what adapters leave alone."""
    last = f"model.layers.{shape.layers - 1}."
    return [name for name in shape.tensors() if name.startswith((last, "model.norm", "model.embed"))]


def truth(job: Job, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(base + sum of weight * scale * B @ A in fp64, the sum of its terms' magnitudes), of the first GATE_ROWS rows."""
    total = OpenModel(job.base).rows(name, 0, GATE_ROWS).double()
    magnitude = total.abs()
    prefix = f"{PREFIX}{name.removesuffix('.weight')}"
    for expert, adapter in job.adapters.items():
        factors = load_file(adapter / "adapter_model.safetensors")
        if f"{prefix}.lora_A.weight" in factors:
            down = factors[f"{prefix}.lora_A.weight"].double()
            scale = job.weights[expert] * adapter_scale(adapter)
            up = factors[f"{prefix}.lora_B.weight"][:GATE_ROWS].double() * scale
            total += up @ down
            magnitude += up.abs() @ down.abs()
    return total, magnitude


def errors(job: Job, merged: Path) -> tuple[float, float]:
    """(largest error as a share of what fp32 sums that are rounded once may have, root mean square of the errors in
    units of that of one rounding to bf16), over the sampled tensors.
    """
    result = OpenModel(merged)
    steps = job.rank * len(job.adapters) + 4  # roundings on the way of a term: scale, two products, sums
    shares, squares, single_squares = [], 0.0, 0.0
    for name in sampled_tensors(job.shape):
        exact, magnitude = truth(job, name)
        error = result.rows(name, 0, GATE_ROWS).double() - exact
        allowed = steps * FP32_ROUNDOFF * magnitude * (1 + BF16_ROUNDOFF) + BF16_ROUNDOFF * exact.abs()
        shares.append((error.abs() / allowed.clamp_min(TINY)).max().item())
        if not torch.equal(exact, exact.to(torch.bfloat16).double()):  # else it is a copy of the base
            squares += error.square().sum().item()
            single_squares += (exact.to(torch.bfloat16).double() - exact).square().sum().item()
    return float(np.max(shares)), (squares / single_squares) ** 0.5  # NaN if any is


def correctness_gate(job: Job) -> Rows:
    """How near both ways come to the truth. Raises BenchmarkError unless ours is within its bound."""
    rows = []
    for provider, run in ((OURS, job.ours), (DENSE, job.dense)):
        out = job.scratch / "gate"
        run(out)
        largest, relative = errors(job, out)
        remove(out)
        if provider == OURS and not largest <= 1:
            raise BenchmarkError(
                f"wrong results, so nothing was timed: an error is {largest:.3g} times what fp32 sums that are "
                "rounded once may have"
            )
        rows.append(
            {"case": "gate", "provider": provider, "share_of_bound": largest, "rms_in_roundings": relative}
        )
    return rows


def rooflines(job: Job) -> Rows:
    """Reads and writes of the disk, and the processor's fp32 rate (a matrix product's, fused; ours is not)."""
    left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    timing = time_side_by_side({"matmul": lambda: left @ right}, repeats=5)["matmul"]
    row = {
        "case": "roofline",
        "provider": "fp32 matrix product",
        "gflop_per_s": 2e-9 * MATMUL**3 / timing.median_s,
    }
    return [*disk_rooflines(job.files, job.scratch, job.shape.nbytes), row]


def floor_s(job: Job, rows: Rows) -> float:
    """Seconds below which no merge of the adapters can be: reads, writes and arithmetic overlapped without loss."""
    reading = (job.moved_bytes - job.shape.nbytes) / best_row(rows, PAGE_CACHE_READ)["gb_per_s"] / 1e9
    writing = job.shape.nbytes / best_row(rows, DISK_WRITE)["gb_per_s"] / 1e9
    computing = job.operations / rows[-1]["gflop_per_s"] / 1e9
    return max(reading, writing, computing)


def measure(job: Job, repeats: int) -> tuple[Rows, Rows]:
    """(rows, verdicts). PEFT's time is for one adapter, without the merge that would follow."""
    calls = {OURS: partial(job.measured, job.ours), DENSE: partial(job.measured, job.dense)}
    if importlib.util.find_spec("peft"):
        calls[PEFT] = partial(job.measured, job.peft)
    runs = in_turn(calls, repeats)
    rows = []
    for name, found in runs.items():
        steps = found[0].reported if name == PEFT else ()
        medians = {step: float(np.median([run.reported[step] for run in found])) for step in steps}
        rows.append(run_row("warm", name, found, job.moved_bytes) | medians)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    what = "seconds, experts written whole / adapters"
    rows.append(ratio_row("warm", what, seconds[DENSE], seconds[OURS]))
    shown = [verdict(f"warm: {what}", rows[-1]["median"], 1, at_least=True)]
    speedup = None
    if PEFT in runs:
        rows.append(
            ratio_row("warm", "seconds, peft for one adapter / all adapters", seconds[PEFT], seconds[OURS])
        )
        speedup = rows[-1]["median"]
    return rows, [
        *shown,
        verdict("warm: seconds, peft for one adapter / all adapters", speedup, 1, at_least=True),
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--experts", type=int, default=4, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--scratch", type=Path, help="where to put models and results, on the disk to be measured"
    )
    parser.add_argument("--quick", action="store_true", help=f"small models: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    return options


def run(options: argparse.Namespace, scratch: Path) -> tuple[Rows, Rows, float]:
    """(rows, verdicts, the floor in seconds), printed as they come."""
    shape = SHAPES[options.shape]
    base = write_model(scratch / "base", shape, 0)
    adapters = {
        f"e{k}": write_adapter(scratch / f"adapter-{k}", shape, k, rank=options.rank, alpha=2 * options.rank)
        for k in range(options.experts)
    }
    job = Job(scratch, shape, options.rank, base, adapters, uneven_weights(list(adapters)), options.memory)
    rows = rooflines(job)
    floor = floor_s(job, rows)
    print(roofline_lines(rows))
    print(f"no merge of these adapters in less than {floor:.2f} s")
    rows += (gate := correctness_gate(job))
    print(format_table(gate, ["provider", "share_of_bound", "rms_in_roundings"]))
    found, shown = measure(job, options.repeats)
    print(format_table([row for row in found if "median_s" in row], RUN_COLUMNS))
    print(format_table([row for row in found if "median" in row], RATIO_COLUMNS))
    print(verdict_lines(shown))
    return rows + found, shown, floor


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    model_bytes = SHAPES[options.shape].nbytes
    try:
        with scratch_directory(options.scratch, (options.experts + 3) * model_bytes) as scratch:
            taken_under = conditions(
                ["mergemix", "numpy", "numba", "torch", "safetensors", "peft", "transformers"]
            )
            taken_under |= storage_conditions(scratch) | {
                "shape": options.shape, "model_bytes": model_bytes, "adapters": options.experts,
                "rank": options.rank, "memory": options.memory,
            }  # fmt: skip
            print(json.dumps(taken_under))
            rows, verdicts, floor = run(options, scratch)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        write_results(options.out, rows + verdicts, taken_under | {"floor_s": floor})
    shown = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "lora", "shape": options.shape, "floor_s": floor, "shown": shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
