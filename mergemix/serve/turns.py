"""Who is looked at next, where there is time for a few only: in the end everybody, and at all times evenly spread.

Multiples of the golden ratio modulo 1: any n in a row leave no gap of more than 2 / n, and no interval is left out
for ever.
"""

from __future__ import annotations

import math

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2
SILVER = math.sqrt(2) - 1  # independent of the former


def in_turn(sizes: int | np.ndarray, begin: int, number: int, ratio: float = GOLDEN) -> np.ndarray:
    """int64 (number,): the turns `begin` to `begin + number - 1`, each as a position below its size."""
    turns = np.arange(begin, begin + number)
    return (turns * ratio % 1 * sizes).astype(np.int64)
