"""Whether two studies agree on mixtures: does the best one move with training, or with scale?

Each study gives a Gaussian process per capability, and surfaces drawn from it are what that study could not tell apart.
All intervals are over such draws, and each comparison between the studies stands beside the same comparison
within the first one, two draws of one surface: a difference that is not larger than that is uncertainty, not a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError
from mergemix.evals.stats import engine_noise
from mergemix.mixture import Mixture
from mergemix.rank_stats import spearman
from mergemix.search.one_thread import one_thread
from mergemix.search.posterior import measured
from mergemix.search.region import Region
from mergemix.stored import StoredEvidence, read_evidence

CONFIDENCE = 0.95
DRAWS = 200
POINTS = 400  # of the simplex, beside the measured mixtures
MIN_COMMON = 5  # measured mixtures, for a rank correlation of their own
RESAMPLES = 2000


@dataclass(frozen=True)
class Surface:
    """What a study knows of the points: draws (DRAWS, points) of the utility, and of each capability by name."""

    utility: np.ndarray
    capabilities: Mapping[str, np.ndarray]

    def best(self) -> np.ndarray:
        """The point that each draw has highest, (DRAWS,)."""
        return self.utility.argmax(axis=1)


@one_thread()
def compare(first: Path, second: Path, *, utility: str | None = None, seed: int = 0) -> dict[str, Any]:
    """How far the surfaces of two studies agree on the mixtures of the domains that both have, as JSON values.

    utility: by default the first study's own; both are valued by it, each normalised by its own baselines.

    Keys: studies utility normalize domains dropped; rank_correlation{measured predicted}, both {spearman interval},
    measured on the mixtures that both have (None for fewer than MIN_COMMON), predicted over the whole simplex, with
    its `ceiling`, what two draws of the first study have; capabilities{name: predicted}; optimum{first second};
    distance{estimate interval ceiling}: half the L1 distance of the best mixtures, the share of tokens that moves;
    regret{first_on_second second_on_first}: what the other study's best mixture costs; noise_floor[first, second];
    moved: whether the first's best mixture is clearly worse on the second than the second's own; verdict; warnings.

    Raises StudyError and ConfigError for studies that cannot be read, or have too little in common.
    """
    a = read_evidence(first, utility=utility)
    b = read_evidence(second, utility=a.utility, normalize=a.normalize)
    names = tuple(name for name in a.names if name in b.names)
    if len(names) < 2:
        raise ConfigError(
            f"two studies must have two domains in common, but {first} has {', '.join(a.names)} and {second} has "
            f"{', '.join(b.names)}"
        )
    scores = [_utilities(each, names) for each in (a, b)]
    for each, known in zip((a, b), scores, strict=True):
        if len(known) < 2:
            raise ConfigError(
                f"a comparison needs two measured mixtures of {', '.join(names)}, but {each.directory} has {len(known)}"
            )
    rng = np.random.default_rng(seed)
    points = _points(names, scores, rng)
    surfaces = [_surface(each, names, points, rng) for each in (a, b)]
    best = [points[surface.utility.mean(axis=0).argmax()] for surface in surfaces]
    regrets = [_regret(surface, other) for surface, other in zip(surfaces, surfaces[::-1], strict=True)]
    noise = [_noise(each) for each in (a, b)]
    moved = bool(np.quantile(regrets[1], (1 - CONFIDENCE) / 2) > noise[1])
    return {
        "studies": [str(first), str(second)],
        "utility": a.utility,
        "normalize": a.normalize,
        "domains": list(names),
        "dropped": sorted({*a.names, *b.names} - set(names)),
        "rank_correlation": {
            "measured": _measured_correlation(scores[0], scores[1], rng),
            "predicted": _correlation(surfaces[0].utility, surfaces[1].utility),
        },
        "capabilities": {
            name: _correlation(drawn, surfaces[1].capabilities[name])
            for name, drawn in surfaces[0].capabilities.items()
            if name in surfaces[1].capabilities
        },
        "optimum": {
            which: dict(zip(names, shares.tolist(), strict=True))
            for which, shares in zip(("first", "second"), best, strict=True)
        },
        "distance": _distance(points, surfaces),
        "regret": {
            "first_on_second": _summary(regrets[1]),
            "second_on_first": _summary(regrets[0]),
        },
        "noise_floor": noise,
        "moved": moved,
        "verdict": _verdict(moved, regrets[1], noise[1]),
        "warnings": _warnings(a, b),
    }


def _warnings(a: StoredEvidence, b: StoredEvidence) -> list[str]:
    """What makes surfaces differ besides the experts."""
    asked = [
        {
            key.removeprefix("benchmark "): value
            for key, value in each.identity.items()
            if key.startswith("benchmark ")
        }
        for each in (a, b)
    ]
    other = sorted(name for name in {**asked[0], **asked[1]} if asked[0].get(name) != asked[1].get(name))
    if not other:
        return []
    return [f"the studies were not asked the same: {', '.join(other)} differ, and so may their surfaces"]


def _utilities(evidence: StoredEvidence, names: Sequence[str]) -> dict[tuple[float, ...], float]:
    """Utility by shares of `names`, of mixtures that have no other domain and answered everything."""
    return {
        _shares(each.mixture, names): each.outcome.utility
        for each in evidence.candidates
        if each.record.done and each.outcome.utility is not None and _only(each.mixture, names)
    }


def _shares(mixture: Mixture, names: Sequence[str]) -> tuple[float, ...]:
    weights = mixture.as_dict()
    return tuple(weights[name] for name in names)


def _only(mixture: Mixture, names: Sequence[str]) -> bool:
    return all(not weight or name in names for name, weight in mixture.as_dict().items())


def _points(
    names: Sequence[str], scores: Sequence[Mapping[tuple[float, ...], float]], rng: np.random.Generator
) -> np.ndarray:
    """Where surfaces are compared: the whole simplex, its corners, and everything that was measured."""
    known = np.array(list(dict.fromkeys(shares for each in scores for shares in each)))
    return np.concatenate([known, np.eye(len(names)), Region.simplex(names).sample(POINTS, rng)])


def _surface(
    evidence: StoredEvidence, names: Sequence[str], points: np.ndarray, rng: np.random.Generator
) -> Surface:
    from mergemix.search.surrogates.gp import GaussianProcess

    usable = [
        (Mixture(tuple(names), _shares(mixture, names)), outcome)
        for mixture, outcome in evidence.outcomes()
        if _only(mixture, names)
    ]
    objective: Callable[[Mapping[str, np.ndarray]], np.ndarray] = evidence.valuation.objective
    data = measured(usable, objective)
    drawn = {}
    for name in data.scores:
        model = GaussianProcess().fit(*data.of(name))
        drawn[name] = model.sample(points, DRAWS, rng)
    if not data.of_capabilities:
        return Surface(next(iter(drawn.values())), {})
    flat = objective({name: values.ravel() for name, values in drawn.items()})
    return Surface(flat.reshape(DRAWS, len(points)), drawn)


def _summary(values: np.ndarray) -> dict[str, Any]:
    tail = (1 - CONFIDENCE) / 2
    low, middle, high = np.quantile(values, [tail, 0.5, 1 - tail]).tolist()
    return {"estimate": middle, "interval": [low, high]}


def _correlation(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Of two surfaces, draw by draw; ceiling: of two draws of the first."""
    between = np.nan_to_num(spearman(a, b))  # of a flat surface: 0
    within = np.nan_to_num(spearman(a[::2], a[1::2]))
    found = _summary(between)
    return {"spearman": found["estimate"], "interval": found["interval"], "ceiling": float(np.median(within))}


