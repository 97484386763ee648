"""From benchmark scores to the one number a search maximises.

A benchmark's mean score s is normalised to (s - shift) / scale; a capability's score is the mean over
its benchmarks, the utility what `utility_spec` says of the capabilities. Most are linear in the benchmarks' means
(`Utility`), which racing needs; the others are a `CapabilityUtility`. Where lower scores are better, the scale is
negative: higher normalised scores are better, always. An item that failed has no score (NaN), which is not a zero:
means leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.files import nearest
from mergemix.evals.utility_spec import Objective, UtilitySpec, capability_objective, parse_utility

NORMALIZATIONS = ("raw", "base", "minmax", "zscore")
NEEDS_BASE = ("base", "minmax")

# By benchmark: the mean score, or the scores of all items, shape (items,).
Scores = Mapping[str, float | np.ndarray]


def mean_score(scores: float | np.ndarray, name: str | None = None) -> float:
    """Mean of item scores, NaN left out, summed exactly, so in any order; a mean already taken stays as it is.

    name: of the benchmark, for the error. Raises BenchmarkError when there is no score.
    """
    values = np.atleast_1d(scores)
    known = values[~np.isnan(values)].tolist()
    if not known:
        whose = "a benchmark" if name is None else f"benchmark {name!r}"
        raise BenchmarkError(
            f"{whose} must have a score for at least one item, but none of its {len(values)} has one: "
            "look at the errors of its items"
        )
    return math.fsum(known) / len(known)


@dataclass(frozen=True)
class Utility:
    """utility = offset + sum over benchmarks b of weights[b] * mean score of b; higher is better.

    Benchmarks that do not count have no weight; those where lower scores are better have a negative one.
    """

    weights: dict[str, float]
    offset: float

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks that count."""
        return tuple(self.weights)

    def __call__(self, scores: Scores) -> float:
        """The utility of a candidate.

        Raises KeyError when a benchmark that counts is missing, BenchmarkError when it has no score.
        """
        terms = (weight * mean_score(scores[name], name) for name, weight in self.weights.items())
        return math.fsum((self.offset, *terms))

    def shortfalls(self, scores: Scores) -> dict[str, float]:
        """None: a linear utility has no floors."""
        return {}


@dataclass(frozen=True)
class CapabilityUtility:
    """A utility that is no weighted sum, as one with a minimum or floors; higher is better.

    capabilities: the normalised score of each capability that counts, linear in the benchmarks' means. objective: of
    these scores. It cannot be raced: `search.racing` needs the weights of benchmarks, which there are none of.
    """

    capabilities: dict[str, Utility]
    objective: Objective

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks that count."""
        return tuple(dict.fromkeys(name for each in self.capabilities.values() for name in each.weights))

    def __call__(self, scores: Scores) -> float:
        """The utility of a candidate; -inf where the goal has no finite value. Raises as `Utility` does."""
        return float(
            self.of_means({name: np.array([mean_score(scores[name], name)]) for name in self.benchmarks})[0]
        )

    def of_means(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        """The utilities of n candidates, shape (n,), from their benchmarks' means, shape (n,) by name."""
        return self.objective(
            {
                name: each.offset
                + np.sum([w * means[benchmark] for benchmark, w in each.weights.items()], axis=0)
                for name, each in self.capabilities.items()
            }
        )

    def shortfalls(self, scores: Scores) -> dict[str, float]:
        """By how much a candidate misses each floor that it does not meet."""
        return self.objective.shortfalls({name: each(scores) for name, each in self.capabilities.items()})


AnyUtility = Utility | CapabilityUtility


def preference(utility: AnyUtility, scores: Scores) -> tuple[bool, float]:
    """Orders candidates, the best is the largest: those that meet all floors first, then by utility."""
    return not utility.shortfalls(scores), utility(scores)


