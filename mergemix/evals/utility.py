"""From benchmark scores to the one number a search maximises.

A benchmark's mean score s is normalised to (s - shift) / scale; a capability's score is the mean over
its benchmarks, the utility a weighted mean over capabilities. So the utility is linear in the
benchmarks' means, which is what `stats` relies on. Where lower scores are better, the scale is negative: the utility
is better when higher, always. An item that failed has no score (NaN), which is not a zero: means leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.files import nearest

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

    def __call__(self, scores: Scores) -> float:
        """The utility of a candidate.

        Raises KeyError when a benchmark that counts is missing, BenchmarkError when it has no score.
        """
        terms = (weight * mean_score(scores[name], name) for name, weight in self.weights.items())
        return math.fsum((self.offset, *terms))


def parse_utility(spec: str, capabilities: Sequence[str]) -> dict[str, float]:
    """Weights over capabilities, summing to 1, those of weight 0 left out.

    spec: "macro" (all the same), the name of one capability, or "NAME=W,NAME=W" with W >= 0.
    Raises ConfigError on an unknown capability, a name given twice, or weights without a positive sum.
    """
    if spec == "macro":
        return {name: 1 / len(capabilities) for name in capabilities}
    weights: dict[str, float] = {}
    for part in spec.split(",") if "=" in spec else [f"{spec}=1"]:
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in capabilities:
            known = ", ".join(sorted(capabilities))
            hint = nearest(name, capabilities)
            raise ConfigError(
                f"utility names the unknown capability {name!r}; {hint} (capabilities: {known})"
            )
        if name in weights:
            raise ConfigError(f"utility {spec!r} names {name!r} twice")
        weights[name] = _weight(name, text)
    total = math.fsum(weights.values())
    if not 0 < total < math.inf:
        raise ConfigError(f"the weights of a utility must have a positive sum, but {spec!r} sums to {total}")
    return {name: weight / total for name, weight in weights.items() if weight}


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"the weight of capability {name!r} must be a finite number >= 0, but is {text!r}")
    return weight


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
    spec: str = "macro",
    normalize: str = "raw",
    *,
    uniform: Scores | None = None,
    base: Scores | None = None,
    experts: Mapping[str, Scores] | None = None,
    directions: Mapping[str, int] | None = None,
) -> Utility:
    """The utility that `--utility spec --normalize normalize` means.

    capabilities: names of the benchmarks of each capability (Suite.capabilities). The references and the
    directions are read as `normalizers` says; raw needs no references. Raises ConfigError as `parse_utility`
    and `normalizers` do, BenchmarkError when a reference has no score on a benchmark.
    """
    shares = parse_utility(spec, list(capabilities))
    shift_scale = normalizers(
        normalize,
        [name for capability in shares for name in capabilities[capability]],
        uniform=uniform,
        base=base,
        experts=experts,
        directions=directions,
    )
    weights, shifts = {}, []
    for capability, share in shares.items():
        for name in capabilities[capability]:
            shift, scale = shift_scale[name]
            weights[name] = share / len(capabilities[capability]) / scale
            shifts.append(-weights[name] * shift)
    return Utility(weights, math.fsum(shifts))
