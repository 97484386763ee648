"""The region of allowed mixtures: the simplex, cut by constraints that every proposal satisfies exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mergemix.mixture import SUM_TOLERANCE, Mixture
from mergemix.search import kl, simplex
from mergemix.search.polytope import Polytope
from mergemix.search.simplex import UNITS

KL_SLACK = 1e-12  # the rounding of a sum of logarithms
ACTIVE_UNITS = 1  # so near to equality a linear constraint counts as active
ACTIVE_KL = 0.99  # likewise, as a part of the limit


@dataclass(frozen=True)
class Bound:
    """One constraint.

    kind: "min", "max", "pin" (a share of its own, both ends), "epochs" (a max that follows from tokens) or "kl".
    name: of the domain or group ("prior" for "kl"). domains: those whose shares are summed. limit: a share, whole
    ten-thousandths, or nats. text: for people.
    """

    kind: str
    name: str
    domains: tuple[str, ...]
    limit: float
    text: str

    @property
    def key(self) -> str:
        """For programs; no two constraints of a region have the same."""
        return f"{self.kind} {self.name}"

    @property
    def units(self) -> int:
        return round(self.limit * UNITS)

    @property
    def ends(self) -> tuple[int, int]:
        """(lowest, highest) sum of the shares that a linear constraint allows, in units of the grid."""
        lowest = self.units if self.kind in ("min", "pin") else 0
        return lowest, UNITS if self.kind == "min" else self.units


@dataclass(frozen=True)
class Region:
    """The mixtures of `names` that satisfy `bounds`, and what straying from a prior costs.

    prior: shares in the order of names, the reference of KL(shares || prior) in nats. A domain whose prior is 0
    can have no share while KL is limited or penalised: its KL is infinite. Made by Region.simplex, or by
    Constraints.region, which checks that there is such a mixture; everything here takes it for granted.
    """

    names: tuple[str, ...]
    bounds: tuple[Bound, ...] = ()
    prior: tuple[float, ...] | None = None
    kl_penalty: float = 0.0

    @classmethod
    def simplex(cls, names: Sequence[str]) -> Region:
        """All mixtures of `names`."""
        return cls(tuple(names))

    @property
    def is_simplex(self) -> bool:
        """Whether every mixture is allowed (at a price, perhaps: see `penalty`)."""
        return not self.bounds and self.polytope.is_simplex

    @property
    def kl_limit(self) -> float | None:
        return next((bound.limit for bound in self.bounds if bound.kind == "kl"), None)

    @cached_property
    def polytope(self) -> Polytope:
        linear = [(bound.domains, *bound.ends) for bound in self.bounds if bound.kind != "kl"]
        if self.prior is not None and (self.kl_limit is not None or self.kl_penalty):
            linear += [
                ((name,), 0, 0) for name, share in zip(self.names, self.prior, strict=True) if not share
            ]
        return Polytope.of(self.names, linear)

    def contains(self, mixture: Mixture) -> bool:
        """Whether `mixture` satisfies every constraint: linear ones exactly, in whole units of the grid."""
        if mixture.names != self.names:
            return False
        return all(
            self._allows(weights) for weights in (mixture.weights, *(g.weights for g in mixture.groups))
        )

    def _allows(self, weights: tuple[float, ...]) -> bool:
        if min(weights) < 0 or abs(math.fsum(weights) - 1) > SUM_TOLERANCE:
            return False
        return bool(self.holds(np.array([weights]))[0])

    def _within_kl(self, shares: np.ndarray) -> bool:
        limit = self.kl_limit
        return limit is None or float(self.divergence(shares)) <= limit + KL_SLACK

    def divergence(self, shares: np.ndarray) -> np.ndarray:
        """KL(shares || prior) in nats, over the last axis of `shares` (..., K); needs a prior."""
        if self.prior is None:
            raise ValueError("this region has no prior")
        return kl.divergence(shares, np.array(self.prior))

    def penalty(self, shares: np.ndarray) -> np.ndarray:
        """What to take off the utility of each of `shares` (n, K) for straying from the prior: (n,)."""
        if not self.kl_penalty:
            return np.zeros(len(shares))
        return self.kl_penalty * self.divergence(shares)

    def holds(self, shares: np.ndarray) -> np.ndarray:
        """Whether each of shares (n, K) that sum to 1, on the grid or between its points, is inside: (n,)."""
        inside = self.polytope.holds(shares)
        limit = self.kl_limit
        return inside if limit is None else inside & (self.divergence(shares) <= limit + KL_SLACK)

    def project(self, shares: np.ndarray) -> np.ndarray:
        """The point of the region that is nearest to `shares` (K,), any finite numbers, in Euclidean distance.

        Exact but for rounding; with a KL limit within about 1e-6. May lie between points of the grid.
        """
        limit = self.kl_limit
        if limit is None:
            return self.polytope.project(np.asarray(shares, dtype=np.float64))
        return kl.project(
            self.polytope, np.array(self.prior), limit, self.center, np.asarray(shares, dtype=np.float64)
        )

    def snap(self, shares: Sequence[float] | np.ndarray) -> Mixture:
        """A mixture of the grid near `shares` (K,) that the region contains.

        On the simplex simplex.snap. Elsewhere the point need not lie inside: it is projected first, and rounded to
        the nearest whole units that satisfy the linear constraints; where KL is then too large, it is drawn towards
        the prior. As on the simplex, what is within a unit of the centroid is Mixture.uniform where that is inside.
        """
        if self.is_simplex:
            return simplex.snap(self.names, shares)
        inside = self.project(np.asarray(shares, dtype=np.float64))
        if self.kl_limit is None:
            return self._rounded(inside)
        anchor = np.array(self._anchor.weights)
        for pull in (0.0, *np.geomspace(1e-5, 0.5, 24)):
            mixture = self._rounded((1 - pull) * inside + pull * anchor)
            if self._within_kl(np.array(mixture.weights)):
                return mixture
        return self._anchor

    def _rounded(self, inside: np.ndarray) -> Mixture:
        return self._mixture(self.polytope.round(inside))

    def _mixture(self, units: np.ndarray) -> Mixture:
        uniform = Mixture.uniform(self.names)
        if (np.abs(units - UNITS / len(self.names)) < 1).all() and self._allows(uniform.weights):
            return uniform
        return Mixture(self.names, tuple(int(n) / UNITS for n in units))

    @cached_property
    def _anchor(self) -> Mixture:
        """The mixture of the grid with (about) the least KL: if any satisfies the limit, this one does."""
        return self._mixture(kl.least_units(self.polytope, np.array(self.prior)))

    @cached_property
    def least_kl(self) -> float:
        """The least KL to the prior that a mixture of the grid reaches under the linear constraints."""
        return float(self.divergence(np.array(self._anchor.weights)))

    @cached_property
    def center(self) -> np.ndarray:
        """A point (K,) well inside the region: of the largest ball that fits, drawn inside the KL limit."""
        center = self.polytope.center
        limit = self.kl_limit
        if limit is None:
            return center
        halfway = (limit + min(self.least_kl, limit)) / 2
        return kl.draw_inside(np.array(self.prior), halfway, np.array(self._anchor.weights), center)

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` points (count, K), uniform over the region: Dirichlet(1) draws on the simplex, in their order.

        Elsewhere independent draws where enough of a simplex around the region falls inside, and hit-and-run if not.
        """
        if self.is_simplex:
            return rng.dirichlet(np.ones(len(self.names)), size=count)
        limit = self.kl_limit
        if limit is None:
            return self.polytope.sample(count, rng, self.center, None)
        return self.polytope.sample(count, rng, self.center, lambda points: self.divergence(points) <= limit)

    def start_points(self, prior: Mixture | None = None) -> list[Mixture]:
        """What every search evaluates first: the mixtures nearest to uniform, each single expert and the prior.

        No duplicates. Raises ConfigError when the prior is not a mixture of the names.
        """
        points = simplex.start_points(self.names, prior)
        return points if self.is_simplex else list(dict.fromkeys(self.snap(p.weights) for p in points))

    def active(self, mixture: Mixture) -> list[Bound]:
        """The constraints that hold `mixture` back: those within a unit of equality, KL within 1% of its limit.

        A KL limit also holds back where the prior of a domain is 0.
        """
        share = mixture.as_dict()

        def is_active(bound: Bound) -> bool:
            if bound.kind == "kl":
                near = self.divergence(np.array(mixture.weights)) >= ACTIVE_KL * bound.limit
                return bool(near) or 0.0 in (self.prior or ())
            distance = abs(math.fsum(share[name] for name in bound.domains) * UNITS - bound.units)
            return distance <= ACTIVE_UNITS + 1e-6

        return [bound for bound in self.bounds if is_active(bound)]

    def without(self, bound: Bound) -> Region:
        """The region less that constraint: what its optimum gains is the price of the constraint."""
        return replace(self, bounds=tuple(other for other in self.bounds if other.key != bound.key))

    def describe(self) -> dict[str, Any]:
        """For records and a study's identity; {} when nothing is constrained or penalised."""
        bounds = [
            {"constraint": bound.key, "limit": bound.limit, "domains": list(bound.domains)}
            for bound in self.bounds
        ]
        priced = self.prior is not None and (self.kl_penalty or self.kl_limit is not None)
        return {
            **({"bounds": bounds} if bounds else {}),
            **({"prior": dict(zip(self.names, self.prior, strict=True))} if priced and self.prior else {}),
            **({"kl_penalty": self.kl_penalty} if self.kl_penalty else {}),
        }
