"""Verdicts on what models on the straight lines between experts answer.

Linear mode connectivity (Frankle et al., arXiv 1912.05671): between models in one basin there is no barrier. Merging
assumes that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemix.preflight.verdict import Check, graded

# A barrier counts when it is beyond this many standard errors (of 20 to 100 comparisons, none by chance)...
NOISE = 3.0
# ... and larger than this part of the straight line's height: Frankle et al. call 2% of error unstable. Sound tiny
# families have none (the path lies on the better side everywhere); with one expert of another base, or at 30 times the
# rate, 60% and more.
BARRIER_DOUBTFUL, BARRIER_DISTRUSTED = 0.02, 0.1
# What the uniform merge loses against the base, over what the experts gained on their own domains: tiny families with
# half general data -0.1 and 0.2 (3 times the rate), without general data 0.4 and 3; at 10 times the rate 8 and 33.
LOSS_DOUBTFUL, LOSS_DISTRUSTED = 0.5, 2.0

Ends = Mapping[str, Mapping[str, "Answers"]]  # mixture's name -> domain or benchmark -> answers


@dataclass(frozen=True)
class Answers:
    """What one model got. values: [items], higher is worse. weights: [items] of the mean: tokens, or ones.

    NaN: an item without a score, which nothing is a mean over.
    """

    values: np.ndarray
    weights: np.ndarray

    @property
    def known(self) -> Answers:
        """Of the items that have a score."""
        known = np.isfinite(self.values)
        return self if known.all() else Answers(self.values[known], self.weights[known])

    @property
    def mean(self) -> float:
        """NaN without any item."""
        known = self.known
        return float(np.average(known.values, weights=known.weights)) if len(known.values) else math.nan

    @property
    def noise(self) -> float:
        """Standard error of the mean over items; infinite of one item."""
        known = self.known
        count = len(known.values)
        if count < 2:
            return math.inf
        shares = known.weights / known.weights.sum()
        # Of a weighted mean: items that are drawn at random, each with its weight.
        squares = np.sum((shares * (known.values - known.mean)) ** 2)
        return float(np.sqrt(squares * count / (count - 1)))

    def minus(self, other: Answers, share: float = 1.0) -> Answers:
        """values - share * other's values, item by item."""
        return Answers(self.values - share * other.values, self.weights)


@dataclass(frozen=True)
class Barrier:
    """The worst point of a line between two mixtures on one domain or benchmark.

    at: the end's share there. height: how far the point lies on the worse side of the straight line between the two
    ends, negative on the better one. noise: its standard error, of paired differences. relative: height over the
    absolute value of the straight line there.
    """

    begin: str
    end: str
    name: str
    at: float
    height: float
    noise: float
    relative: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "from": self.begin,
            "to": self.end,
            "name": self.name,
            "at": self.at,
            "barrier": self.height,
            "noise": self.noise if math.isfinite(self.noise) else None,
            "relative": self.relative,
        }


def barriers_of(
    begin: str, end: str, ends: Ends, points: Sequence[tuple[float, Mapping[str, Answers]]]
) -> list[Barrier]:
    """Of each domain or benchmark the barrier between two ends. points: (the end's share, answers) between them."""
    found = []
    for name, first in ends[begin].items():
        last = ends[end][name]
        gaps = [
            (share, answers[name].minus(first, 1 - share).minus(last, share)) for share, answers in points
        ]
        gaps = [(share, gap) for share, gap in gaps if len(gap.known.values)]
        if not gaps:
            continue  # the three have no item in common
        share, gap = max(gaps, key=lambda pair: pair[1].mean)
        line = abs((1 - share) * first.mean + share * last.mean)
        # A line at zero: nobody scored anything at its ends, and what is worse than that is beyond all measure.
        relative = gap.mean / line if line else math.copysign(1.0, gap.mean) if gap.mean else 0.0
        found.append(Barrier(begin, end, name, share, gap.mean, gap.noise, relative))
    return found


