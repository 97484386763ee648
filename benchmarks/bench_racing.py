"""How many item evaluations racing saves, and how often it loses the best candidate.

    python -m benchmarks.bench_racing [--matrix FILE ...] [--study DIR ...] [--replays 200] [--out FILE]

Replays searches on score matrices in which every candidate has answered every item, so the true best is known:
candidates come in random order, each is asked its items in a random order of its own and stopped by the race, or
answers all. Matrices are recorded (--study, --matrix) or, by default, simulated anew for every replay. Beside the
race with and without item selection stand full evaluation (its factor is 1) and successive halving, which needs all
candidates at once. Prints a table, what must be shown and whether it was, and one JSON line. There is no
roofline: nothing is timed, and the figures do not depend on the machine.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import BenchmarkError
from benchmarks.common import conditions, format_table, write_results
from benchmarks.merges import Rows, verdict, verdict_lines
from benchmarks.score_matrices import SURFACES, Matrix, read_matrix, read_study, simulate
from mergemix.errors import MergeMixError
from mergemix.evals.item_order import order_items
from mergemix.evals.stats import t_quantile
from mergemix.evals.utility import Utility
from mergemix.search.racing import ALPHA, Race

QUICK = {"replays": 4, "candidates": 12, "items": [60, 80]}
SELECTED, UNSELECTED, HALVING = "race, item selection", "race, random items", "successive halving"
COLUMNS = [
    "case",
    "provider",
    "replays",
    "factor",
    "factor_low",
    "factor_high",
    "wrong",
    "wrong_low",
    "wrong_high",
]
COLUMNS += ["answered_all", "largest_loss"]
FACTOR_BAR, WRONG_BAR = 3.0, 0.05
CONFIDENCE = 0.95

Items = dict[str, np.ndarray]


@dataclass(frozen=True)
class Replay:
    """One search. cost: share of all candidates' items that were asked. answered_all: candidates that were.

    wrong: the true best is not the winner. loss: the true best's utility less the winner's, in standard deviations
    of the candidates' utilities.
    """

    cost: float
    wrong: bool
    loss: float
    answered_all: int


@dataclass(frozen=True)
class Search:
    """Candidates in the order in which they come; seed: of the orders of items."""

    utility: Utility
    candidates: Sequence[Items]
    seed: int

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(scores) for name, scores in self.candidates[0].items()}

    def replay(self, asked: float, whole: Sequence[int]) -> Replay:
        """What it comes to when `asked` items were asked in all, and the candidates `whole` answered all."""
        truth = np.array([self.utility(items) for items in self.candidates])
        loss = truth.max() - truth[list(whole)].max()
        spread = truth.std() or 1.0
        num_items = sum(self.counts.values())
        return Replay(asked / num_items / len(truth), bool(loss > 1e-12), float(loss / spread), len(whole))


def race(search: Search, *, select: bool, first_full: int) -> Replay:
    """Every candidate after the first ones is raced against those that answered all before it."""
    whole: list[int] = []
    asked = 0
    for number, scores in enumerate(search.candidates):
        incumbents = [search.candidates[index] for index in whole]
        order = order_items(
            search.utility.weights,
            search.counts,
            incumbents if select else (),
            seed=(search.seed, number),
        )
        block = order.num_blocks - 1
        stopped = False
        if number >= first_full:
            contest = Race(search.utility, order, incumbents)
            for block in range(order.num_blocks):
                stopped = contest.look(block, scores).stop
                if stopped:
                    break
        asked += order.num_asked(block)
        if not stopped:
            whole.append(number)
    return search.replay(asked, whole)


def halving(search: Search) -> Replay:
    """All candidates on a random few items, then the better half on twice as many, until one is left with all."""
    rng = np.random.default_rng(search.seed)
    orders = {name: rng.permutation(count) for name, count in search.counts.items()}
    left = list(range(len(search.candidates)))
    rounds = math.ceil(math.log2(len(left)))
    asked, before = 0, 0
    for number in range(rounds + 1):
        share = 2.0 ** (number - rounds)
        taken = {name: order[: max(1, round(share * len(order)))] for name, order in orders.items()}
        now = sum(map(len, taken.values()))
        asked += len(left) * (now - before)
        before = now
        parts = {
            index: {name: search.candidates[index][name][items] for name, items in taken.items()}
            for index in left
        }
        left.sort(key=lambda index: -search.utility(parts[index]))
        if number < rounds:
            left = left[: math.ceil(len(left) / 2)]
    return search.replay(asked, left[:1])


def utility_for(matrix: Matrix, *, lower: Sequence[str], zscore: bool) -> Utility:
    """The mean over the benchmarks, of z-scores over the candidates where they are on different scales."""
    if unknown := set(lower) - set(matrix):
        raise BenchmarkError(
            f"--lower must name benchmarks of the matrix ({', '.join(matrix)}), not {unknown}"
        )
    weights = {}
    for name, scores in matrix.items():
        scale = float(np.nanmean(scores, axis=1).std()) if zscore else 1.0
        weights[name] = (-1 if name in lower else 1) / len(matrix) / (scale or 1.0)
    return Utility(weights, 0.0)


def searches(options: argparse.Namespace, case: str, recorded: Matrix | None) -> Iterator[Search]:
    for seed in range(options.replays):
        rng = np.random.default_rng((options.seed, seed))
        matrix = recorded or simulate(SURFACES[case], options.candidates, options.items, rng)
        utility = utility_for(matrix, lower=options.lower, zscore=options.zscore)
        order = rng.permutation(len(next(iter(matrix.values()))))
        yield Search(
            utility, [{name: scores[index] for name, scores in matrix.items()} for index in order], seed
        )


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Interval of a share (Wilson, JASA 1927)."""
    z = t_quantile((1 + CONFIDENCE) / 2, math.inf)
    share, extra = hits / trials, z**2 / trials
    centre = (share + extra / 2) / (1 + extra)
    reach = z / (1 + extra) * math.sqrt(share * (1 - share) / trials + extra / trials / 4)
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def summary(case: str, provider: str, replays: Sequence[Replay]) -> dict[str, Any]:
    """factor: items of full evaluation over items asked, of all replays together. wrong: share without the best."""
    costs = np.array([replay.cost for replay in replays])
    reach = t_quantile((1 + CONFIDENCE) / 2, len(costs) - 1) * costs.std(ddof=1) / math.sqrt(len(costs))
    wrong = sum(replay.wrong for replay in replays)
    low, high = wilson(wrong, len(replays))
    return {
        "case": case,
        "provider": provider,
        "replays": len(replays),
        "factor": float(1 / costs.mean()),
        "factor_low": float(1 / (costs.mean() + reach)),
        "factor_high": float(1 / max(costs.mean() - reach, 1e-9)),
        "wrong": wrong / len(replays),
        "wrong_low": low,
        "wrong_high": high,
        "same_winner": 1 - wrong / len(replays),
        "answered_all": float(np.mean([replay.answered_all for replay in replays])),
        "largest_loss": max(replay.loss for replay in replays),
    }


