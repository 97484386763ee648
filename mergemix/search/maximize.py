"""The best mixture of a region under a cheap objective, such as the utility of a surrogate's predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search import kl
from mergemix.search.corners import vertices
from mergemix.search.hit_and_run import reach
from mergemix.search.one_thread import one_thread
from mergemix.search.region import Region
from mergemix.search.simplex import UNITS
from mergemix.search.slsqp import maximize_least, minimize_inside

Objective = Callable[[np.ndarray], np.ndarray]  # shares (n, K) -> utility (n,), higher is better

SAMPLES = 600
VERTICES = 150
HILLS = 4  # promising points, apart from each other, that a gradient method refines
CLIMBERS = 2  # the best of them, that exchanges refine further
SAME = 1e-3  # share that two points differ by at most which are taken for one
LONGEST, SHORTEST = 0.25, 0.25 / UNITS  # steps of the exchanges, in shares
ROUNDS = 30
HALVINGS = 14  # of the way from outside a KL limit to the inside
EXCHANGED, REFINING = (1, 2, 3, 5), 20  # units, and how often at most: the end, on the grid
WANDERING = 24  # random directions per climber and round: for ridges that no exchange of two domains follows
DIFFERENCE = 1e-5  # shares, for gradients
FLATTEST = 1e-5  # of the steepest part's slope: flatter ones are constant
POLISHING, PRECISION = 40, 1e-10  # of the gradient method: steps, and gain where slopes are 1


@one_thread()
def maximize(
    objective: Objective,
    region: Region,
    rng: np.random.Generator,
    *,
    starts: np.ndarray | None = None,
    parts: Objective | None = None,
) -> np.ndarray:
    """The shares (K,) in the region with the highest objective that was found, to about a quarter of a unit.

    Of a uniform sample, the corners, the start points and `starts` (s, K) the best few that are apart climb: by a
    gradient method (SLSQP), then by exchanges between two domains and along random directions in shrinking steps,
    which need no smoothness, all in one call of the objective. What the objective gives as NaN counts as -inf. Same
    rng state, same result. parts: shares (n, K) -> (n, P), smooth functions whose least is the objective, if there are
    such: the gradient method then follows its kinks instead of ending at the first.
    """
    points = _candidates(region, rng, starts)
    hills, values = _best_apart(points, _evaluate(objective, points), HILLS)
    polished = np.array([_polish(objective, region, start, parts) for start in hills])
    reached = _evaluate(objective, polished)
    better = reached > values
    hills, values = np.where(better[:, None], polished, hills), np.where(better, reached, values)
    first = _different(hills, np.argsort(-values, kind="stable"))[:CLIMBERS]
    climbers, values = _climb(objective, region, rng, hills[first], values[first])
    return climbers[int(values.argmax())]


def refine(mixture: Mixture, objective: Objective, region: Region) -> Mixture:
    """The grid mixture of the region that exchanges of few units between two domains lead to, each the best there is.

    What is no grid mixture (uniform, of thirds or the like) stays.
    """
    units = np.rint(np.array(mixture.weights) * UNITS).astype(int)
    if units.sum() != UNITS:
        return mixture
    k = len(units)
    exchanges = (np.eye(k, dtype=int)[:, None] - np.eye(k, dtype=int)[None])[~np.eye(k, dtype=bool)]
    steps = np.concatenate([size * exchanges for size in EXCHANGED])
    reached = float(_evaluate(objective, units[None] / UNITS)[0])
    for _ in range(REFINING):
        near = units + steps
        near = near[(near >= 0).all(axis=1)]
        near = near[region.holds(near / UNITS)]
        if not len(near):
            break
        values = _evaluate(objective, near / UNITS)
        best = int(np.argmax(values))
        if not values[best] > reached:
            break
        units, reached = near[best], float(values[best])
        mixture = Mixture(mixture.names, tuple(int(n) / UNITS for n in units))
    return mixture


def _candidates(region: Region, rng: np.random.Generator, starts: np.ndarray | None) -> np.ndarray:
    """Points of the region (n, K): many inside, and the corners and edges, which a sample never meets."""
    corners, first = _landmarks(region)
    pairs = rng.integers(len(corners), size=(2, VERTICES))
    way = rng.random((VERTICES, 1))
    edges = way * corners[pairs[0]] + (1 - way) * corners[pairs[1]]
    given = np.empty((0, len(region.names)))
    if starts is not None and len(starts):
        given = np.array([region.project(shares) for shares in np.asarray(starts, dtype=np.float64)])
    return np.vstack([given, first, corners, edges, region.sample(SAMPLES, rng)])


@lru_cache(maxsize=16)
def _landmarks(region: Region) -> tuple[np.ndarray, np.ndarray]:
    """(corners, start points), remembered: a search maximises over the same region again and again."""
    # With sums of shares each corner is a linear program.
    corners = vertices(region, VERTICES // 3 if region.polytope.rows.size else VERTICES)
    starts = region.start_points()
    return np.array([m.weights for m in corners]), np.array([m.weights for m in starts])


def _evaluate(objective: Objective, points: np.ndarray) -> np.ndarray:
    values = np.asarray(objective(points), dtype=np.float64)
    return np.where(np.isnan(values), -np.inf, values)


def _best_apart(points: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Good points (`count` at most) that are not all on one hill, and their values."""
    chosen: list[int] = []
    spread = np.abs(points - points.mean(axis=0)).sum(axis=1).mean() / 2
    for index in np.argsort(-values, kind="stable"):
        distances = [np.abs(points[index] - points[other]).sum() / 2 for other in chosen]
        if min(distances, default=np.inf) >= 0.3 * spread:
            chosen.append(int(index))
        if len(chosen) == count:
            break
    return points[chosen], values[chosen]


