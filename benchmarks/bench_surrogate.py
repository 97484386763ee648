"""How well surrogates rank mixtures that they have not seen, and how often their intervals hold the truth.

    python -m benchmarks.bench_surrogate [--data DIR] [--subsamples 10] [--out FILE] [--quick]

DIR: measured runs in the layout that `mergemix fit` reads: train_mixture*.csv, test_mixture*.csv and, beside each,
one other train_*.csv and test_*.csv with its metrics, such as RegMix's (github.com/sail-sg/regmix). Each surrogate is
fitted to random subsamples of the training runs, the same for all, and predicts the test runs. Without --data only
synthetic surfaces are measured. "mean" is the mean of all metrics; on it, `auto` also has the mean of the metrics' own
predictions ("auto, one score" has not). "lightgbm" is the paper's, with the library's trees but smaller leaves; "trees"
are bagged ones of few leaves, which `auto` has among its members. Prints a table, what must be shown and
whether it was, and one JSON line. There is no roofline: what is shown does not depend on the machine, and seconds
are those of one fit on one thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import BenchmarkError
from benchmarks.common import conditions, format_table, write_results
from benchmarks.merges import Rows, verdict, verdict_lines
from mergemix.errors import MergeMixError
from mergemix.fit import MEAN, fit_targets, spearman, target_scores
from mergemix.measured import Measured, read_measured
from mergemix.search.surrogates import SURROGATES, Average, Surrogate, open_surrogate

AUTO, ALONE, COLUMNS = "auto", "auto, one score", "trees, mean of metrics"
RIVALS = ("lightgbm", "trees")
QUICK = {"subsamples": 2, "points": [8], "test_points": 40}
COLUMNS_SHOWN = ["case", "n", "target", "surrogate", "spearman", "sd", "low", "coverage90", "seconds"]
# (n, is it the mean): by how much `auto` must rank better than LightGBM (numbers of the project's issue).
MARGINS = {(40, True): 0.07, (40, False): 0.07, (128, True): 0.04, (128, False): 0.01}
WORSE_THAN_BEST = 0.01
COVERAGE = (0.85, 0.95)
TEST_POINTS = 400


@dataclass(frozen=True)
class Case:
    """Runs to fit to and to test on. targets: by name as of `target_scores`, those that are measured."""

    name: str
    train: Measured
    test: Measured
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    spearman: float
    coverage: float
    seconds: float


def quadratic(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    k = x.shape[1]
    pairs = rng.normal(0, 2, (k, k))
    return x @ rng.normal(0, 1, k) + np.einsum("nj,jk,nk->n", x, pairs, x)


def logarithmic(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return -np.log(x + 0.01) @ rng.gamma(1.0, 1.0, x.shape[1])


def mixing_law(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 2 + np.exp(x @ rng.normal(0, 1.5, x.shape[1]))


def saturating(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    k = x.shape[1]
    return (1 - np.exp(-x / rng.uniform(0.02, 0.5, k))) @ rng.gamma(1.0, 1.0, k)


def kinks(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.max(x @ rng.normal(0, 1, (x.shape[1], 3)) + rng.normal(0, 0.3, 3), axis=1)


def noise(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(len(x))


SURFACES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "quadratic": quadratic, "logarithmic": logarithmic, "mixing law": mixing_law, "saturating": saturating,
    "kinks": kinks, "noise": noise,
}  # fmt: skip


def synthetic(surface: str, k: int, n: int, test_points: int, seed: int) -> tuple[Measured, Measured]:
    """(train, test) of a random surface over k domains; measurements have a tenth of its spread as noise."""
    rng = np.random.default_rng((seed, k, list(SURFACES).index(surface)))
    shares = rng.dirichlet(np.full(k, 0.7), n + test_points)
    scores = SURFACES[surface](shares, rng)
    scores = scores + 0.1 * (scores.std() or 1.0) * rng.normal(size=len(scores))
    domains = tuple(f"domain{i}" for i in range(k))
    train, test = (
        Measured(domains, ("score",), shares[part], scores[part, None]) for part in (slice(n), slice(n, None))
    )
    return train, test


def read_data(directory: Path) -> tuple[Measured, Measured]:
    """(train, test) of a directory as the module says."""

    def files(part: str) -> tuple[Path, Path]:
        mixtures = sorted(directory.glob(f"{part}_mixture*.csv"))
        others = sorted(set(directory.glob(f"{part}_*.csv")) - set(mixtures))
        if len(mixtures) != 1 or len(others) != 1:
            raise BenchmarkError(
                f"--data must hold one {part}_mixture*.csv and one other {part}_*.csv, but {directory} holds "
                f"{[path.name for path in (*mixtures, *others)]}"
            )
        return mixtures[0], others[0]

    train = read_measured(*files("train"))
    return train, read_measured(*files("test"), like=train)


def subsample(measured: Measured, n: int, seed: int) -> Measured:
    chosen = np.sort(np.random.default_rng((seed, n)).permutation(len(measured.shares))[:n])
    return Measured(measured.domains, measured.metrics, measured.shares[chosen], measured.scores[chosen])


def fits(train: Measured, target: str) -> Iterator[tuple[str, Surrogate, float]]:
    """(name, fitted, seconds) of every surrogate that is compared."""
    scores = target_scores(train)[target]
    for name in (*SURROGATES, AUTO):
        started = time.perf_counter()
        fitted = open_surrogate(name).fit(train.shares, scores)
        seconds = time.perf_counter() - started
        if name == AUTO and target == MEAN:
            yield ALONE, fitted, seconds
            started = time.perf_counter()
            fitted = fit_targets(train, open_surrogate(AUTO), 0)[MEAN]
            seconds = time.perf_counter() - started
        yield name, fitted, seconds
    if target == MEAN:
        started = time.perf_counter()
        columns = [open_surrogate("trees").fit(train.shares, column) for column in train.scores.T]
        yield COLUMNS, Average.of(columns, train.shares, scores), time.perf_counter() - started


def measure(case: Case, train: Measured, target: str) -> dict[str, Score]:
    """By surrogate: how it does on the test runs."""
    truth = target_scores(case.test)[target]
    found = {}
    for name, fitted, seconds in fits(train, target):
        predicted = fitted.predict(case.test.shares)
        low, high = predicted.interval(0.9)
        inside = float(np.mean((low <= truth) & (truth <= high)))
        found[name] = Score(spearman(predicted.mean, truth) or 0.0, inside, seconds)
    return found


def summary(case: str, n: int, target: str, surrogate: str, scores: Sequence[Score]) -> dict[str, Any]:
    ranks = np.array([score.spearman for score in scores])
    return {
        "case": case, "n": n, "target": target, "surrogate": surrogate, "subsamples": len(scores),
        "spearman": float(ranks.mean()), "sd": float(ranks.std(ddof=1)), "low": float(ranks.min()),
        "coverage90": float(np.mean([score.coverage for score in scores])),
        "seconds": float(np.median([score.seconds for score in scores])),
    }  # fmt: skip


def verdicts_of(rows: Sequence[Mapping[str, Any]], *, margins: bool, ranked: bool = True) -> Rows:
    """What must be shown of one case, n and target. margins: those against LightGBM too. ranked: there is an order."""
    by_name = {row["surrogate"]: row for row in rows}
    auto = by_name[AUTO]
    where = f"{auto['case']}, n = {auto['n']}, {auto['target']}"
    shown = []
    bar = MARGINS.get((auto["n"], auto["target"] == MEAN)) if margins else None
    if bar is not None:
        for rival in RIVALS:
            gain = auto["spearman"] - by_name[rival]["spearman"]
            shown.append(verdict(f"{where}: Spearman of auto less that of {rival}", gain, bar, at_least=True))
    best = max(by_name[name]["spearman"] for name in SURROGATES)
    shown.append(
        verdict(
            f"{where}: best single surrogate less auto",
            best - auto["spearman"],
            WORSE_THAN_BEST,
            at_least=False,
        )
    )
    low, high = COVERAGE
    what = f"{where}: share of test points in auto's 90% intervals"
    shown.append(verdict(what, auto["coverage90"], low, at_least=True))
    shown.append(verdict(what, auto["coverage90"], high, at_least=False))
    return shown


def measured_case(case: Case, n: int, options: argparse.Namespace) -> Iterator[tuple[Rows, Rows]]:
    for target in case.targets:
        runs = [measure(case, subsample(case.train, n, seed), target) for seed in range(options.subsamples)]
        rows = [summary(case.name, n, target, name, [run[name] for run in runs]) for name in runs[0]]
        yield rows, verdicts_of(rows, margins=True)


def synthetic_case(surface: str, k: int, n: int, options: argparse.Namespace) -> tuple[Rows, Rows]:
    """Every subsample is a surface of its own."""
    runs = []
    for seed in range(options.subsamples):
        train, test = synthetic(surface, k, n, options.test_points, seed)
        runs.append(measure(Case(surface, train, test, ("score",)), train, "score"))
    name = f"{surface}, K = {k}"
    rows = [summary(name, n, "score", each, [run[each] for run in runs]) for each in runs[0]]
    return rows, verdicts_of(rows, margins=False, ranked=surface != "noise")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, help="directory of measured runs; without: synthetic surfaces only"
    )
    parser.add_argument("--subsamples", type=int, default=10, help="of each size and target")
    parser.add_argument("--points", type=int, nargs="+", default=[40, 128], help="runs to fit to")
    parser.add_argument(
        "--target", action="append", help="a metric or 'mean'; default: mean and Pile-CC or the first"
    )
    parser.add_argument("--domains", type=int, nargs="+", default=[3, 8, 17], help="of synthetic surfaces")
    parser.add_argument("--surface", choices=SURFACES, action="append", help="only these synthetic ones")
    parser.add_argument("--no-synthetic", action="store_true", help="only --data")
    parser.add_argument("--quick", action="store_true", help=f"shows only that it runs: {QUICK}")
    parser.add_argument("--out", type=Path, help="write all rows and their conditions to this JSON file")
    parser.set_defaults(test_points=TEST_POINTS)
    options = parser.parse_args(arguments)
    for name, value in QUICK.items() if options.quick else ():
        setattr(options, name, value)
    if options.subsamples < 2 or min(options.points) < 3 or min(options.domains) < 2:
        parser.error("--subsamples and --domains must be 2 or more, --points 3 or more")
    return options


def real_cases(options: argparse.Namespace) -> Iterator[Case]:
    if options.data is None:
        print("no --data: synthetic surfaces only")
        return
    train, test = read_data(options.data)
    known = target_scores(train)
    second = next((name for name in train.metrics if "pile_cc" in name), train.metrics[0])
    targets = tuple(options.target or dict.fromkeys(name for name in (MEAN, second) if name in known))
    if unknown := set(targets) - set(known):
        raise BenchmarkError(f"--target must be one of {', '.join(known)}, not {', '.join(unknown)}")
    if max(options.points) > len(train.shares):
        raise BenchmarkError(f"--points must be at most the {len(train.shares)} runs of {options.data}")
    yield Case(options.data.name, train, test, targets)


def measurements(options: argparse.Namespace) -> Iterator[tuple[Rows, Rows]]:
    for case in real_cases(options):
        for n in options.points:
            yield from measured_case(case, n, options)
    for surface in () if options.no_synthetic else options.surface or SURFACES:
        for k in options.domains:
            yield synthetic_case(surface, k, options.points[0], options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    taken_under = conditions(["mergemix", "numpy", "scipy", "lightgbm"]) | {
        "subsamples": options.subsamples, "points": options.points, "domains": options.domains,
        "data": options.data.name if options.data else None,
    }  # fmt: skip
    print(json.dumps(taken_under))
    rows: Rows = []
    verdicts: Rows = []
    try:
        for found, shown in measurements(options):
            print(format_table(found, COLUMNS_SHOWN), flush=True)
            rows += found
            verdicts += shown
    except (BenchmarkError, MergeMixError) as error:
        print(error, file=sys.stderr)
        return 1
    print(verdict_lines(verdicts))
    if options.out:
        write_results(options.out, rows + verdicts, taken_under)
    by_what = {f"{row['what']} {row['bar']}": [row["measured"], row["met"]] for row in verdicts}
    print(json.dumps({"bench": "surrogate", "subsamples": options.subsamples, "shown": by_what}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
