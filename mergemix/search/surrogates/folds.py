"""Folds of cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Indices = np.ndarray


def folds(n: int, count: int, seed: int) -> Iterator[tuple[Indices, Indices]]:
    """(kept, held) of each fold: every one of n points is held once, in an order that depends on the seed."""
    order = np.random.default_rng((seed, n)).permutation(n)
    for number in range(min(count, n)):
        held = np.sort(order[number :: min(count, n)])
        yield np.setdiff1d(order, held), held


def out_of_fold(
    predict: Callable[[Indices, Indices], np.ndarray], n: int, count: int, seed: int
) -> np.ndarray:
    """(n,): each point predicted by a model of the other folds. predict(kept, held): means at `held`."""
    found = np.empty(n)
    for kept, held in folds(n, count, seed):
        found[held] = predict(kept, held)
    return found