def _different(points: np.ndarray, order: np.ndarray) -> list[int]:
    """The indices of `order` of points (n, K) that are no copies of one before: gradients lead to the same place."""
    chosen: list[int] = []
    for index in order:
        if all(np.abs(points[index] - points[other]).sum() / 2 >= SAME for other in chosen):
            chosen.append(int(index))
    return chosen


def _climb(
    objective: Objective, region: Region, rng: np.random.Generator, points: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each of points (c, K) moved uphill until steps of SHORTEST no longer help; and their values (c,)."""
    points, values = points.copy(), values.copy()
    steps = np.full(len(points), LONGEST)
    last = np.zeros_like(points)  # each climber's last move, tried again: ridges are followed
    for _ in range(ROUNDS):
        moving = np.flatnonzero(steps >= SHORTEST)
        if not len(moving):
            break
        trials = _trials(region, rng, points[moving], steps[moving], last[moving])
        count, width, k = trials.shape
        found = _evaluate(objective, trials.reshape(-1, k)).reshape(count, width)
        best = found.argmax(axis=1)
        better = found[np.arange(count), best] > values[moving]
        up, stay = moving[better], moving[~better]
        target = trials[np.flatnonzero(better), best[better]]
        last[up] = target - points[up]
        points[up], values[up] = target, found[np.flatnonzero(better), best[better]]
        steps[stay] /= 3
        last[stay] = 0.0
    return points, values


def _trials(
    region: Region, rng: np.random.Generator, points: np.ndarray, steps: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Where to look around points (c, K): (c, n, K), all inside the region.

    Exchanges of a step, and in the beginning all the way to the boundary, random directions, and the last move again.
    """
    count, k = points.shape
    eye = np.eye(k)
    keep = region.polytope.hull @ region.polytope.hull.T  # onto the directions that keep what must be kept
    exchanges = (eye[:, None] - eye[None])[~np.eye(k, dtype=bool)]  # (k (k - 1), K), length irrelevant
    random = rng.standard_normal((count, WANDERING, k)) @ keep
    random /= np.maximum(np.abs(random).sum(axis=2, keepdims=True) / 2, 1e-300)
    fixed = np.broadcast_to(exchanges @ keep, (count, *exchanges.shape))
    ways = np.concatenate([fixed, random], axis=1)
    length = np.broadcast_to(steps[:, None], ways.shape[:2])
    ways = np.concatenate([ways, last[:, None], last[:, None]], axis=1)
    length = np.concatenate([length, np.ones((count, 1)), np.full((count, 1), 3.0)], axis=1)
    if (steps == LONGEST).any():
        ways = np.concatenate([ways, fixed], axis=1)
        length = np.concatenate([length, np.full(fixed.shape[:2], np.inf)], axis=1)
    flat = ways.reshape(-1, k)
    origins = np.repeat(points, ways.shape[1], axis=0)
    forth = reach(region.polytope, origins, flat)[1]
    moved = origins + np.minimum(length.reshape(-1), forth)[:, None] * flat
    return _inside(region, moved).reshape(ways.shape)


def _inside(region: Region, points: np.ndarray) -> np.ndarray:
    """Points (n, K) that satisfy the linear constraints but for rounding, drawn into the region."""
    points = np.clip(points, region.polytope.lower / UNITS, region.polytope.upper / UNITS)
    limit = region.kl_limit
    return (
        points
        if limit is None
        else kl.draw_inside(np.array(region.prior), limit, region.center, points, halvings=HALVINGS)
    )


def _polish(objective: Objective, region: Region, start: np.ndarray, parts: Objective | None) -> np.ndarray:
    """The end of a gradient ascent (SLSQP) from `start`, drawn into the region; gradients by differences."""
    wanted = objective if parts is None else parts
    nudges = DIFFERENCE * np.vstack([np.eye(len(start)), -np.eye(len(start))])
    changes = np.atleast_1d(np.ptp(_finite(wanted(np.maximum(start + nudges, 0.0))), axis=0)) / (
        2 * DIFFERENCE
    )
    # SLSQP wants slopes of about 1.
    scale = float(changes[changes >= FLATTEST * changes.max()].min()) or 1.0

    def value(point: np.ndarray) -> np.ndarray:
        return _finite(wanted(point[None]))[0] / scale

    def slope(point: np.ndarray) -> np.ndarray:
        trials = np.maximum(point + nudges, 0.0)
        above, below = np.split(_finite(wanted(trials)), 2)
        width = np.diag(trials[: len(point)]) - np.diag(trials[len(point) :])  # one-sided where a share is 0
        return (above - below).T / (width * scale)

    more = []
    if region.kl_limit is not None:
        more.append(kl.ball(np.array(region.prior), region.kl_limit))
    if parts is None:
        found = minimize_inside(
            region.polytope,
            lambda point: -float(value(point)),
            lambda point: -slope(point),
            start,
            more=more,
            steps=POLISHING,
            precision=PRECISION,
        )
    else:
        found = maximize_least(
            region.polytope, value, slope, start, more=more, steps=POLISHING, precision=PRECISION
        )
    return start if found is None else region.project(found)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
