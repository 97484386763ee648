"""Geometry of the simplex of mixtures: coordinates, projection, and the grid that proposals live on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import SUM_TOLERANCE, Mixture

# Proposals are whole ten-thousandths. Finer differences are far below what any benchmark resolves,
# and on a grid a repeated proposal is recognised as one.
UNITS = 10_000


def basis(k: int) -> np.ndarray:
    """Orthonormal basis [k, k - 1] of the directions in which shares keep their sum (Helmert's contrasts).

    Written out instead of taken from a QR, so that the same seed gives the same proposals whatever
    LAPACK is installed. shares = 1/k + basis @ z is isometric: distances between z are distances
    between mixtures, no domain is special, and the origin is the uniform mixture.
    """
    columns = np.zeros((k, k - 1))
    for j in range(1, k):
        columns[:j, j - 1] = 1.0
        columns[j, j - 1] = -j
        columns[:, j - 1] /= np.sqrt(j * (j + 1))
    return columns


def project(shares: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex to `shares` [k], in Euclidean distance.

    Sort-based: Held, Wolfe & Crowder 1974; Duchi et al., ICML 2008, figure 1. Whole faces and vertices
    are the nearest point of sets of positive volume, so a normal sample reaches the boundary.
    """
    shares = shares - shares.max()  # changes nothing but the rounding, however far away the point is
    descending = np.sort(shares)[::-1]
    excess = (np.cumsum(descending) - 1.0) / np.arange(1, len(shares) + 1)
    support = np.flatnonzero(descending > excess)[-1]
    return np.maximum(shares - excess[support], 0.0)


def snap(names: Sequence[str], shares: Sequence[float] | np.ndarray) -> Mixture:
    """The canonical mixture nearest to `shares` (>= 0, sum 1): whole ten-thousandths that sum to exactly 1.

    Largest remainder; ties go to the earlier expert. Each weight is the float nearest to n/10000, whose
    shortest text is at most four decimals: it survives JSON and being typed again as --weights. The one
    exception is what rounds to within one unit of the centroid, which is Mixture.uniform(names), so that
    "uniform" is one mixture and not one of several. Raises ValueError when the shares are negative or do
    not sum to 1.
    """
    scaled = np.asarray(shares, dtype=np.float64) * UNITS
    if not (scaled.min() >= 0 and abs(scaled.sum() - UNITS) < SUM_TOLERANCE * UNITS):
        raise ValueError(f"shares must be >= 0 and sum to 1, but got {list(shares)}")
    units = np.floor(scaled).astype(np.int64)
    rest = UNITS - int(units.sum())
    units[np.argsort(units - scaled, kind="stable")[:rest]] += 1
    if (np.abs(units - UNITS / len(names)) < 1).all():
        return Mixture.uniform(names)
    return Mixture(tuple(names), tuple(int(n) / UNITS for n in units))


def uniform_sample(names: Sequence[str], rng: np.random.Generator) -> Mixture:
    """A mixture drawn uniformly from the simplex (Dirichlet with all parameters 1)."""
    return snap(names, rng.dirichlet(np.ones(len(names))))


def lattice(names: Sequence[str], steps: int) -> Iterator[Mixture]:
    """All mixtures whose shares are multiples of 1/steps: comb(steps + k - 1, k - 1) of them."""
    for counts in _compositions(steps, len(names)):
        yield snap(names, np.array(counts) / steps)


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def start_points(names: Sequence[str], prior: Mixture | None = None) -> list[Mixture]:
    """What every search evaluates first: uniform, each single expert, and the user's prior; no duplicates.

    They are the baselines of the result, and they tell the search where the good corner is.
    Raises ConfigError when the prior is not a mixture of `names` with shares >= 0 that sum to 1.
    """
    points = [Mixture.uniform(names), *(Mixture.one_hot(names, name) for name in names)]
    if prior is not None:
        if prior.names != tuple(names):
            raise ConfigError(
                f"the prior must name the experts {', '.join(names)} in this order, "
                f"but names {', '.join(prior.names)}"
            )
        if min(prior.weights) < 0 or prior.base_weight != 0.0:
            raise ConfigError(f"the shares of the prior must be >= 0 and sum to 1, but got {prior.as_dict()}")
        points.append(snap(names, prior.weights))
    return list(dict.fromkeys(points))
