"""The proof of the method on a user's own models: trained references against the study's merged proxies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergemix.config import RunConfig
from mergemix.errors import ConfigError
from mergemix.evidence import Observer, Silent
from mergemix.mixture import Mixture
from mergemix.stored import read_evidence
from mergemix.study import Study
from mergemix.trained import TrainedRun, read_runs
from mergemix.valuation import Valuation
from mergemix.verify.measure import (
    Scored,
    measure_checkpoints,
    measure_proxies,
    open_checkpoints,
    open_study,
    reopen,
    stored_proxies,
)
from mergemix.verify.ranking import OVERALL, Reference, rank, values
from mergemix.verify.verdict import verdict


def verify(
    directory: Path,
    trained: Path,
    *,
    engine: str | None = None,
    config: RunConfig | None = None,
    top: int | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """How far the proxies of the study in `directory` rank mixtures as the runs in `trained` do, as JSON values.

    A mixture that the study has no complete scores of is evaluated now, into the study; a trained checkpoint is scored
    on the study's benchmarks, into the study `directory`/trained. Both are resumable, and nothing is paid for twice.
    engine: must be the study's own (None). config: where experts and benchmarks are, if not where the study has them.
    top: size of the top sets, by default a quarter of the references. seed: of the intervals.

    Keys: study trained utility normalize; references, runs: mixtures that were compared, and their training runs;
    overall, capabilities{name}: as `rank_stats.rank_agreement`; intervals_over: what was resampled;
    calibration[{mixture seeds sources proxy trained}]: both {overall capabilities{name}}, the proxy's score and the
    list of those of its runs; evaluated{proxies checkpoints}: of this call; trust, verdict: in words; warnings.

    Raises as `stored.read_evidence`, `trained.read_runs` and `measure.reopen`, and EngineError. KeyboardInterrupt
    leaves what was scored so far.
    """
    observer = observer or Silent()
    evidence = read_evidence(directory)
    measured = [each.mixture for each in evidence.candidates]
    runs = read_runs(trained, evidence.names, evidence.suite, evidence.normalize, measured)
    mixtures = list(dict.fromkeys(run.mixture for run in runs))
    if len(mixtures) < 2:
        raise ConfigError(f"{trained}: ranks need references of two mixtures or more, but there is one")
    if top is not None and not 1 <= top < len(mixtures):
        raise ConfigError(f"--top must be from 1 to {len(mixtures) - 1}, below the references, but is {top}")
    with Study.read(directory) as study:
        proxies: dict[Mixture, Scored | str] = dict(stored_proxies(study, mixtures))
    missing = [mixture for mixture in mixtures if mixture not in proxies]
    scored_now = 0
    to_score = [run for run in runs if run.checkpoint is not None]
    scored: dict[int, Scored | str] = {run.line: Scored(run.scores) for run in runs if run.scores is not None}
    if missing or to_score:
        observer.stage("reading checkpoints and benchmarks")
        opened = reopen(evidence, config, engine)
        checkpoints = open_checkpoints(opened.config, to_score) if to_score else None
        with open_study(opened) as study:
            if missing:
                observer.stage("scoring proxies")
                proxies |= measure_proxies(study, opened, evidence, missing, observer)
            if checkpoints is not None:
                observer.stage("scoring trained checkpoints")
                found, scored_now = measure_checkpoints(opened, to_score, checkpoints, evidence, observer)
                scored |= found
    references, dropped = _references(runs, mixtures, proxies, scored, evidence.valuation)
    if len(references) < 2:
        raise ConfigError(f"ranks need references of two mixtures or more: {'; '.join(dropped)}")
    if top is not None:
        top = min(top, len(references) - 1)
    overall, capabilities, over_items = rank(references, evidence.valuation, top=top, seed=seed)
    trust, sentence = verdict(overall, capabilities)
    return {
        "study": str(directory),
        "trained": str(trained),
        "utility": evidence.utility,
        "normalize": evidence.normalize,
        "references": len(references),
        "runs": sum(len(each.runs) for each in references),
        "overall": overall,
        "capabilities": capabilities,
        "intervals_over": ["references", *(["items"] if over_items else [])],
        "calibration": [_point(each, evidence.valuation) for each in references],
        "evaluated": {"proxies": len(missing), "checkpoints": scored_now},
        "trust": trust,
        "verdict": sentence,
        "warnings": [*dropped, *_warnings(references, overall, over_items)],
    }


def _references(
    runs: Sequence[TrainedRun],
    mixtures: Sequence[Mixture],
    proxies: Mapping[Mixture, Scored | str],
    scored: Mapping[int, Scored | str],
    valuation: Valuation,
) -> tuple[list[Reference], list[str]]:
    """References with scores on both sides, and why others are left out."""
    kept, dropped = [], []
    for mixture in mixtures:
        proxy = proxies[mixture]
        if reason := _unusable(proxy, valuation):
            dropped.append(f"the proxy of {mixture} is left out: {reason}")
            continue
        own = sorted((run for run in runs if run.mixture == mixture), key=lambda run: run.seed)
        failed = {run.line: reason for run in own if (reason := _unusable(scored[run.line], valuation))}
        dropped += [
            f"the training run of line {line} is left out: {reason}" for line, reason in failed.items()
        ]
        if usable := [run for run in own if run.line not in failed]:
            assert isinstance(proxy, Scored), "it is usable"
            found = [each for run in usable if isinstance(each := scored[run.line], Scored)]
            sources = tuple(run.scored_by or "checkpoint" for run in usable)
            kept.append(Reference(mixture, proxy, tuple(found), tuple(run.seed for run in usable), sources))
    return kept, dropped


def _unusable(scored: Scored | str, valuation: Valuation) -> str | None:
    """Why scores cannot be ranked; None where they can."""
    if isinstance(scored, str):
        return scored
    found = values(valuation, scored)
    bad = [(name or "utility", value) for name, value in found.items() if not math.isfinite(value)]
    return f"its {bad[0][0]} is {bad[0][1]}, which has no rank" if bad else None


def _point(reference: Reference, valuation: Valuation) -> dict[str, Any]:
    """One mixture of a calibration plot."""
    runs = [values(valuation, each) for each in reference.runs]
    proxy = values(valuation, reference.proxy)
    return {
        "mixture": reference.mixture.as_dict(),
        "seeds": list(reference.seeds),
        "sources": list(reference.sources),
        "proxy": _named(proxy),
        "trained": _named({name: [each[name] for each in runs] for name in proxy}),
    }


def _named(found: Mapping[str | None, Any]) -> dict[str, Any]:
    capabilities = {name: each for name, each in found.items() if name is not None}
    return {"overall": found[OVERALL], "capabilities": capabilities}


def _warnings(references: Sequence[Reference], overall: Mapping[str, Any], over_items: bool) -> list[str]:
    """What makes the agreement look better or worse than it is."""
    warnings = []
    pure = [each.mixture for each in references if max(each.mixture.weights) == 1]
    if pure:
        warnings.append(
            f"{len(pure)} of {len(references)} references have a single domain, whose proxy is a trained expert and no "
            "merge: leave them out to see how well merges rank"
        )
    if not over_items:
        warnings.append(
            "the intervals leave out that the items are a sample, because scores without items were given"
        )
    if overall["ceiling"] is None:
        warnings.append(
            "how well training agrees with itself is not known: train five mixtures or more with a second seed"
        )
    sources = Counter(source for each in references for source in each.sources)
    if len(sources) > 1:
        told = ", ".join(f"{count} by {name}" for name, count in sorted(sources.items()))
        warnings.append(f"the runs were not all scored in the same way ({told}), which can move their ranks")
    return warnings
