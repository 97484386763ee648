"""`mergemix fit`: surrogates of measured mixtures, how well they predict, and which mixture they predict to be best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError
from mergemix.measured import Measured, read_measured
from mergemix.search.maximize import maximize
from mergemix.search.one_thread import one_thread
from mergemix.search.region import Region
from mergemix.search.surrogates import SURROGATES, Average, Stack, Surrogate, num_folds, open_surrogate

MEAN = "mean"
CONFIDENCE = 0.9  # of all intervals
AUTO = "auto"
SMALLEST = 1e-100  # difference of scores that models can work with


@one_thread()
def fit(
    mixtures: Path,
    scores: Path,
    test_mixtures: Path | None = None,
    test_scores: Path | None = None,
    *,
    surrogate: str = AUTO,
    minimize: bool = False,
    seed: int = 0,
    region_of: Callable[[Sequence[str]], Region] = Region.simplex,
) -> dict[str, Any]:
    """Fit a surrogate to every metric, and with more than one to their mean. For programs: the keys of `fit`.

    mixtures, scores: as `measured` reads them. minimize: lower scores are better. region_of: from the names of the
    domains, where the optimum may be (`Constraints.region`); a KL penalty is taken off in units of the score. Raises
    ConfigError for data or options that make no sense.
    """
    model = open_surrogate(surrogate)
    if (test_mixtures is None) != (test_scores is None):
        raise ConfigError(
            "a test set needs both --test-mixtures and --test-scores, but only one of them is given"
        )
    train = read_measured(mixtures, scores)
    region = region_of(train.domains)  # before anything that takes time
    test = None
    if test_mixtures is not None and test_scores is not None:
        test = read_measured(test_mixtures, test_scores, like=train)
    fitted = fit_targets(train, model, seed)
    best = MEAN if MEAN in fitted else next(iter(fitted))
    warnings = [*train.warnings, *(test.warnings if test else ())]
    for name, each in fitted.items():
        warnings += [f"{name}: {warning}" for warning in each.warnings]
    return {
        "surrogate": surrogate,
        "points": len(train.shares),
        "test_points": None if test is None else len(test.shares),
        "domains": list(train.domains),
        "folds": num_folds(len(np.unique(train.shares, axis=0))),
        "confidence": CONFIDENCE,
        "seed": seed,
        "minimize": minimize,
        "targets": {name: _target(name, each, train, test, seed) for name, each in fitted.items()},
        "optimum": _optimum(fitted, best, train, region, minimize, seed),
        "notes": [*train.notes, *(test.notes if test else ())],
        "warnings": warnings,
    }


def target_scores(measured: Measured) -> dict[str, np.ndarray]:
    """(n,) by target: every metric, and with more than one their mean, unless a metric is called so."""
    targets = {name: measured.scores[:, i] for i, name in enumerate(measured.metrics)}
    if len(targets) > 1 and MEAN not in targets:
        targets[MEAN] = measured.scores.mean(axis=1)
    return targets


def fit_targets(measured: Measured, model: Surrogate, seed: int) -> dict[str, Surrogate]:
    """A fitted surrogate by target.

    The mean of the metrics is fitted as a score of its own; `auto` has the mean of the metrics' predictions as a
    further member. Raises ConfigError for scores beyond what floating point can square.
    """
    targets = target_scores(measured)
    for name, scores in targets.items():
        spread = float(np.ptp(scores))
        if spread and not SMALLEST < spread < 1 / SMALLEST:
            raise ConfigError(
                f"scores must differ by more than {SMALLEST:g} and less than {1 / SMALLEST:g}, but those of {name!r} "
                f"differ by {spread:g}: give them in another unit"
            )
    fitted = {name: model.fit(measured.shares, scores, seed=seed) for name, scores in targets.items()}
    mean = fitted.get(MEAN)
    if isinstance(mean, Stack) and mean.members and MEAN not in measured.metrics:
        columns = Average.of([fitted[name] for name in measured.metrics], measured.shares, targets[MEAN])
        members = {**mean.members, columns.name: columns}
        fitted[MEAN] = Stack.of(members, measured.shares, targets[MEAN], seed=seed)
    return fitted


def _target(
    name: str, fitted: Surrogate, train: Measured, test: Measured | None, seed: int
) -> dict[str, Any]:
    scores = target_scores(train)[name]
    found: dict[str, Any] = {
        "surrogate": fitted.name,
        "cv": {"spearman": spearman(fitted.held_out.mean, scores)},
    }
    if test is not None:
        truth = target_scores(test)[name]
        predicted = fitted.predict(test.shares)
        low, high = predicted.interval(CONFIDENCE)
        found["test"] = {
            "spearman": spearman(predicted.mean, truth),
            "coverage90": float(np.mean((low <= truth) & (truth <= high))),
        }
    members = fitted.members if isinstance(fitted, Stack) else {fitted.name: fitted}
    others = {
        other: model().fit(train.shares, scores, seed=seed)
        for other, model in SURROGATES.items()
        if other not in members
    }
    found["candidates"] = {
        other: spearman(member.held_out.mean, scores) for other, member in {**members, **others}.items()
    }
    if isinstance(fitted, Stack) and fitted.weights:
        found["weights"] = fitted.weights
    return found


def _optimum(
    fitted: Mapping[str, Surrogate], target: str, train: Measured, region: Region, minimize: bool, seed: int
) -> dict[str, Any]:
    """The mixture with the best prediction of `target`, and what every target is predicted to be there."""
    sign = -1.0 if minimize else 1.0
    scores = sign * target_scores(train)[target]
    rng = np.random.default_rng(seed)
    shares = maximize(
        lambda points: sign * fitted[target].mean(points) - region.penalty(points),
        region,
        rng,
        starts=train.shares[np.argsort(-scores)[:5]],
    )
    mixture = region.snap(shares)
    at = np.array([mixture.weights])
    best = int(np.argmax(scores))
    return {
        "target": target,
        "mixture": mixture.as_dict(),
        "predictions": {name: _prediction(each, at) for name, each in fitted.items()},
        "best_measured": {
            "mixture": dict(zip(train.domains, train.shares[best].tolist(), strict=True)),
            "score": float(sign * scores[best]),
        },
    }


def _prediction(fitted: Surrogate, at: np.ndarray) -> dict[str, Any]:
    predicted = fitted.predict(at)
    low, high = predicted.surface_interval(CONFIDENCE)
    return {"mean": float(predicted.mean[0]), "interval": [float(low[0]), float(high[0])]}


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation, ties at their mean rank; None where one of them is constant or there are fewer than 3."""
    from scipy.stats import rankdata

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
