"""CMA-ES on the simplex: normal samples in the hyperplane of mixtures, projected onto the simplex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Search
from mergemix.search.simplex import UNITS, basis, project, snap

# A quarter to a third of the range is the usual choice, and vertices are about 1 from the centroid. On
# random quadratics (3 to 6 experts, 40 to 60 candidates, with and without noise) 0.2 and 0.3 were equal
# and 0.4 was worse.
SIGMA0 = 0.25
# Generations in a row that repeat known mixtures only, before the search is called converged.
MAX_REPEATED_GENERATIONS = 50


class CmaSearch(Search):
    """CMA-ES (pycma; Hansen, arXiv 1604.00772) in isometric coordinates of the simplex.

    A sample is projected onto the simplex and snapped; what is told to CMA-ES is

        -score(mixture) + spread * |sample - projection|^2

    with `spread` the interquartile range of the scores so far. Samples outside a face or vertex fall on
    it, so the boundary is proposed with positive probability. Without the second term everything
    outside would be as good as the boundary and the mean would drift away; with it, any positive factor
    leaves the best mixture the optimum, since the term is zero on the simplex. A failed candidate
    counts as worse than the worst score seen.

    A sample that snaps to a mixture already evaluated takes its known score and costs no budget. A
    generation that the budget cuts short is never told to CMA-ES: a search with a larger budget asks
    for the rest of it first.
    """

    kind = "cma"

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, **options: Any) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self._basis = basis(len(names))
        self._rng = np.random.default_rng(seed)
        self._strategy: Any = None  # cma.CMAEvolutionStrategy, once the start points have been told
        self._generation: list[tuple[np.ndarray, Mixture, float]] = []  # sample, mixture, squared distance

    def _propose(self, count: int | None) -> list[Mixture]:
        if self._strategy is None:
            self._strategy = self._open_strategy()
        else:
            self._tell_generation()
        for _ in range(MAX_REPEATED_GENERATIONS):
            if stopped := self._strategy.stop():
                self._reasons = {
                    name: f"CMA-ES met its criterion {name} = {value}" for name, value in stopped.items()
                }
                return []
            self._generation = [self._candidate(sample) for sample in self._strategy.ask()]
            mixtures = dict.fromkeys(mixture for _, mixture, _ in self._generation)
            if new := [mixture for mixture in mixtures if mixture not in self._order]:
                return new
            self._tell_generation()
        self._reasons = {"converged": f"{MAX_REPEATED_GENERATIONS} generations of known mixtures only"}
        return []

    def _open_strategy(self) -> Any:
        import cma  # takes seconds, because it imports matplotlib where that is installed

        # pycma does not support one dimension. Two experts get a second coordinate without a meaning,
        # which the distance penalty keeps near zero.
        mean = np.zeros(max(2, len(self.names) - 1))
        mean[: len(self.names) - 1] = self._basis.T @ self._initial_shares()
        options = {
            # Our own generator: by default pycma seeds numpy's global one, and takes seed 0 as the time.
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": np.nan,
            "tolx": 0.5 / UNITS,  # below half a step of the grid, proposals only repeat
            # Scores have no natural unit, and accuracies on few items are often equal: neither is convergence.
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": 10,
            "verbose": -9,
            "signals_filename": "",  # would read options from a file in the working directory
        }
        return cma.CMAEvolutionStrategy(mean, SIGMA0, options)

    def _initial_shares(self) -> np.ndarray:
        """Midpoint of the uniform mixture and the best start point.

        The best corner is evidence for its half of the simplex and no more than that: mixtures beat
        single experts even on the experts' own benchmarks (the paper's finding), so the search starts
        inside. On random quadratics this was as good as any rank-weighted mean of the start points.
        """
        best = min(self._starts, key=self._loss)  # the first of equals
        return 0.5 * (1.0 / len(self.names) + np.array(best.weights))

    def _candidate(self, sample: np.ndarray) -> tuple[np.ndarray, Mixture, float]:
        inside = len(self.names) - 1
        shares = 1.0 / len(self.names) + self._basis @ sample[:inside]
        projected = project(shares)
        distance = np.sum((shares - projected) ** 2) + np.sum(sample[inside:] ** 2)
        return sample, snap(self.names, projected), float(distance)

    def _tell_generation(self) -> None:
        spread = self._spread()
        losses = [self._loss(mixture) + spread * distance for _, mixture, distance in self._generation]
        self._strategy.tell([sample for sample, _, _ in self._generation], losses)

    def _loss(self, mixture: Mixture) -> float:
        score = self._outcomes[mixture].utility
        if score is not None:
            return -score
        known = [score for score in self._scores().values() if score is not None]
        return self._spread() - min(known, default=0.0)

    def _spread(self) -> float:
        """Interquartile range of the scores so far, or their range, or 1: a scale, never zero."""
        known = [score for score in self._scores().values() if score is not None]
        if not known:
            return 1.0
        low, high = np.quantile(known, [0.25, 0.75])
        return float(high - low) or max(known) - min(known) or 1.0
