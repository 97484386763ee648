"""The answer of a study, derived from its stored evidence alone."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mergemix.errors import StudyError
from mergemix.evals import stats
from mergemix.evidence import Evidence
from mergemix.mixture import Mixture
from mergemix.search import Search
from mergemix.search.decision import decide
from mergemix.study import VERIFICATION, CandidateRecord


def baseline_mixtures(names: tuple[str, ...], *, has_base: bool) -> dict[str, Mixture]:
    """What every found mixture is compared with: uniform, the base if there is one, every single expert."""
    base = {"base": Mixture.base_only(names)} if has_base else {}
    return {
        "uniform": Mixture.uniform(names),
        **base,
        **{name: Mixture.one_hot(names, name) for name in names},
    }


def best_candidate(evidence: Evidence, *, plain: bool = False) -> CandidateRecord:
    """The best observed mixture that is allowed: highest utility, the earliest on a tie; the base is no mixture.

    Those that meet all floors of the utility come before those that do not; what divergence from the prior costs is
    taken off. What was only measured to be verified is no answer: it is held out. plain: among those without layer
    groups.
    Raises StudyError when no candidate succeeded.
    """
    utility = evidence.valuation.utility
    records = [
        r
        for r in evidence.mixtures()
        if r.done and r.origin != VERIFICATION and not (plain and r.mixture.groups)
    ]
    scored = [
        ((not utility.shortfalls(r.scores), value - evidence.penalty_of(r.mixture)), r)
        for r in records
        if (value := evidence.utility_of(r)) is not None
    ]
    if not scored:
        reasons = {record.reason for record in evidence.study.candidates() if record.reason}
        raise StudyError(f"no candidate could be evaluated: {'; '.join(sorted(reasons))}")
    return max(scored, key=lambda pair: pair[0])[1]


def summarize(
    evidence: Evidence,
    baselines: Mapping[str, Mixture],
    search: Search,
    *,
    engine: str,
    seed: int,
    stopped: Mapping[str, str],
) -> dict[str, Any]:
    """The summary that `mergemix run --json` prints (design: command line), from a study that is complete.

    noise_floor: what two evaluations of one mixture differ by at most, with 95%, as the best one's and uniform's
    second evaluations show. indistinguishable: mixtures whose paired interval against the best contains zero, or that
    are within the noise floor, best first; the best itself is not among them. Intervals are over items only:
    the best of many candidates is also lucky, which held-out items show and these intervals do not.
    uninformative: benchmarks that cannot tell the candidates apart, and why. decision: what models of the capabilities
    say of mixtures that were not measured, `search.decision.Decision`. verified: of mixtures that a model proposed,
    what it predicted and what was measured.
    """
    utility = evidence.valuation.utility
    first = [record for record in evidence.study.candidates() if record.repeat == 0]
    best = best_candidate(evidence)
    best_items = evidence.item_scores(best)
    noise = _engine_noise(evidence)
    noise_floor = None if noise is None else noise.floor()
    rivals = {record.mixture: record for record in evidence.mixtures() if record.done and record != best}
    rival_items = {mixture: evidence.item_scores(record) for mixture, record in rivals.items()}
    penalty = evidence.penalty_of(best.mixture)
    costs = {mixture: evidence.penalty_of(mixture) - penalty for mixture in rivals}
    ties = stats.indistinguishable(utility, best_items, rival_items, noise_floor or 0.0, costs=costs)
    ties.sort(key=lambda mixture: -utility(rivals[mixture].scores))
    found = {name: evidence.study.find(mixture) for name, mixture in baselines.items()}
    return {
        "study": str(evidence.study.directory),
        "engine": engine,
        "candidates": len(first),
        "failed": sum(record.status == "failed" for record in first),
        "failures": [{**r.mixture.describe(), "reason": r.reason} for r in first if r.status == "failed"],
        "stopped_early": sum(record.status == "stopped" for record in first),
        "stopped": dict(stopped),
        "best": {
            **best.mixture.describe(),
            "utility": utility(best.scores),
            "interval": _limits(*stats.interval(utility, best_items)),
            "capabilities": {n: each(best.scores) for n, each in evidence.valuation.capabilities.items()},
            "shortfalls": utility.shortfalls(best.scores),
            "penalty": penalty,
        },
        "baselines": {
            name: evidence.utility_of(record) if record else None for name, record in found.items()
        },
        "noise_floor": noise_floor,
        "indistinguishable": [
            mixture.describe() if mixture.groups else mixture.as_dict() for mixture in ties
        ],
        "uninformative": stats.uninformative([best_items, *rival_items.values()]),
        "decision": decide(
            search.names,
            list({**dict(search.evidence()), **dict(evidence.outcomes(first))}.items()),
            evidence.valuation.objective,
            search.region,
            seed,
        ).describe(),
        "verified": _verified(evidence, search),
        **_without_groups(evidence),
        **_costs(evidence),
    }


def _verified(evidence: Evidence, search: Search) -> list[dict[str, Any]]:
    """Of each mixture that a model of the search proposed: its prediction, and the utility that was measured."""
    rows = []
    for mixture, (mean, deviation) in search.predictions.items():
        record = evidence.study.find(mixture)
        if record is not None and record.status != "failed":
            observed = evidence.score_of(record)
            row = {
                "predicted": mean,
                "deviation": deviation,
                "observed": observed,
                "partial": not record.done,
            }
            rows.append({**mixture.describe(), **row})
    return rows


def _engine_noise(evidence: Evidence) -> stats.EngineNoise | None:
    """From every mixture that was evaluated more than once; None without any."""
    pairs = []
    for again in evidence.study.candidates():
        once = evidence.study.find(again.mixture)
        if again.repeat and once is not None and once.done and again.done:
            pairs.append((evidence.item_scores(once), evidence.item_scores(again)))
    return stats.engine_noise(evidence.valuation.utility, pairs)


def _limits(low: float, high: float) -> list[float | None]:
    """An interval as JSON has it: a limit that is not known, as of a benchmark of one item, is None."""
    return [limit if math.isfinite(limit) else None for limit in (low, high)]


def compare(evidence: Evidence, named: Mapping[str, CandidateRecord]) -> dict[str, Any]:
    """Utilities of named candidates on one suite, and how far "best" is ahead of each, with paired intervals."""
    utility = evidence.valuation.utility
    items = {name: evidence.item_scores(record) for name, record in named.items() if record.done}
    ahead = {
        name: stats.paired_difference(utility, items["best"], items[name])
        for name in items
        if name != "best" and "best" in items
    }
    return {
        "utility": {name: evidence.utility_of(record) for name, record in named.items()},
        "gain": {
            name: {"estimate": _limits(d.estimate, 0.0)[0], "interval": _limits(d.low, d.high)}
            for name, d in ahead.items()
        },
        "items": evidence.suite.num_items,
    }


def lead(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """How far the best mixture is ahead of uniform on the items it was chosen by and on held-out ones, and the gap.

    What the search gained by luck shows on its own items only. None where one of them failed.
    """
    held_out = summary["holdout"]["utility"]
    pairs = {
        "search": (summary["best"]["utility"], summary["baselines"]["uniform"]),
        "holdout": (held_out["best"], held_out["uniform"]),
    }
    leads = {
        name: None if best is None or uniform is None else best - uniform
        for name, (best, uniform) in pairs.items()
    }
    search, holdout = leads["search"], leads["holdout"]
    return {**leads, "gap": None if search is None or holdout is None else search - holdout}


def _without_groups(evidence: Evidence) -> dict[str, Any]:
    """Of a search with layer groups the best plain mixture too: layer-wise weights are a model, not shares of data."""
    if not any(record.mixture.groups for record in evidence.mixtures()):
        return {}
    plain = best_candidate(evidence, plain=True)
    return {
        "best_without_groups": {
            "mixture": plain.mixture.as_dict(),
            "utility": evidence.utility_of(plain),
        }
    }


def _moved(done: Sequence[CandidateRecord]) -> dict[str, Any]:
    """Totals over all swaps: bytes read by place (device, host, disk) and written, destinations written and skipped."""
    swaps = [record.swap for record in done if record.swap]
    read: Counter[str] = Counter()
    for swap in swaps:
        read.update(swap["bytes_read"])
    totals = {key: sum(swap[key] for swap in swaps) for key in ("bytes_written", "destinations", "skipped")}
    return {"bytes_read": dict(read), **totals}


def _costs(evidence: Evidence) -> dict[str, Any]:
    """Swaps, items and median seconds a candidate, of everything the study paid for, repeats included.

    unproven: candidates whose engine's swaps were not proven; fresh_starts: those of them that no swap gave.
    """
    done = [record for record in evidence.study.candidates() if record.status != "failed"]
    unproven = [record for record in done if not record.proven]

    def median(stage: str) -> float:
        return statistics.median(record.timings[stage] for record in done)

    return {
        "swaps": {
            "count": len(done),
            "proven": not unproven,
            "unproven": len(unproven),
            "fresh_starts": sum(not record.swap.get("destinations") for record in unproven),
            "median_s": median("swap_s"),
            **_moved(done),
        },
        "item_evaluations": evidence.study.item_evaluations(),
        "item_troubles": evidence.study.item_troubles(),
        "generation_median_s": median("generate_s"),
        "overhead_median_s": median("overhead_s"),
    }