def _measured_correlation(
    a: Mapping[tuple[float, ...], float], b: Mapping[tuple[float, ...], float], rng: np.random.Generator
) -> dict[str, Any] | None:
    """Of what both have measured, with a bootstrap interval over the mixtures; None for too few."""
    common = [shares for shares in a if shares in b]
    if len(common) < MIN_COMMON:
        return None
    x, y = (np.array([each[shares] for shares in common]) for each in (a, b))
    chosen = rng.integers(len(common), size=(RESAMPLES, len(common)))
    drawn = np.nan_to_num(spearman(x[chosen], y[chosen]))
    return {
        "spearman": float(np.nan_to_num(spearman(x, y))),
        "interval": _summary(drawn)["interval"],
        "mixtures": len(common),
    }  # fmt: skip


def _distance(points: np.ndarray, surfaces: Sequence[Surface]) -> dict[str, Any]:
    """Half the L1 distance of the best mixtures of two draws."""
    first, second = (points[surface.best()] for surface in surfaces)
    within = np.abs(first[::2] - first[1::2]).sum(axis=1) / 2
    return {**_summary(np.abs(first - second).sum(axis=1) / 2), "ceiling": float(np.median(within))}


def _regret(surface: Surface, other: Surface) -> np.ndarray:
    """How far the mixture that `other` has highest is below the one that `surface` has, in its draws: (DRAWS,)."""
    own, chosen = (int(each.utility.mean(axis=0).argmax()) for each in (surface, other))
    return np.asarray(surface.utility[:, own] - surface.utility[:, chosen])


def _noise(evidence: StoredEvidence) -> float:
    found = engine_noise(evidence.valuation.utility, evidence.repeats())
    return 0.0 if found is None else found.floor()


def _verdict(moved: bool, regret: np.ndarray, noise: float) -> str:
    low, high = _summary(regret)["interval"]
    if moved:
        return (
            f"the best mixture moves: the first study's costs {low:.3g} to {high:.3g} of utility on the second, whose "
            f"noise floor is {noise:.3g}"
        )
    return (
        f"no move can be told: the first study's best mixture costs {low:.3g} to {high:.3g} of utility on the second, "
        f"whose noise floor is {noise:.3g}"
    )
