"""Deciding again from what a study has measured: other utility, constraints or domains; no engine, no checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError
from mergemix.evals import stats
from mergemix.evals.files import nearest
from mergemix.evals.utility import AnyUtility, preference
from mergemix.search.constraints import Constraints
from mergemix.search.decision import Decision, decide
from mergemix.search.one_thread import one_thread
from mergemix.search.pareto import observed_front, predicted_front
from mergemix.search.region import Region
from mergemix.stored import Candidate, StoredEvidence, read_evidence
from mergemix.valuation import Valuation

# Normal quantile of a two-sided 90% interval: a measured mixture leaves the Pareto set when it is beaten so clearly.
MARGIN = 1.645


@one_thread()
def solve(
    directory: Path,
    *,
    utility: str | None = None,
    normalize: str | None = None,
    constraints: Constraints | None = None,
    drop: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """The decision that the evidence of the study in `directory` supports, as JSON values.

    utility, normalize, constraints: the study's own where None. drop: domains that are to have no share. All
    measured mixtures teach the models, also stopped ones and those that are not allowed now; those with layer
    groups do not. What is chosen satisfies the constraints. The baselines that normalisation and floors read are always
    those of the whole study.

    Keys: study utility normalize domains dropped constraints candidates noise_floor surrogates points warnings;
    observed{mixture utility interval capabilities shortfalls}: the best measured mixture that is allowed, None without
    one; indistinguishable[mixture...]: others that cannot be told from it; predicted{the same}: the best one of the
    models, with the interval of a measurement; unconstrained: of the whole simplex, None if the same;
    prices[{constraint price utility mixture}]; pareto{observed predicted}[{mixture capabilities}].

    Raises StudyError when there is no such study or it does not say what its benchmarks are; ConfigError for a utility,
    constraints or domains that do not fit it.
    """
    evidence = read_evidence(directory, utility=utility, normalize=normalize)
    names, valuation, candidates = evidence.names, evidence.valuation, evidence.candidates
    own = evidence.identity.get("constraints", {})
    replaced = []
    if constraints is not None and own:
        told = (
            "; ".join(f"{bound['constraint']}={bound['limit']:g}" for bound in own.get("bounds", ()))
            or "a prior"
        )
        replaced = [f"constraints that are given take the place of all of the study's own ({told})"]
    constraints = constraints or constraints_of(own)
    region = _without(constraints, names, drop).region(names)
    decision = decide(names, evidence.outcomes(), valuation.objective, region, seed)
    allowed = [
        each
        for each in candidates
        if each.record.done and each.outcome.utility is not None and region.contains(each.mixture)
    ]
    noise = _noise(evidence)
    return {
        "study": str(directory),
        "utility": evidence.utility,
        "normalize": evidence.normalize,
        "domains": list(names),
        "dropped": list(drop),
        "constraints": [bound.text for bound in region.bounds],
        "candidates": len(candidates),
        "noise_floor": noise,
        **_observed(valuation.utility, valuation, region, allowed, noise or 0.0),
        **decision.describe(),
        "pareto": _pareto(decision, allowed, seed),
        "warnings": [*replaced, *_warnings(decision, allowed), *decision.warnings],
    }


def constraints_of(described: Mapping[str, Any]) -> Constraints:
    """The constraints that `Region.describe` has written into a study; caps that followed from tokens are maxima."""
    shares: dict[str, dict[str, float]] = {"min": {}, "max": {}, "pin": {}}
    groups, kl_limit = {}, None
    for bound in described.get("bounds", ()):
        kind, _, name = bound["constraint"].partition(" ")
        if kind == "kl":
            kl_limit = bound["limit"]
            continue
        kind = "max" if kind == "epochs" else kind
        limit = bound["limit"]
        shares[kind][name] = min(limit, shares["max"].get(name, 1.0)) if kind == "max" else limit
        if bound["domains"] != [name]:
            groups[name] = tuple(bound["domains"])
    return Constraints(
        min=shares["min"],
        max=shares["max"],
        pin=shares["pin"],
        groups=groups,
        prior=described.get("prior"),
        kl_limit=kl_limit,
        kl_penalty=described.get("kl_penalty", 0.0),
    )


def _without(constraints: Constraints, names: Sequence[str], drop: Sequence[str]) -> Constraints:
    """The constraints, and no share of the domains that are dropped."""
    for name in drop:
        if name not in names:
            raise ConfigError(
                f"--drop names {name!r}, which is no domain of the study; {nearest(name, names)}"
            )
        if constraints.pin.get(name):
            raise ConfigError(f"{name!r} is dropped and pinned to {constraints.pin[name]:g}: leave one out")
    if not set(names) - set(drop):
        raise ConfigError(f"a mixture needs a domain, but all are dropped: {', '.join(names)}")
    return replace(constraints, pin={**constraints.pin, **dict.fromkeys(drop, 0.0)})


def _noise(evidence: StoredEvidence) -> float | None:
    """What two evaluations of one mixture differ by at most, with 95%; None where none was evaluated twice."""
    noise = stats.engine_noise(evidence.valuation.utility, evidence.repeats())
    return None if noise is None else noise.floor()


def _observed(
    utility: AnyUtility, valuation: Valuation, region: Region, allowed: Sequence[Candidate], floor: float
) -> dict[str, Any]:
    """The best measured mixture that is allowed, and those that cannot be told from it."""
    if not allowed:
        return {"observed": None, "indistinguishable": []}

    def penalty(each: Candidate) -> float:
        return float(region.penalty(np.array([each.mixture.weights]))[0])

    def worth(each: Candidate) -> tuple[bool, float]:
        met, value = preference(utility, each.record.scores)
        return met, value - penalty(each)

    best = max(allowed, key=worth)
    others = {each.mixture: each for each in allowed if each is not best}
    ties = stats.indistinguishable(
        utility,
        best.items,
        {mixture: each.items for mixture, each in others.items()},
        floor,
        costs={mixture: penalty(each) - penalty(best) for mixture, each in others.items()},
    )
    value = {each.mixture: utility(each.record.scores) for each in allowed}
    limits = stats.interval(utility, best.items)
    return {
        "observed": {
            "mixture": best.mixture.as_dict(),
            "utility": value[best.mixture],
            "interval": [limit if math.isfinite(limit) else None for limit in limits],
            "capabilities": {n: each(best.record.scores) for n, each in valuation.capabilities.items()},
            "shortfalls": utility.shortfalls(best.record.scores),
            "penalty": penalty(best),
        },
        "indistinguishable": [m.as_dict() for m in sorted(ties, key=lambda mixture: -value[mixture])],
    }


def _pareto(decision: Decision, allowed: Sequence[Candidate], seed: int) -> dict[str, Any]:
    """Mixtures that no other beats in all capabilities: measured ones, less clearly beaten ones, and predicted ones."""
    models, region = decision.models, decision.region
    scored = [each for each in allowed if set(each.outcome.capabilities) == set(models.fitted)]
    observed: list[dict[str, Any]] = []
    if scored:
        scores, margin = (
            {
                name: np.array([factor * each.outcome.capabilities[name][part] for each in scored])
                for name in models.fitted
            }
            for part, factor in ((0, 1.0), (1, MARGIN))
        )
        observed = [
            {
                "mixture": scored[index].mixture.as_dict(),
                "capabilities": {name: float(values[index]) for name, values in scores.items()},
            }
            for index in observed_front([each.mixture for each in scored], scores, margin)
        ]
    starts = np.array([decision.best.mixture.weights])
    mixtures, found = predicted_front(models.scores, region, np.random.default_rng(seed), starts=starts)
    predicted = [
        {"mixture": mixture.as_dict(), "capabilities": {name: float(s[row]) for name, s in found.items()}}
        for row, mixture in enumerate(mixtures)
    ]
    return {"observed": observed, "predicted": predicted}


def _warnings(decision: Decision, allowed: Sequence[Candidate]) -> list[str]:
    if not allowed:
        return ["no measured mixture satisfies the constraints: the answer is a prediction alone"]
    return []
