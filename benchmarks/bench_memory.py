"""How much memory a merge takes, against the size of the model, the number of experts and --memory.

    python -m benchmarks.bench_memory [--sizes 1gb,4gb,16gb] [--experts 2,8,32] [--memory 256MiB] [--out FILE]

The measure is the peak resident memory of a `mergemix merge`, less that of the same command on a model of
megabytes with two experts: what the interpreter, the imports and the compiled kernel take is not the merge's. The bound
is --memory. Models are sparse files, different at the head of every tensor and zero elsewhere; results are not, so that
the default sizes need 17 GB of disk. --quick measures 0.3 and 1 GB. Prints a table, what must be shown and whether it
was, and one JSON line. Nothing is measured unless results equal the fp32 reference bit for bit.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import BenchmarkError, ChildRun, merge
from benchmarks.common import conditions, format_table, write_results
from benchmarks.merges import Rows, differing_tensors, uneven_weights, verdict, verdict_lines
from benchmarks.models import SHAPES, write_model
from benchmarks.storage import remove, scratch_directory, storage_conditions
from mergemix.mixture import Mixture
from mergemix.options import Size

STARTED_SHAPE, STARTED_REPEATS = "test", 3
FLAT = 1.25  # the largest peak of a process over the smallest, for 16 times as many experts or bytes
QUICK = {"sizes": ["small", "1gb"], "experts": [2, 8]}
COLUMNS = [
    "shape",
    "model_mb",
    "experts",
    "memory",
    "median_mb",
    "p20_mb",
    "p80_mb",
    "peak_rss_mb",
    "seconds",
]


class Bench:
    """The models that were made, and merges of them. memory: the bound on the buffers, as users write it."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def experts(self, shape: str, count: int) -> dict[str, Path]:
        paths = {f"e{k}": self._scratch / f"{shape}-{k}" for k in range(count)}
        for seed, path in enumerate(paths.values()):
            if not path.exists():
                write_model(path, SHAPES[shape], seed, sparse=True)
        return paths

    def run(self, shape: str, count: int, memory: str, check: bool = False) -> ChildRun:
        """One merge, its result removed. check: raise BenchmarkError unless it is right."""
        experts = self.experts(shape, count)
        out, weights = self._scratch / "out", uneven_weights(list(experts))
        finished = merge(experts, out, weights=weights, memory=memory)
        exact = Mixture.of(list(experts), weights).weights
        if check and (wrong := differing_tensors(out, list(experts.values()), exact)):
            raise BenchmarkError(
                f"wrong results, so nothing was measured: {count} experts of {shape} with --memory {memory}: "
                f"{len(wrong)} tensors differ from the fp32 reference, {wrong[0]} among them"
            )
        remove(out)
        return finished


def started_bytes(bench: Bench, memory: str) -> int:
    """The least peak of merges of next to nothing: a merge's peak above it is what the merge itself takes."""
    return min(bench.run(STARTED_SHAPE, 2, memory).peak_rss_bytes for _ in range(STARTED_REPEATS))


def measure(bench: Bench, case: tuple[str, int, str], started: int, repeats: int) -> dict[str, Any]:
    """One row. median_mb, p20_mb, p80_mb: the peak above the started process."""
    shape, count, memory = case
    runs = [bench.run(shape, count, memory) for _ in range(repeats)]
    row: dict[str, Any] = {
        "case": "peak",
        "shape": shape,
        "model_mb": SHAPES[shape].nbytes / 1e6,
        "experts": count,
    }
    row |= {"memory": memory, "repeats": repeats, "started_mb": started / 1e6}
    above = [(run.peak_rss_bytes - started) / 1e6 for run in runs]
    row |= zip(("median_mb", "p20_mb", "p80_mb"), np.quantile(above, [0.5, 0.2, 0.8]).tolist(), strict=True)
    row["peak_rss_mb"] = max(run.peak_rss_bytes for run in runs) / 1e6
    row["seconds"] = float(np.median([run.seconds for run in runs]))
    return row


def verdicts(rows: Rows, memories: Sequence[str]) -> Rows:
    """Within the bound, for every bound; and flat: the whole process' peak hardly grows with the model or K."""
    found = []
    for memory in memories:
        own = [row for row in rows if row["memory"] == memory]
        largest = max(row["peak_rss_mb"] - row["started_mb"] for row in own)
        bound_mb = Size().convert(memory, None, None) / 1e6
        found.append(
            verdict(f"--memory {memory}: largest peak MB above start", largest, bound_mb, at_least=False)
        )
        for what, fixed in (("model size", "experts"), ("number of experts", "shape")):
            peaks = [row["peak_rss_mb"] for row in own if row[fixed] == own[0][fixed]]
            growth = max(peaks) / min(peaks)
            found.append(
                verdict(
                    f"--memory {memory}: largest / smallest peak over the {what}",
                    growth,
                    FLAT,
                    at_least=False,
                )
            )
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    def shapes(text: str) -> list[str]:
        if unknown := set(text.split(",")) - SHAPES.keys():
            raise argparse.ArgumentTypeError(f"{unknown.pop()!r} is none of {', '.join(SHAPES)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--sizes", type=shapes, default=["1gb", "4gb", "16gb"], help="with the fewest experts"
    )
    parser.add_argument("--experts", type=lambda text: [int(k) for k in text.split(",")], default=[2, 8, 32],
                        help="of the first size")  # fmt: skip
    parser.add_argument("--memory", type=lambda text: text.split(","), default=["256MiB", "64MiB"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to put the models and results")
    parser.add_argument("--quick", action="store_true", help=f"small models: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    return options


def run(options: argparse.Namespace, scratch: Path) -> Rows:
    """All rows, the verdicts last."""
    bench = Bench(scratch)
    first, fewest = options.sizes[0], options.experts[0]
    for memory in options.memory:
        for shape, count in {(STARTED_SHAPE, max(options.experts)), (first, fewest)}:
            bench.run(shape, count, memory, check=True)
    cases = [(shape, fewest, memory) for memory in options.memory for shape in options.sizes]
    cases += [(first, count, memory) for memory in options.memory for count in options.experts[1:]]
    started = {memory: started_bytes(bench, memory) for memory in options.memory}
    rows = [measure(bench, case, started[case[2]], options.repeats) for case in cases]
    print("MB above the started process:", format_table(rows, COLUMNS), sep="\n")
    shown = verdicts(rows, options.memory)
    print(verdict_lines(shown))
    return rows + shown


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    largest = max(SHAPES[shape].nbytes for shape in options.sizes)
    taken_under = conditions(["mergemix", "numpy", "numba"])
    print("roofline: the bound is --memory; below it, less is no better")
    try:
        with scratch_directory(options.scratch, largest + (1 << 30)) as scratch:
            taken_under |= storage_conditions(scratch)
            print(json.dumps(taken_under))
            rows = run(options, scratch)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        write_results(options.out, rows, taken_under)
    shown = {row["what"]: [row["measured"], row["met"]] for row in rows if row["case"] == "verdict"}
    print(json.dumps({"bench": "memory", "shown": shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