def measure(options: argparse.Namespace, case: str, recorded: Matrix | None) -> tuple[Rows, Rows]:
    """(rows, verdicts) of one kind of matrix."""
    ways: Mapping[str, Callable[[Search], Replay]] = {
        SELECTED: lambda search: race(search, select=True, first_full=options.first_full),
        UNSELECTED: lambda search: race(search, select=False, first_full=options.first_full),
        HALVING: halving,
    }
    found: dict[str, list[Replay]] = {name: [] for name in ways}
    for search in searches(options, case, recorded):
        for name, way in ways.items():
            found[name].append(way(search))
    rows = [summary(case, name, replays) for name, replays in found.items()]
    shown = []
    for row in rows[:2]:
        what = f"{case}: {row['provider']}: "
        shown += [
            verdict(what + "fewer item evaluations, times", row["factor"], FACTOR_BAR, at_least=True),
            verdict(what + "share of replays without the true best", row["wrong"], WRONG_BAR, at_least=False),
        ]
    return rows, shown


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--study", type=Path, action="append", default=[], help="a study of full evaluations")
    parser.add_argument(
        "--matrix", type=Path, action="append", default=[], help="scores in a .json or .npz file"
    )
    parser.add_argument(
        "--lower", action="append", default=[], help="a benchmark where lower scores are better"
    )
    parser.add_argument("--zscore", action="store_true", help="benchmarks are on different scales")
    parser.add_argument("--surface", choices=SURFACES, action="append", help="simulate only these")
    parser.add_argument("--replays", type=int, default=200, help="of each kind of matrix")
    parser.add_argument("--candidates", type=int, default=40, help="simulated")
    parser.add_argument(
        "--items", type=int, nargs="+", default=[200, 350, 500], help="simulated, by benchmark"
    )
    parser.add_argument(
        "--first-full", type=int, default=1, help="candidates that answer all before any is raced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"shows only that it runs: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    if options.replays < 2 or options.first_full < 1:
        parser.error("--replays must be 2 or more, and --first-full 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    taken_under = conditions(["mergemix", "numpy"]) | {
        "alpha": ALPHA, "replays": options.replays, "seed": options.seed, "first_full": options.first_full,
        "candidates": options.candidates, "items": options.items,
    }  # fmt: skip
    print(json.dumps(taken_under))
    rows: Rows = []
    verdicts: Rows = []
    try:
        recorded = {path.name: read_matrix(path) for path in options.matrix}
        recorded |= {f"study {path.name}": read_study(path) for path in options.study}
        simulated = options.surface or ([] if recorded else list(SURFACES))
        for case in [*recorded, *simulated]:
            found, shown = measure(options, case, recorded.get(case))
            print(format_table(found, COLUMNS), flush=True)
            rows += found
            verdicts += shown
    except (BenchmarkError, MergeMixError) as error:
        print(error, file=sys.stderr)
        return 1
    print(verdict_lines(verdicts))
    if options.out:
        write_results(options.out, rows + verdicts, taken_under)
    shown_by_what = {row["what"]: [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "racing", "replays": options.replays, "shown": shown_by_what}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
