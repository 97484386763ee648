"""How good a mixture each search finds with how many candidates: simulated studies on surfaces with a known truth.

    python -m benchmarks.bench_search [--data REGMIX] [--matrix FILE.npz ...] [--study DIR ...] [--out FILE]

Surfaces: right and wrong answers to items, simulated anew for every replay, on 4, 5 and 6 domains in turn; with --data
the losses of RegMix's 768 runs (17 domains), with --matrix and --study measured mixtures, all fitted by Gaussian
processes whose posterior mean is the truth (which suits searches that model with the same processes). Measurements
have the noise of the items' answers, or what the fit left over.

Regret is what a mixture's true utility lacks to the optimum, in units of the optimum's lead over the uniform mixture:
1 is no better than uniform. Of which mixture, there are two answers: the one with the best observed score, and the
one that the search recommends after smoothing all scores by a Gaussian process. In the verdicts all but `random`
answer with the latter; `random` with the former, as its user would, and in a second row with the latter too.
Prints a table, what must be shown and whether it was, and one JSON line. Nothing is timed but the whole.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import BenchmarkError
from benchmarks.common import conditions, format_table, write_results
from benchmarks.merges import Rows, verdict, verdict_lines
from benchmarks.search_surfaces import (
    Scale,
    Surface,
    objective,
    read_measured,
    read_study,
    regmix,
    simulated_with_a_best,
)
from mergemix.errors import MergeMixError
from mergemix.evals.stats import t_quantile
from mergemix.mixture import Mixture
from mergemix.search import open_search
from mergemix.search.base import Search
from mergemix.search.posterior import one_thread

BUDGETS = (10, 20, 30, 40, 50, 80, 100, 150, 200)
QUICK: dict[str, Any] = {"replays": 2, "budgets": (10, 12)}
DOMAINS = (4, 5, 6)
CONFIDENCE = 0.95
OBSERVED, RECOMMENDED = "observed", "recommended"
COLUMNS = ["case", "provider", "budget", "answer", "replays", "regret", "low", "high"]


@dataclass(frozen=True)
class Strategy:
    """A search as it is opened. most: the largest budget. anew: its proposals depend on the budget."""

    kind: str
    most: int
    anew: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


RANDOM, BO, PAPER = "random", "bo", "surrogate, lightgbm (the paper's)"
STRATEGIES = {
    RANDOM: Strategy("random", 200),
    "grid": Strategy("grid", 200, anew=True),
    "cma": Strategy("cma", 100),
    PAPER: Strategy("surrogate", 80, anew=True, options={"surrogate": "lightgbm"}),
    "surrogate, auto": Strategy("surrogate", 80, anew=True, options={"surrogate": "auto"}),
    BO: Strategy("bo", 100),
}
ANEW = (40, 80, 200)  # budgets of searches that must be run anew for each

Regrets = dict[int, dict[str, float]]  # by budget and answer


def replay(surface: Surface, scale: Scale, strategy: Strategy, budgets: Sequence[int], seed: int) -> Regrets:
    """One study by each budget, or, where they are the same, one with the largest."""
    budgets = [budget for budget in budgets if len(surface.names) < budget <= strategy.most]
    if not strategy.anew:
        return _study(surface, scale, strategy, budgets, seed) if budgets else {}
    found: Regrets = {}
    for budget in budgets:
        if budget in ANEW or budget == max(budgets):
            found |= _study(surface, scale, strategy, [budget], seed)
    return found


def _study(surface: Surface, scale: Scale, strategy: Strategy, marks: Sequence[int], seed: int) -> Regrets:
    rng = np.random.default_rng((seed, 1))
    search = open_search(strategy.kind, surface.names, budget=max(marks), seed=seed, **strategy.options)
    search.objective = objective
    found: Regrets = {}
    count = 0
    while not search.stop():
        for mixture in search.ask():
            search.tell([(mixture, surface.outcome(mixture, rng))])
            count += 1
            if count in marks:
                found[count] = _regrets(surface, scale, search)
    # A search that stopped for a reason of its own keeps what it has found.
    return found | {mark: _regrets(surface, scale, search) for mark in marks if mark > count}


def _regrets(surface: Surface, scale: Scale, search: Search) -> dict[str, float]:
    def regret(mixture: Mixture) -> float:
        return scale.regret(float(surface.utility(np.array([mixture.weights]))[0]))

    told = [(mixture, outcome.utility or -math.inf) for mixture, outcome in search.told()]
    best = max(told, key=lambda pair: pair[1])[0]
    recommended = search.recommend()
    assert recommended is not None, "start points do not fail here"
    return {OBSERVED: regret(best), RECOMMENDED: regret(recommended[0])}


def summary(case: str, provider: str, replays: Sequence[Regrets]) -> Rows:
    """Means over replays with t intervals, by budget and answer."""
    rows: Rows = []
    for budget in sorted(set.intersection(*(set(found) for found in replays))):
        for answer in (OBSERVED, RECOMMENDED):
            values = np.array([found[budget][answer] for found in replays])
            reach = (
                t_quantile((1 + CONFIDENCE) / 2, len(values) - 1)
                * values.std(ddof=1)
                / math.sqrt(len(values))
            )
            rows.append(
                {
                    "case": case, "provider": provider, "budget": budget, "answer": answer, "replays": len(values),
                    "regret": float(values.mean()), "low": float(values.mean() - reach),
                    "high": float(values.mean() + reach),
                }
            )  # fmt: skip
    return rows


def verdicts(case: str, rows: Rows) -> Rows:
    """Who reaches the regret of random search at 200 candidates, within 50 and 80."""

    def regret(provider: str, budget: int, answer: str) -> float | None:
        key = (provider, budget, answer)
        return next((r["regret"] for r in rows if (r["provider"], r["budget"], r["answer"]) == key), None)

    shown: Rows = []
    for provider, budget in ((BO, 50), (PAPER, 80)):
        reached = regret(provider, budget, RECOMMENDED)
        for answer, which in ((OBSERVED, "random"), (RECOMMENDED, "random with recommendation")):
            bar = regret(RANDOM, 200, answer)
            if bar is not None and reached is not None:
                what = f"{case}: {provider}: regret within {budget}, that of {which} at 200"
                shown.append(verdict(what, reached, bar, at_least=False))
    return shown


Opened = Callable[[int], Surface]  # the surface of a replay


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Opened]]:
    def fixed(surface: Surface) -> Opened:
        return lambda seed: surface

    if not options.skip_items:
        yield "items, 4 to 6 domains", lambda seed: simulated_with_a_best(DOMAINS[seed % len(DOMAINS)], seed)
    if options.data:
        yield "RegMix, 17 domains", fixed(regmix(options.data))
    for path in options.matrix:
        yield path.name, fixed(read_measured(path))
    for path in options.study:
        yield f"study {path.name}", fixed(read_study(path))


def measure(options: argparse.Namespace, case: str, opened: Opened) -> tuple[Rows, Rows]:
    """(rows, verdicts) of one kind of surface."""
    found: dict[str, list[Regrets]] = {name: [] for name in options.strategy}
    scale: Scale | None = None
    surface: Surface | None = None
    for number in range(options.replays):
        seed = options.seed + number
        now = opened(seed)
        if scale is None or now is not surface:
            scale, surface = Scale.of(now), now
        for name in options.strategy:
            started = time.process_time()
            found[name].append(replay(now, scale, STRATEGIES[name], options.budgets, seed))
            print(f"{case}, replay {number}, {name}: {time.process_time() - started:.1f} s", file=sys.stderr)
    rows = [row for name, replays in found.items() for row in summary(case, name, replays)]
    return rows, verdicts(case, rows)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="the directory of the RegMix data (CSV files)")
    parser.add_argument(
        "--matrix", type=Path, action="append", default=[], help="a .npz file: mixtures, and scores"
    )
    parser.add_argument("--study", type=Path, action="append", default=[], help="a study of full evaluations")
    parser.add_argument("--skip-items", action="store_true", help="no simulated items")
    parser.add_argument("--strategy", choices=STRATEGIES, action="append", help="only these")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--replays", type=int, default=10, help="of each kind of surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"shows only that it runs: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    options.strategy = options.strategy or list(STRATEGIES)
    if options.replays < 2:
        parser.error("--replays must be 2 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    taken_under = conditions(["mergemix", "numpy", "scipy", "lightgbm", "cma"])
    taken_under |= {"replays": options.replays, "seed": options.seed, "budgets": list(options.budgets)}
    print(json.dumps(taken_under))
    rows: Rows = []
    shown: Rows = []
    started = time.process_time()
    try:
        with one_thread():
            for case, opened in cases(options):
                found, reached = measure(options, case, opened)
                print(format_table(found, COLUMNS), flush=True)
                rows += found
                shown += reached
    except (BenchmarkError, MergeMixError) as error:
        print(error, file=sys.stderr)
        return 1
    taken_under["cpu_s"] = round(time.process_time() - started, 1)
    print(verdict_lines(shown))
    if options.out:
        write_results(options.out, rows + shown, taken_under)
    by_what = {row["what"]: [row["measured"], row["bar"], row["met"]] for row in shown}
    print(json.dumps({"bench": "search", "replays": options.replays, "shown": by_what}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