def normalizers(
    normalize: str,
    benchmarks: Sequence[str],
    *,
    uniform: Scores | None = None,
    base: Scores | None = None,
    experts: Mapping[str, Scores] | None = None,
    directions: Mapping[str, int] | None = None,
) -> dict[str, tuple[float, float]]:
    """(shift, scale) of each benchmark, from the scores of the reference candidates that were evaluated.

        raw     0, 1
        base    base's score, 1
        minmax  base's score, best single expert's score on the benchmark - base's
        zscore  mean, population standard deviation over uniform, the experts, and the base if given

    directions: by benchmark 1 (higher is better, the default) or -1 (lower is better). For -1 the best expert is the
    lowest, and the scale is negative: -1 under raw and base. A scale that would not have the sign of the direction is
    the direction: under minmax where no expert beats the base (dividing would turn the benchmark
    round), under zscore where all references score the same.

    Raises ConfigError on an unknown normalisation or when the references it needs are missing.
    """
    if normalize not in NORMALIZATIONS:
        raise ConfigError(f"unknown normalisation {normalize!r}; {nearest(normalize, NORMALIZATIONS)}")
    sign_of = {name: float((directions or {}).get(name, 1)) for name in benchmarks}
    if normalize == "raw":
        return {name: (0.0, sign) for name, sign in sign_of.items()}
    if normalize in NEEDS_BASE and base is None:
        raise ConfigError(
            f"--normalize {normalize} needs the scores of the base; give --base, or use zscore or raw"
        )
    if normalize in ("minmax", "zscore") and not experts:
        raise ConfigError(
            f"--normalize {normalize} needs the scores of the single experts, but none was scored"
        )
    result = {}
    for name, sign in sign_of.items():
        floor = mean_score(base[name], name) if base is not None else None
        singles = [mean_score(scores[name], name) for scores in (experts or {}).values()]
        if normalize == "zscore":
            references = [
                *singles,
                *(mean_score(scores[name], name) for scores in (uniform, base) if scores is not None),
            ]
            shift, scale = float(np.mean(references)), float(np.std(references))
            # The deviation of equal numbers can come out as a rounding error instead of 0.
            result[name] = (shift, sign * scale if max(references) > min(references) else sign)
        else:
            assert floor is not None
            gain = max(sign * (score - floor) for score in singles) if normalize == "minmax" else 1.0
            result[name] = (floor, sign * gain if gain > 0 else sign)
    return result


def make_utility(
    capabilities: Mapping[str, Sequence[str]],
    spec: str | UtilitySpec = "macro",
    normalize: str = "raw",
    *,
    uniform: Scores | None = None,
    base: Scores | None = None,
    experts: Mapping[str, Scores] | None = None,
    directions: Mapping[str, int] | None = None,
) -> AnyUtility:
    """The utility that `--utility spec --normalize normalize` means: a Utility where it is linear.

    capabilities: names of the benchmarks of each capability (Suite.capabilities). The references and the
    directions are read as `normalizers` says; raw needs no references, floors that name one need its scores. Raises
    ConfigError as `parse_utility` and `normalizers` do, BenchmarkError when a reference has no score on a benchmark.
    """
    parsed = parse_utility(spec, list(capabilities)) if isinstance(spec, str) else spec
    counted = {name: capabilities[name] for name in parsed.counted}
    shift_scale = normalizers(
        normalize,
        [benchmark for benchmarks in counted.values() for benchmark in benchmarks],
        uniform=uniform,
        base=base,
        experts=experts,
        directions=directions,
    )
    if parsed.affine is not None:
        offset, shares = parsed.affine
        return _linear(counted, shares, shift_scale, offset)
    alone = {name: _linear(counted, {name: 1.0}, shift_scale) for name in counted}
    given = {"uniform": uniform, "base": base, **(experts or {})}
    references = {
        reference: {name: each(scores) for name, each in alone.items()}
        for reference, scores in given.items()
        if scores is not None and reference in parsed.references
    }
    return CapabilityUtility(alone, capability_objective(parsed, list(capabilities), references))


def _linear(
    capabilities: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    shift_scale: Mapping[str, tuple[float, float]],
    offset: float = 0.0,
) -> Utility:
    """offset + sum over capabilities of share * the mean of its benchmarks' normalised scores."""
    weights, shifts = {}, [offset]
    for capability, share in shares.items():
        for name in capabilities[capability]:
            shift, scale = shift_scale[name]
            weights[name] = share / len(capabilities[capability]) / scale
            shifts.append(-weights[name] * shift)
    return Utility(weights, math.fsum(shifts))
