"""The coarse grid: the finest simplex lattice that the budget pays for."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from mergemix.mixture import Mixture
from mergemix.search import designs
from mergemix.search.base import Search
from mergemix.search.simplex import UNITS, lattice


class GridSearch(Search):
    """The start points, then every other point of the lattice with the finest step that fits the budget.

    The step follows from the budget, so it is part of the identity: a budget that pays for a finer lattice is another
    study. Under constraints the lattice is that of designs.lattice, and its number of points is part of the identity.
    """

    kind = "grid"

    def __init__(self, names: Sequence[str], *, budget: int, **options: Any) -> None:
        super().__init__(names, budget=budget, **options)
        if self.region.is_simplex:
            steps, self._lattice = self._finest_lattice()
            self._what = f"the lattice with step 1/{steps}"
            self.identity["grid_steps"] = steps
        else:
            self._lattice = self._finest_inside()
            inside = len(self._lattice)
            self._what = (
                f"the lattice of {inside} points inside the constraints" if inside else "a lattice: none fits"
            )
            self.identity["grid_points"] = len(self._lattice)

    def _finest_lattice(self) -> tuple[int, list[Mixture]]:
        """(steps, points of that lattice that are not start points). One step always fits: the vertices."""
        k = len(self.names)
        steps = 1
        while steps < UNITS and comb(steps + k, k - 1) <= self.budget:
            steps += 1
        for smaller in range(steps, 0, -1):
            points = dict.fromkeys(lattice(self.names, smaller))
            rest = [point for point in points if point not in self._starts]
            if len(self._starts) + len(rest) <= self.budget:
                return smaller, rest
        raise AssertionError("the vertices are start points, and the budget covers those")

    def _finest_inside(self) -> list[Mixture]:
        """Points inside the region that are not start points, as many as the budget pays for at most."""
        points = designs.lattice(self.region, self.budget)
        while True:
            rest = [point for point in points if point not in self._starts]
            if len(self._starts) + len(rest) <= self.budget:
                return rest
            points = designs.lattice(self.region, len(points) - 1)

    def _propose(self, count: int | None) -> list[Mixture]:
        new = [point for point in self._lattice if self._is_new(point)]
        if not new:
            self._reasons = {"grid": f"all points of {self._what} evaluated"}
        return new