def path_checks(
    ends: Ends, barriers: Sequence[Barrier], own: Mapping[str, str], *, unit: str, losses: bool
) -> list[Check]:
    """Is there a barrier; and where a base is there, did each expert learn its domain, and does the merge keep it?

    own: expert -> its own domain, for those that have one among the answers. unit: of the values. losses: whether they
    are losses, or scores with their sign changed.
    """
    checks = [_barrier_check(barriers, unit, "above" if losses else "below")] if barriers else []
    if "base" in ends and own:
        checks += [_learned_check(ends, own, unit), *_merge_check(ends, own)]
    return checks


def _barrier_check(barriers: Sequence[Barrier], unit: str, side: str) -> Check:
    """The largest barrier that is no noise."""
    real = [barrier for barrier in barriers if barrier.height > NOISE * barrier.noise]
    if not real:
        largest = max(barrier.relative for barrier in barriers)
        why = "no point between experts and their merges is worse than the straight line between the two"
        return Check("barrier", "fine", f"{why}, beyond the noise", largest, BARRIER_DOUBTFUL)
    top = max(real, key=lambda barrier: barrier.relative)
    verdict = graded(top.relative, BARRIER_DOUBTFUL, BARRIER_DISTRUSTED)
    why = (
        f"between {top.begin} and {top.end}, {top.name} lies {top.height:.3g} {unit} ({top.relative:.1%}) {side} the "
        f"straight line between the two, with a standard error of {top.noise:.2g}"
    )
    if verdict != "fine":
        why += ": they are not in one basin, and their average is no model between them"
    return Check("barrier", verdict, why, top.relative, BARRIER_DOUBTFUL)


def _learned_check(ends: Ends, own: Mapping[str, str], unit: str) -> Check:
    """Is each expert better than the base on its own domain?"""
    changes = {
        expert: ends[expert][domain].minus(ends["base"][domain]) for expert, domain in own.items()
    }  # above zero: worse
    worse = [name for name, change in changes.items() if change.mean > NOISE * change.noise]
    same = [name for name, change in changes.items() if name not in worse and not change.mean < -change.noise]
    value = max(change.mean for change in changes.values())
    if not worse and not same:
        return Check("learned", "fine", "every expert is better than the base on its own domain", value, 0.0)
    said = [
        f"{name} is {changes[name].mean:.3g} {unit} worse than the base on its own domain" for name in worse
    ]
    said += [f"{name} is no better than the base on its own domain" for name in same]
    why = (
        f"{'; '.join(said)}: the training diverged, its learning rate was too high or too low, or its data is "
        "something else"
    )
    return Check("learned", "do not trust" if worse else "doubtful", why, value, 0.0)


def _merge_check(ends: Ends, own: Mapping[str, str]) -> list[Check]:
    """Does the merge lose more than the experts gained? Nothing where they gained nothing: that is another check."""
    gained = sum(ends["base"][domain].mean - ends[expert][domain].mean for expert, domain in own.items())
    if gained <= 0 or "uniform" not in ends:
        return []
    lost = sum(ends["uniform"][domain].mean - ends["base"][domain].mean for domain in own.values())
    value = lost / gained
    verdict = graded(value, LOSS_DOUBTFUL, LOSS_DISTRUSTED)
    share = f"{abs(value):.0%} of what the experts gained on their own domains"
    why = (
        f"the uniform merge keeps {share}"
        if lost <= 0
        else f"the uniform merge loses, against the base, {share}"
    )
    if verdict != "fine":
        why += ": they went too far for an average (learning rate or horizon too large, or no data in common)"
    return [Check("merge", verdict, why, value, LOSS_DOUBTFUL)]


def own_domains(experts: Sequence[str], ends: Ends) -> dict[str, str]:
    """Experts that have answers of a domain of their own name."""
    asked = next(iter(ends.values()), {})
    return {name: name for name in experts if name in asked}
