"""What a candidate's scores measure: the value, and how much of it is the luck of its items."""

from __future__ import annotations

import math

import numpy as np

from mergemix.evals.stats import ItemScores
from mergemix.evals.utility import Utility

# Added to the number of differences, with a part of the items' own variance (Laplace's 1 / (n + 1)), so that a few
# equal ones are not taken for certainty.
PRIOR_ITEMS = 2.0


def reference_scores(candidates: list[ItemScores]) -> dict[str, np.ndarray]:
    """By benchmark the mean score of each item over `candidates`, shape (items,): how hard items are.

    NaN where none of them has a score. Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("a reference needs a candidate that has answered all items")
    found = {}
    for name in candidates[0]:
        scores = np.stack([np.asarray(items[name], dtype=np.float64) for items in candidates])
        known = np.isfinite(scores)
        sums = np.where(known, scores, 0.0).sum(axis=0)
        found[name] = np.where(known.any(axis=0), sums / np.maximum(known.sum(axis=0), 1), np.nan)
    return found


def item_variance(items: np.ndarray, reference: np.ndarray) -> float:
    """How much an item's difference to its reference varies, from those that have both; 0 without any."""
    differences = items - reference
    differences = differences[np.isfinite(differences)]
    num = len(differences)
    if not num:
        return 0.0
    spread = float(((differences - differences.mean()) ** 2).sum())
    spread += PRIOR_ITEMS * float(np.nanvar(reference)) / (num + 1)
    return spread / (num - 1 + PRIOR_ITEMS)


def estimate(utility: Utility, items: ItemScores, reference: ItemScores) -> tuple[float, float] | None:
    """(utility on all items, standard error of it as a measurement of the mixture) from the items that were answered.

    The difference estimator: the mean difference to the reference on the items asked, added to the reference's mean
    over all. Where all items have a score, that is the candidate's own mean. The standard error is that of the mean
    difference: what makes an item hard for every candidate is no noise of this one. It is an upper limit where
    differences follow the mixture smoothly, as log-likelihoods do. items: NaN where there is no score. None when a
    benchmark that counts has no score in common with the reference.
    """
    value, variance = utility.offset, 0.0
    for name, weight in utility.weights.items():
        differences = np.asarray(items[name]) - reference[name]
        differences = differences[np.isfinite(differences)]
        if not len(differences):
            return None
        known = reference[name][np.isfinite(reference[name])]
        mean = math.fsum(differences.tolist()) / len(differences)
        value += weight * (math.fsum(known.tolist()) / len(known) + mean)
        variance += weight**2 * item_variance(np.asarray(items[name]), reference[name]) / len(differences)
    return value, math.sqrt(variance)
