"""Polytopes of mixtures: the simplex cut by bounds on shares and on sums of shares, all whole units of the grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergemix.search import simplex
from mergemix.search.simplex import UNITS

ROUNDING = 1e-6  # in units of the grid: far above the error of a sum of shares, far below a unit
WIDER = (0, 1, 4, 64, UNITS)  # how far integer rounding looks beyond the neighbours of a point, in units


@dataclass(frozen=True, eq=False)
class Polytope:
    """{shares x: sum x = 1, lower <= x <= upper, row_lower <= rows @ x <= row_upper}, limits in units.

    lower, upper (K,) and row_lower, row_upper (G,): whole numbers from 0 to UNITS. rows (G, K): 0 or 1.
    """

    lower: np.ndarray
    upper: np.ndarray
    rows: np.ndarray
    row_lower: np.ndarray
    row_upper: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], limits: Iterable[tuple[tuple[str, ...], int, int]]) -> Polytope:
        """From (domains whose shares are summed, lowest, highest) triples; those of the same domains are joined."""
        lower, upper = np.zeros(len(names)), np.full(len(names), float(UNITS))
        sums: dict[frozenset[str], tuple[int, int]] = {}
        for domains, low, high in limits:
            if len(domains) == 1:
                k = names.index(domains[0])
                lower[k], upper[k] = max(lower[k], low), min(upper[k], high)
            else:
                known = sums.get(frozenset(domains), (0, UNITS))
                sums[frozenset(domains)] = max(known[0], low), min(known[1], high)
        rows = np.array([[float(name in domains) for name in names] for domains in sums])
        ends = np.array(list(sums.values()), dtype=np.float64).reshape(-1, 2)
        return cls(lower, upper, rows.reshape(-1, len(names)), ends[:, 0], ends[:, 1])

    @property
    def k(self) -> int:
        return len(self.lower)

    @property
    def is_simplex(self) -> bool:
        return not self.rows.size and not self.lower.any() and (self.upper == UNITS).all()

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(A (K + G, K), low, high): low <= A @ x <= high, in shares, without the sum."""
        matrix = np.vstack([np.eye(self.k), self.rows])
        low, high = np.append(self.lower, self.row_lower), np.append(self.upper, self.row_upper)
        return matrix, low / UNITS, high / UNITS

    def holds(self, shares: np.ndarray) -> np.ndarray:
        """Whether each of shares (n, K) that sum to 1 is inside: (n,); exact for those on the grid."""
        matrix, low, high = self.limits
        units = shares @ matrix.T * UNITS
        inside = (units >= low * UNITS - ROUNDING) & (units <= high * UNITS + ROUNDING)
        return inside.all(axis=1)

    def project(self, shares: np.ndarray, cuts: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """The nearest point to `shares` (K,); of the part where cuts[0] @ x <= cuts[1], when there are cuts."""
        if self.is_simplex and cuts is None:
            return simplex.project(shares)
        if not self.rows.size and cuts is None:
            return _project_on_box(shares, self.lower / UNITS, self.upper / UNITS)
        return self._project_on_rows(shares, cuts)

    def _project_on_rows(self, shares: np.ndarray, cuts: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        """Least distance programming: Lawson & Hanson, Solving Least Squares Problems, chapter 23.

        Within the affine hull of the polytope, so that there is no equality left and no degenerate pair.
        """
        origin, directions = self.center, self.hull
        target = directions.T @ (shares - origin)
        normals, rests = self._inequalities
        if cuts is not None:
            normals = np.vstack([normals, -cuts[0] @ directions])
            rests = np.append(rests, cuts[0] @ origin - cuts[1])
        sizes = np.linalg.norm(normals, axis=1)
        kept = sizes > 1e-12
        normals, needs = normals[kept] / sizes[kept, None], rests[kept] / sizes[kept]
        needs = needs - normals @ target
        step = np.zeros(len(target)) if (needs <= 0).all() else _least_distance(normals, needs)
        found = origin + directions @ (target + step)
        return np.clip(found, self.lower / UNITS, self.upper / UNITS)

    @cached_property
    def _inequalities(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, n) with N @ z >= n inside, for x = center + hull @ z: the inequalities that are not equalities."""
        matrix, low, high = self.limits
        normals = np.vstack([matrix, -matrix])[~self._tight] @ self.hull
        rests = np.append(low - matrix @ self.center, matrix @ self.center - high)[~self._tight]
        return normals, rests

    @cached_property
    def _inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(a relatively interior point (K,), which of the 2(K + G) inequalities, lows then highs, are equalities).

        One linear program finds both (Freund, Roundy & Todd 1985): over the cone of the polytope, every slack that
        can be positive can be 1. Raises ValueError for an empty polytope.
        """
        from scipy.optimize import linprog

        matrix, low, high = self.limits
        count = 2 * len(matrix)
        signed = np.vstack([matrix, -matrix])
        rests = np.append(low, -high) * UNITS
        cost = np.append(np.zeros(self.k + 1), -np.ones(count))
        above = np.hstack([-signed, rests[:, None], np.eye(count)])  # signed @ y >= rests * scale + slack
        whole = np.concatenate([np.ones(self.k), [-UNITS], np.zeros(count)])
        bounds = [(None, None)] * self.k + [(1, None)] + [(0, 1)] * count
        found = linprog(cost, above, np.zeros(count), whole[None], [0.0], bounds)
        if found.x is None:
            raise ValueError("the polytope is empty")
        point = found.x[: self.k] / (found.x[self.k] * UNITS)
        return point, found.x[self.k + 1 :] < 0.5

    @property
    def _tight(self) -> np.ndarray:
        return self._inside[1]

    @cached_property
    def tight_rows(self) -> np.ndarray:
        """Which of the sums in `limits` (K + G,) are the same at every point."""
        lows, highs = np.split(self._tight, 2)
        return lows | highs

    @cached_property
    def hull(self) -> np.ndarray:
        """Orthonormal directions (K, dimension) of the affine hull."""
        equalities = np.vstack([np.ones(self.k), self.limits[0][self.tight_rows]])
        _, sizes, right = np.linalg.svd(equalities)
        return right[int((sizes > 1e-9).sum()) :].T

    @cached_property
    def center(self) -> np.ndarray:
        """The centre (K,) of the largest ball that fits in, within the affine hull."""
        from scipy.optimize import linprog

        point, directions = self._inside[0], self.hull
        if not directions.shape[1]:
            return point
        matrix, low, high = self.limits
        normals = (np.vstack([matrix, -matrix]) @ directions)[~self._tight]
        rests = np.append(low - matrix @ point, matrix @ point - high)[~self._tight]
        sizes = np.linalg.norm(normals, axis=1)
        above = np.hstack([-normals, sizes[:, None]])
        cost = np.append(np.zeros(directions.shape[1]), -1.0)
        bounds = [(None, None)] * directions.shape[1] + [(0, None)]
        found = linprog(cost, above * UNITS, -rests * UNITS, bounds=bounds)
        return point if found.x is None else point + directions @ found.x[:-1]

    def round(self, inside: np.ndarray) -> np.ndarray:
        """Whole units (K,) that satisfy every limit, nearest to the shares `inside`.

        Largest remainder; an integer program when sums of shares do not come out right. Raises ValueError when no
        whole units satisfy the limits (which only overlapping sums can bring about).
        """
        scaled = np.clip(inside * UNITS, self.lower, self.upper)
        near = np.rint(scaled)
        scaled = np.where(np.abs(scaled - near) < ROUNDING, near, scaled)
        units = np.floor(scaled)
        rest = int(UNITS - units.sum())
        order = np.argsort(units - scaled, kind="stable")
        order = order[units[order] < self.upper[order]]
        if 0 <= rest <= len(order):
            units[order[:rest]] += 1
            sums = self.rows @ units
            if (sums >= self.row_lower).all() and (sums <= self.row_upper).all():
                return units.astype(np.int64)
        for wider in WIDER:
            found = self._integer_program(scaled, wider)
            if found is not None:
                return found
        raise ValueError("no whole units satisfy the limits")

    def _integer_program(self, scaled: np.ndarray, wider: int) -> np.ndarray | None:
        """The whole units nearest to `scaled` (sum of distances), at most `wider` beyond its neighbours."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        low = np.maximum(self.lower, np.floor(scaled) - wider)
        high = np.minimum(self.upper, np.ceil(scaled) + wider)
        base = np.floor(scaled)
        # units = base + up - down; distances are linear in `up` beyond the first unit, which saves the rest.
        first = np.ceil(scaled) - base
        eye = np.eye(self.k)
        parts = np.hstack([eye, eye, -eye])  # first unit up, further units up, units down
        cost = np.concatenate([1 - 2 * (scaled - base), np.full(2 * self.k, 2.0)])
        limits = [LinearConstraint(parts, low - base, high - base)]
        total = np.vstack([np.ones(self.k), self.rows])
        limits.append(
            LinearConstraint(
                total @ parts,
                np.append(UNITS, self.row_lower) - total @ base,
                np.append(UNITS, self.row_upper) - total @ base,
            )
        )
        most = np.concatenate([first, np.full(2 * self.k, float(wider))])
        found = milp(
            cost,
            integrality=np.ones(3 * self.k),
            bounds=Bounds(np.zeros(3 * self.k), most),
            constraints=limits,
        )
        return None if found.x is None else np.rint(base + parts @ found.x).astype(np.int64)

    def sample(
        self,
        count: int,
        rng: np.random.Generator,
        start: np.ndarray,
        accept: Callable[[np.ndarray], np.ndarray] | None,
    ) -> np.ndarray:
        """`count` uniform points (count, K) of the part where `accept` (n, K) -> (n,) holds, a convex one.

        start: a point inside that part.
        """
        from mergemix.search.hit_and_run import hit_and_run, reject

        found = reject(self, count, rng, accept)
        return hit_and_run(self, count, rng, start, accept) if found is None else found


def _project_on_box(shares: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The nearest point of {lower <= x <= upper, sum x = 1}: x = clip(shares - t), t between two breakpoints.

    The sum falls piecewise linearly in t, with a breakpoint where a share leaves a bound.
    """
    shares = shares - shares.max()
    breaks = np.sort(np.concatenate([shares - lower, shares - upper]))
    sums = np.clip(shares - breaks[:, None], lower, upper).sum(axis=1)
    after = int(np.clip(np.searchsorted(-sums, -1.0), 1, len(breaks) - 1))
    left, right = sums[after - 1], sums[after]
    part = (left - 1.0) / (left - right) if left > right else 0.0
    shift = breaks[after - 1] + min(max(part, 0.0), 1.0) * (breaks[after] - breaks[after - 1])
    return np.clip(shares - shift, lower, upper)


def _least_distance(normals: np.ndarray, needs: np.ndarray) -> np.ndarray:
    """The shortest w with normals @ w >= needs, normals (m, d) of length 1."""
    from scipy.optimize import nnls

    system = np.vstack([normals.T, needs])
    goal = np.zeros(len(system))
    goal[-1] = 1.0
    multipliers, _ = nnls(system, goal, maxiter=50 * len(needs))
    rest = system @ multipliers - goal
    step = -rest[:-1] / rest[-1]
    # The active constraints, solved as equations, give the same point without the loss of digits.
    active = multipliers > 0
    sharp = np.linalg.lstsq(normals[active], needs[active], rcond=None)[0]
    worst = (needs - normals @ step).max()
    return sharp if (needs - normals @ sharp).max() <= max(worst, 1e-12) else step
