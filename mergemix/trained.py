"""References: models that were really trained on mixtures, as `mergemix verify --trained FILE` lists them.

JSON Lines, one training run a line:

    {"mixture": {"math": 0.5, "code": 0.5}, "checkpoint": "runs/half", "seed": 1}
    {"mixture": {"math": 0.5, "code": 0.5}, "scores": {"math": 0.61, "code": 0.44}, "seed": 2}

checkpoint: a directory, relative to the file, or a Hub id. scores: of every capability, or of every benchmark, in the
benchmark's own metric. Several seeds of a mixture are several lines; a line without a seed has seed 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.strict_json import parse_object, read_bounded, shown
from mergemix.errors import CheckpointError, ConfigError
from mergemix.evals.files import nearest
from mergemix.mixture import Mixture

KEYS = ("mixture", "checkpoint", "scores", "seed")
# Shares that were rounded to three decimals sum to 1 within this for up to 20 domains.
SUM_TOLERANCE = 0.01
# Training honours shares to 0.1% of tokens at best: mixtures that differ by less are one.
SAME_SHARE = 1e-3


@dataclass(frozen=True)
class TrainedRun:
    """One line. scores: by benchmark, None where a checkpoint is to be scored.

    scored_by: what the scores were given by, "capability" or "benchmark".
    """

    line: int
    mixture: Mixture
    seed: int
    checkpoint: str | None = None
    scores: Mapping[str, float] | None = None
    scored_by: str | None = None


def read_runs(
    path: Path,
    domains: Sequence[str],
    suite: Mapping[str, Mapping[str, Any]],
    normalize: str,
    measured: Sequence[Mixture],
) -> list[TrainedRun]:
    """The training runs of a file, in its order.

    domains: of the study. suite: by benchmark {capability higher_is_better ...}. normalize: of the study. measured:
    mixtures that the study has; one that differs by less than SAME_SHARE from one of them, or from an earlier line, is
    taken to be that one.
    Raises ConfigError, naming the line, for what is no such file: unknown keys, domains, capabilities; shares that do
    not sum to 1; scores that are missing or no numbers; a mixture with the same seed, or a checkpoint, twice.
    """
    try:
        raw = read_bounded(path, "the trained references ").removeprefix(b"\xef\xbb\xbf")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    known, runs = list(measured), []
    for number, text in enumerate(raw.split(b"\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        content = _parsed(text.strip(), where)
        mixture = _same_as(known, _mixture(content.get("mixture"), domains, where))
        known.append(mixture)
        scores, scored_by = None, None
        if "scores" in content:
            scores, scored_by = _scores(content["scores"], suite, normalize, where)
        checkpoint = _checkpoint(content, path, where)
        runs.append(TrainedRun(number, mixture, _seed(content, where), checkpoint, scores, scored_by))
        _check_new(runs, where)
    if not runs:
        shares = ", ".join(f'"{name}": {1 / len(domains):.3g}' for name in domains)
        raise ConfigError(
            f"{path} holds no trained references: write one a line, such as "
            f'{{"mixture": {{{shares}}}, "checkpoint": "runs/1", "seed": 1}}'
        )
    return runs


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        content = parse_object(text, where)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {shown(key)}; {nearest(key, KEYS)}")
    if ("checkpoint" in content) == ("scores" in content):
        raise ConfigError(
            f"{where}: a reference must have either 'checkpoint', to be scored, or 'scores' that were measured, but "
            f"has {'both' if 'scores' in content else 'neither'}"
        )
    return content


def _mixture(given: Any, domains: Sequence[str], where: str) -> Mixture:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: 'mixture' must map domains to shares, but is {shown(given)}")
    for name, share in given.items():
        if name not in domains:
            raise ConfigError(f"{where}: {shown(name)} is no domain of the study; {nearest(name, domains)}")
        if not _is_number(share) or share < 0:
            raise ConfigError(
                f"{where}: the share of {name!r} must be a number from 0 to 1, but is {shown(share)}"
            )
    total = math.fsum(given.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise ConfigError(f"{where}: the shares of a mixture must sum to 1, but sum to {total:.6g}")
    return Mixture.of(domains, given)


def _same_as(known: Sequence[Mixture], mixture: Mixture) -> Mixture:
    """The nearest mixture that is known, where it is so near as to be the same; else the mixture itself."""

    def apart(other: Mixture) -> float:
        return max(abs(a - b) for a, b in zip(mixture.weights, other.weights, strict=True))

    near = min(known, key=apart, default=mixture)
    return near if apart(near) < SAME_SHARE else mixture


def _scores(
    given: Any, suite: Mapping[str, Mapping[str, Any]], normalize: str, where: str
) -> tuple[dict[str, float], str]:
    """By benchmark, and what they were given by."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: 'scores' must map capabilities to numbers, but is {shown(given)}")
    for name, score in given.items():
        if not _is_number(score):
            raise ConfigError(f"{where}: the score of {shown(name)} must be a number, but is {shown(score)}")
    members: dict[str, list[str]] = {}
    for benchmark, about in suite.items():
        members.setdefault(about["capability"], []).append(benchmark)
    # Names of both kinds may be the same: the kind is the one that fits better, benchmarks first.
    kinds: dict[str, set[str]] = {"benchmark": set(suite), "capability": set(members)}
    kind = max(kinds, key=lambda each: (set(given) == kinds[each], len(set(given) & kinds[each])))
    if unknown := sorted(set(given) - kinds[kind]):
        other = next((each for each in kinds if unknown[0] in kinds[each]), None)
        hint = f"it is a {other}" if other else nearest(unknown[0], kinds[kind])
        raise ConfigError(
            f"{where}: scores must all be of capabilities or all of benchmarks, and {shown(unknown[0])} is no {kind} "
            f"of the study; {hint}"
        )
    if missing := sorted(kinds[kind] - set(given)):
        raise ConfigError(
            f"{where}: a reference must have a score of every {kind}, but {missing[0]!r} has none"
        )
    if kind == "benchmark":
        return {name: float(score) for name, score in given.items()}, kind
    for name, benchmarks in members.items():
        directions = {suite[benchmark]["higher_is_better"] for benchmark in benchmarks}
        if len(benchmarks) > 1 and (normalize != "raw" or len(directions) > 1):
            why = (
                f"is the mean of scores normalised by {normalize}"
                if normalize != "raw"
                else "mixes directions"
            )
            raise ConfigError(
                f"{where}: {name!r} {why}, which one number cannot stand for: give a score of each benchmark "
                f"({', '.join(sorted(suite))})"
            )
    return {name: float(given[about["capability"]]) for name, about in suite.items()}, kind


def _checkpoint(content: Mapping[str, Any], path: Path, where: str) -> str | None:
    if "checkpoint" not in content:
        return None
    source = content["checkpoint"]
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{where}: 'checkpoint' must be a directory or a Hub id, but is {shown(source)}")
    local = path.parent / source
    return str(local) if local.exists() else source


def _seed(content: Mapping[str, Any], where: str) -> int:
    seed = content.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"{where}: 'seed' must be a whole number, but is {shown(seed)}")
    return seed


def _check_new(runs: Sequence[TrainedRun], where: str) -> None:
    """Raise ConfigError where the last run is one of the others."""
    *others, last = runs
    for other in others:
        if other.mixture == last.mixture and other.seed == last.seed:
            raise ConfigError(
                f"{where}: a mixture and seed must be there once, but line {other.line} is {last.mixture} with seed "
                f"{last.seed} too: take one out, or give each run the seed it was trained with"
            )
        if last.checkpoint is not None and other.checkpoint == last.checkpoint:
            raise ConfigError(
                f"{where}: each training run is a checkpoint of its own, but line {other.line} gives "
                f"{last.checkpoint} too"
            )


def _is_number(value: Any) -> bool:
    # Any whole number larger than that is no score, and some are too large to be a float at all.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
