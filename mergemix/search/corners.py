"""The corners of a region."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search import kl
from mergemix.search.polytope import Polytope
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS

MAX_REPEATS = 16  # known corners in a row, before all are taken to be known
VISITS = 20_000  # partial corners of one length, before there are too many


def vertices(region: Region, limit: int) -> list[Mixture]:
    """The corners of the region, all of them if it has at most `limit` and only bounds on single domains.

    Otherwise up to `limit` of them, where random linear functions are largest; with a KL limit, where the way from
    the centre to the corner leaves it. Remembered: every maximisation over a region asks for them.
    """
    return list(_vertices(region, limit))


@lru_cache(maxsize=16)
def _vertices(region: Region, limit: int) -> tuple[Mixture, ...]:
    polytope = region.polytope
    points = corners(polytope, limit)
    if points is None:
        rng = np.random.default_rng(0)
        found: dict[tuple[float, ...], None] = {}
        repeats = 0
        while len(found) < limit and repeats < MAX_REPEATS:
            before = len(found)
            found[tuple(_highest(polytope, rng.standard_normal(polytope.k)))] = None
            repeats = repeats + 1 if len(found) == before else 0
        points = np.array(list(found))
    if region.kl_limit is not None:
        points = kl.draw_inside(np.array(region.prior), region.kl_limit, region.center, points)
    return tuple(dict.fromkeys(region.snap(point) for point in points))


def _highest(polytope: Polytope, slopes: np.ndarray) -> np.ndarray:
    """The corner (K,) where a linear function is largest."""
    if (polytope.rows.sum(axis=0) <= 1).all():
        return _highest_of_groups(polytope, slopes) / UNITS
    from scipy.optimize import linprog

    above = np.vstack([polytope.rows, -polytope.rows])
    rests = np.append(polytope.row_upper, -polytope.row_lower)
    bounds = np.column_stack([polytope.lower, polytope.upper])
    found = linprog(-slopes, above, rests, np.ones((1, polytope.k)), [UNITS], bounds, method="highs-ds")
    return polytope.center if found.x is None else found.x / UNITS


def _highest_of_groups(polytope: Polytope, slopes: np.ndarray) -> np.ndarray:
    """The same where no domain is in two sums, in whole units (K,).

    What a group must have goes to its best domains; then all that is free to the best domain that may still have some,
    then to the next. What a group adds is concave in its share, so that this is the best.
    """
    units = polytope.lower.copy()
    order = np.argsort(-slopes)
    groups = [np.flatnonzero(row) for row in polytope.rows]
    room = np.full(polytope.k, float(UNITS))  # of its group, for each domain
    for members, least, most in zip(groups, polytope.row_lower, polytope.row_upper, strict=True):
        rest = max(least - units[members].sum(), 0.0)
        room[members] = most - units[members].sum() - rest
        for k in order[np.isin(order, members)]:
            given = min(rest, polytope.upper[k] - units[k])
            units[k] += given
            rest -= given
    rest = UNITS - units.sum()
    for k in order:
        given = min(rest, polytope.upper[k] - units[k], room[k])
        units[k] += given
        rest -= given
        for members in groups:
            if k in members:
                room[members] -= given
    return units


def corners(polytope: Polytope, most: int) -> np.ndarray | None:
    """All corners (n, K) under bounds on single domains; None when there are more than `most`, or other bounds.

    At a corner all domains but one are at one of their bounds, and that one gets what is left.
    """
    if polytope.rows.size:
        return None
    found: dict[tuple[int, ...], None] = {}
    for free in range(polytope.k):
        order = [k for k in range(polytope.k) if k != free]
        lower, upper = polytope.lower[[*order, free]], polytope.upper[[*order, free]]
        least, largest = (
            np.cumsum(lower[::-1])[::-1],
            np.cumsum(upper[::-1])[::-1],
        )  # of this and all that follow
        partial: list[tuple[tuple[int, ...], float]] = [((), float(UNITS))]  # units so far, and what is left
        for k in range(polytope.k - 1):
            partial = [
                ((*units, int(end)), rest - end)
                for units, rest in partial
                for end in dict.fromkeys((lower[k], upper[k]))
                if least[k + 1] <= rest - end <= largest[k + 1]
            ]
            if len(partial) > VISITS:
                return None
        for units, rest in partial:
            found[(*units[:free], int(rest), *units[free:])] = None
        if len(found) > most:
            return None
    return np.array(list(found)) / UNITS
