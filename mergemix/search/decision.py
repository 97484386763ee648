"""From measured mixtures to a decision: one model per capability, the best mixture it predicts, what constraints cost.

The utility of the predictions is maximised, as in the paper's fine search (section 2 of the method); what that
finds is a prediction until it is merged and measured. Its interval says how far a measurement may be from it. It draws
each capability from its model's prediction, independent of the others: where models err together, it is too narrow. The
best of many predictions is also a lucky one, which no interval here shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mergemix.evals.utility_spec import Objective as Floored
from mergemix.mixture import Mixture
from mergemix.search.base import Objective, Outcome
from mergemix.search.one_thread import one_thread
from mergemix.search.pieces import pieces_of
from mergemix.search.posterior import UTILITY, measured
from mergemix.search.region import Region

CONFIDENCE = 0.95
DRAWS = 2000
# With more measured mixtures than these the Gaussian process alone is fitted: it is then the best single surrogate on
# the RegMix data (Spearman 0.974, LightGBM 0.960, of 512 points), and a decision stays a matter of seconds.
FEW = 200
# Of more measured mixtures than these, only the best are starts of the maximisation: each costs a few predictions.
STARTS = 16
SCORED = 100  # mixtures whose predictions say what scores come up

# Of predictions a floor can be kept: on top of what the utility takes off, so much a unit of shortfall.
STIFF = 1000.0

Observations = Sequence[tuple[Mixture, Outcome]]


@dataclass(frozen=True)
class Forecast:
    """What is predicted of a mixture.

    utility, interval: of a measurement, CONFIDENCE. surface: standard deviation of the utility that many measurements
    would average to. capabilities: (predicted score, low, high) of a measurement, by name. penalty: what straying from
    the prior takes off the utility in the choice of a mixture; not in `utility`. shortfalls: by how much the predicted
    scores miss floors of the utility.
    """

    mixture: Mixture
    utility: float
    interval: tuple[float, float]
    surface: float
    capabilities: Mapping[str, tuple[float, float, float]]
    penalty: float = 0.0
    shortfalls: Mapping[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """For programs: {mixture utility interval capabilities shortfalls}, and penalty where there is one."""
        return {
            "mixture": self.mixture.as_dict(),
            "utility": _number(self.utility),
            "interval": [_number(limit) for limit in self.interval],
            "capabilities": {
                name: {"score": score, "interval": [_number(low), _number(high)]}
                for name, (score, low, high) in self.capabilities.items()
            },
            "shortfalls": dict(self.shortfalls),
            **({"penalty": self.penalty} if self.penalty else {}),
        }


@dataclass(frozen=True)
class Price:
    """What a constraint costs: by how much the best predicted utility grows without it, and the mixture that has it.

    key, text: of the constraint.
    """

    key: str
    text: str
    price: float
    utility: float
    mixture: Mixture

    def describe(self) -> dict[str, Any]:
        return {
            "constraint": self.text,
            "price": _number(self.price),
            "utility": _number(self.utility),
            "mixture": self.mixture.as_dict(),
        }


@dataclass(frozen=True)
class Decision:
    """The models of all capabilities and what follows from them.

    best: the best predicted mixture of the region. unconstrained: that of the whole simplex, without penalty; the
    same where nothing is constrained. prices: of the constraints that hold `best` back, highest first; each is priced
    alone, so they need not add up. points: how many measurements the models were fitted to. warnings: for people.
    """

    models: Models
    region: Region
    best: Forecast
    unconstrained: Forecast
    prices: tuple[Price, ...]
    points: int
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For programs: {predicted unconstrained prices surrogates points warnings}; unconstrained None if the same."""
        other = self.unconstrained.mixture != self.best.mixture
        return {
            "predicted": self.best.describe(),
            "unconstrained": self.unconstrained.describe() if other else None,
            "prices": [price.describe() for price in self.prices],
            "surrogates": self.models.kinds,
            "points": self.points,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Models:
    """One fitted surrogate per capability, and the utility of what they predict.

    fitted: in the order of the capabilities; [UTILITY] alone where the utility itself is modelled.
    """

    fitted: Mapping[str, Any]
    objective: Objective
    seed: int = 0

    @property
    def kinds(self) -> dict[str, str]:
        """What each capability is modelled by."""
        return {name: model.title for name, model in self.fitted.items()}

    def scores(self, shares: np.ndarray) -> dict[str, np.ndarray]:
        """Predicted scores by capability, (n,) each, of shares (n, K)."""
        return {name: model.mean(shares) for name, model in self.fitted.items()}

    def utility(self, shares: np.ndarray) -> np.ndarray:
        """The utility of the predicted scores, (n,)."""
        return self.objective(self.scores(shares))

    def worth(self, shares: np.ndarray, region: Region) -> np.ndarray:
        """What is maximised, (n,): the utility less the region's penalty; and what meets all floors comes first."""
        return self._valued(self.scores(shares)) - region.penalty(shares)

    def parts(self, shares: np.ndarray, region: Region) -> Callable[[np.ndarray], np.ndarray] | None:
        """Functions of shares, (n, K) -> (n, P), whose least is `worth`; None without, or if there is but one.

        shares: (m, K), some of the region, for what scores come up.
        """
        names = list(self.fitted)

        def stacked(shares: np.ndarray) -> np.ndarray:
            return np.stack([self.fitted[name].mean(shares) for name in names], axis=1)

        pieces = pieces_of(
            lambda scores: self._valued(dict(zip(names, scores.T, strict=True))), stacked(shares)
        )
        if pieces is None or len(pieces.offsets) < 2:
            return None
        return lambda shares: pieces(stacked(shares)) - region.penalty(shares)[:, None]

    def _valued(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        value = self.objective(scores)
        if isinstance(self.objective, Floored):
            value = value - STIFF * self.objective.shortfall(scores)
        return value

    @cached_property
    def _noise(self) -> np.ndarray:
        """Standard normal draws, (2, capabilities, DRAWS): for the surface, and for a measurement on top."""
        return np.random.default_rng(self.seed).standard_normal((2, len(self.fitted), DRAWS))

    def forecast(self, mixture: Mixture, region: Region | None = None) -> Forecast:
        """What is predicted of one mixture. region: for its penalty."""
        shares = np.array([mixture.weights])
        found = {name: model.predict(shares) for name, model in self.fitted.items()}
        surface, measured, capabilities = {}, {}, {}
        for (name, own), on_surface, on_top in zip(found.items(), *self._noise, strict=True):
            low, high = (float(limit[0]) for limit in own.interval(CONFIDENCE))
            capabilities[name] = (float(own.mean[0]), low, high)
            # Normal draws, widened so that a single capability has the quantiles of its Student's t.
            normal = 1.959964 * float(np.hypot(own.sd, own.noise_sd)[0])
            wider = (high - low) / 2 / normal if normal else 1.0
            surface[name] = own.mean[0] + own.sd[0] * on_surface
            measured[name] = own.mean[0] + wider * (own.sd[0] * on_surface + own.noise_sd[0] * on_top)
        tail = (1 - CONFIDENCE) / 2
        utility = float(self.utility(shares)[0])
        drawn = self.objective(measured)
        low, high = (float(limit) for limit in np.quantile(drawn, [tail, 1 - tail], method="nearest"))
        # Around a kink all draws may lie on one side of the plain prediction.
        interval = (min(low, utility), max(high, utility))
        drawn_surface = self.objective(surface)
        known = drawn_surface[np.isfinite(drawn_surface)]
        penalty = 0.0 if region is None else float(region.penalty(shares)[0])
        spread = float(known.std()) if len(known) else math.inf
        missed: dict[str, float] = {}
        if isinstance(self.objective, Floored):
            missed = self.objective.shortfalls({name: score for name, (score, _, _) in capabilities.items()})
        return Forecast(mixture, utility, interval, spread, capabilities, penalty, missed)


def fit_models(
    names: Sequence[str], observations: Observations, objective: Objective | None, *, seed: int = 0
) -> tuple[Models, int, list[str]]:
    """(models of every capability, number of points, warnings) from whole-model mixtures of `names`.

    Left out: failures, mixtures with layer groups, the base (which is no mixture of data), others than of `names`.
    objective: None models the utility itself. A mixture given twice counts twice. Raises ValueError without points.
    """
    from mergemix.search.surrogates import open_surrogate

    own = [(m, outcome) for m, outcome in observations if m.names == tuple(names) and min(m.weights) >= 0]
    data = measured(own, objective)
    if not len(data):
        raise ValueError("a decision needs a measured mixture of data")
    kind = "auto" if len(data) <= FEW else "gp"
    fitted = {
        name: open_surrogate(kind).fit(shares, scores, noise if noise.any() else None, seed=seed)
        for name, (shares, scores, noise) in ((name, data.of(name)) for name in data.scores)
    }
    warnings = [f"{name}: {warning}" for name, model in fitted.items() for warning in model.warnings]
    itself = not data.of_capabilities
    return (
        Models(fitted, _utility_itself if itself or objective is None else objective, seed),
        len(data),
        warnings,
    )


@one_thread()
def decide(
    names: Sequence[str],
    observations: Observations,
    objective: Objective | None,
    region: Region | None = None,
    seed: int = 0,
) -> Decision:
    """The decision that measured mixtures support; the same for the same observations in the same order.

    region: the mixtures that may be chosen, by default all; observations may lie outside of it. Stopped candidates
    take part with their estimates, which have larger errors. Raises ValueError without a usable observation.
    """
    region = region or Region.simplex(names)
    models, points, warnings = fit_models(names, observations, objective, seed=seed)
    starts = _starts(names, observations)
    best = optimum(models, region, seed, starts)
    whole = Region.simplex(names)
    free = best if not region.describe() else optimum(models, whole, seed, [*starts, best])
    return Decision(
        models,
        region,
        models.forecast(best, region),
        models.forecast(free, whole),
        _prices(models, region, best, seed, starts),
        points,
        tuple(warnings),
    )


def optimum(models: Models, region: Region, seed: int, starts: Sequence[Mixture] = ()) -> Mixture:
    """The mixture of the region with the highest utility of its predictions, less the penalty."""
    from mergemix.search.maximize import maximize, refine

    def value(shares: np.ndarray) -> np.ndarray:
        return models.worth(shares, region)

    inside = [mixture for mixture in starts if region.contains(mixture)]
    shares = np.array([mixture.weights for mixture in inside]).reshape(len(inside), len(region.names))
    rng = np.random.default_rng(seed)
    parts = models.parts(np.vstack([shares, region.sample(SCORED, rng)]), region)
    found = region.snap(maximize(value, region, rng, starts=shares, parts=parts))
    # On the grid, where a floor that was met exactly may not be met any more, and never worse than a start.
    candidates = list(dict.fromkeys([found, *inside]))
    values = value(np.array([mixture.weights for mixture in candidates]))
    return refine(candidates[int(np.argmax(values))], value, region)


def _starts(names: Sequence[str], observations: Observations) -> list[Mixture]:
    measured = [
        (outcome.utility, mixture)
        for mixture, outcome in observations
        if outcome.utility is not None and mixture.names == tuple(names) and not mixture.groups
    ]
    measured.sort(key=lambda pair: -pair[0])
    return [mixture for _, mixture in measured[:STARTS]]


def _prices(
    models: Models, region: Region, best: Mixture, seed: int, starts: Sequence[Mixture]
) -> tuple[Price, ...]:
    def value(mixture: Mixture) -> float:
        shares = np.array([mixture.weights])
        return float((models.utility(shares) - region.penalty(shares))[0])

    found = []
    for bound in region.active(best):
        without = optimum(models, region.without(bound), seed, [*starts, best])
        found.append(Price(bound.key, bound.text, value(without) - value(best), value(without), without))
    return tuple(sorted(found, key=lambda price: -price.price))


def _utility_itself(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    return scores[UTILITY]


def _number(value: float) -> float | None:
    """As JSON has it."""
    return value if math.isfinite(value) else None
