"""CMA-ES on the simplex: normal samples in the hyperplane of mixtures, projected onto the region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Outcome, Search
from mergemix.search.posterior import Memory, Posterior, fit_posterior
from mergemix.search.simplex import UNITS, basis

# A quarter to a third of the range is the usual choice, and vertices are about 1 from the centroid. On
# random quadratics (3 to 6 experts, 40 to 60 candidates, with and without noise) 0.2 and 0.3 were equal
# and 0.4 was worse.
SIGMA0 = 0.25
# Generations in a row that repeat known mixtures only, before the search is called converged.
MAX_REPEATED_GENERATIONS = 50
# Scores are smoothed where their standard errors are more than this share of the standard deviation of a generation's.
NOISY = 0.1
# Samples for each that is evaluated, as long as no more candidates than this are known: a process of more takes longer
# to fit than CMA-ES, by then adapted to its surroundings, gains by it.
DRAWN, MODELLED = 3, 100


class Sample(NamedTuple):
    """A point of CMA-ES, the mixture that is evaluated for it, and the squared distance between them."""

    point: np.ndarray
    mixture: Mixture
    distance: float


class CmaSearch(Search):
    """CMA-ES (pycma; Hansen, arXiv 1604.00772) in isometric coordinates of the simplex.

    A sample is projected onto the region and snapped; what is told to CMA-ES is

        -score(mixture) + spread * |sample - projection|^2

    with `spread` the interquartile range of the scores so far. Samples outside a face or vertex fall on
    it, so the boundary is proposed with positive probability. Without the second term everything
    outside would be as good as the boundary and the mean would drift away; with it, any positive factor
    leaves the best mixture the optimum, since the term is zero on the simplex. A failed candidate
    counts as worse than the worst score seen.

    A Gaussian process that is fitted to all scores helps twice. Of three times as many samples as a generation has,
    those are evaluated that it holds for the best (preselection, as in Kern et al.'s lmm-CMA and its heirs). And where
    scores are noisy, its means are told in their place: CMA-ES, which knows nothing but the present generation, would
    follow the noise. On random quadratics of 4 experts (60 candidates, 8 seeds) the first makes the regret of
    the proposals 3 to 6 times smaller.

    A sample that snaps to a mixture already evaluated takes its known score and costs no budget. A
    generation that the budget cuts short is never told to CMA-ES: a search with a larger budget asks
    for the rest of it first. With `ask(count)` no generation is waited for: more samples are drawn from the present
    distribution, and it is updated as soon as a generation's number of them, in the order of proposal, are known.
    """

    kind = "cma"

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, **options: Any) -> None:
        super().__init__(names, budget=budget, seed=seed, **options)
        self._basis = basis(len(names))
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._strategy: Any = None  # cma.CMAEvolutionStrategy, once the start points have been told
        self._samples: list[Sample] = []  # drawn and not told to CMA-ES
        self._memory: Memory = {}

    def _propose(self, count: int | None) -> list[Mixture]:
        if early := self._early():
            return early
        if self._strategy is None:
            self._strategy = self._open_strategy()
        found: dict[Mixture, None] = {}
        for _ in range(MAX_REPEATED_GENERATIONS):
            self._tell_generations()
            if stopped := self._strategy.stop():
                if found or self._waiting:
                    break
                self._reasons = {
                    name: f"CMA-ES met its criterion {name} = {value}" for name, value in stopped.items()
                }
                return []
            drawn = self._drawn()
            self._samples += drawn
            found |= {sample.mixture: None for sample in drawn if self._is_new(sample.mixture)}
            if len(found) >= (count or 1):
                break
        if not found and not self._waiting:
            self._reasons = {"converged": f"{MAX_REPEATED_GENERATIONS} generations of known mixtures only"}
        return list(found)

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
        return cma.CMAEvolutionStrategy(mean, SIGMA0 * self._size(), options)

    def _size(self) -> float:
        """The largest distance between start points, in that between two single experts."""
        points = np.array([mixture.weights for mixture in self._starts])
        distances = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))
        return max(float(distances.max() / np.sqrt(2)), 1 / UNITS)

    def _initial_shares(self) -> np.ndarray:
        """Midpoint of the (nearly) uniform mixture and the best one so far.

        The best corner is evidence for its half of the simplex and no more than that: mixtures beat
        single experts even on the experts' own benchmarks (the paper's finding), so the search starts
        inside. On random quadratics this was as good as any rank-weighted mean of the start points.
        """
        known = [m for m in (*self._order, *self._learned) if self._is_known(m) and self.region.contains(m)]
        best = min(known, key=self._loss, default=self._starts[0])  # the first of equals
        return 0.5 * (np.array(self._starts[0].weights) + np.array(best.weights))

    def _drawn(self) -> list[Sample]:
        """The next generation: of several times as many samples those that the process holds for the best."""
        size = self._strategy.popsize
        posterior = self._posterior() if len(self.evidence()) <= MODELLED else None
        if posterior is None:
            return [self._sample(point) for point in self._strategy.ask()]
        samples = [self._sample(point) for point in self._strategy.ask(DRAWN * size)]
        means, _ = posterior.moments(np.array([sample.mixture.weights for sample in samples]))
        losses = self._spread() * np.array([sample.distance for sample in samples]) - means
        chosen = np.argsort(losses, kind="stable")[:size]
        return [samples[index] for index in sorted(chosen)]

    def _posterior(self) -> Posterior | None:
        return fit_posterior(
            self.evidence(), self.objective, self.region.penalty, seed=self._seed, memory=self._memory
        )

    def _sample(self, point: np.ndarray) -> Sample:
        inside = len(self.names) - 1
        shares = 1.0 / len(self.names) + self._basis @ point[:inside]
        projected = self.region.project(shares)
        distance = np.sum((shares - projected) ** 2) + np.sum(point[inside:] ** 2)
        return Sample(point, self.region.snap(projected), float(distance))

    def _tell_generations(self) -> None:
        """Tell CMA-ES of as many whole generations as are known."""
        size = self._strategy.popsize
        known = [sample for sample in self._samples if self._is_known(sample.mixture)]
        for first in range(0, len(known) - size + 1, size):
            generation = known[first : first + size]
            spread, smoothed = self._spread(), self._smoothed([sample.mixture for sample in generation])
            losses = [
                smoothed.get(sample.mixture, self._loss(sample.mixture)) + spread * sample.distance
                for sample in generation
            ]
            self._strategy.tell([sample.point for sample in generation], losses)
            told = set(map(id, generation))
            self._samples = [sample for sample in self._samples if id(sample) not in told]

    def _smoothed(self, generation: Sequence[Mixture]) -> Mapping[Mixture, float]:
        """What stands for the losses of a generation's mixtures where the noise is not small; {} where it is."""
        scored = {m: o for m in generation if (o := self._outcome(m)).utility is not None}
        if len(scored) < 2:
            return {}
        spread = np.std([outcome.utility or 0.0 for outcome in scored.values()])
        if np.median([outcome.stderr for outcome in scored.values()]) <= NOISY * spread:
            return {}
        posterior = self._posterior()
        assert posterior is not None, "of these some were scored"
        means, _ = posterior.moments(np.array([mixture.weights for mixture in scored]))
        return {mixture: -float(mean) for mixture, mean in zip(scored, means, strict=True)}

    def _is_known(self, mixture: Mixture) -> bool:
        return mixture in self._outcomes or mixture in self._learned

    def _outcome(self, mixture: Mixture) -> Outcome:
        return self._outcomes[mixture] if mixture in self._outcomes else self._learned[mixture]

    def _loss(self, mixture: Mixture) -> float:
        score = self._outcome(mixture).utility
        if score is not None:
            return -self._worth(mixture, score)
        known = [score for score in self._scores().values() if score is not None]
        return self._spread() - min(known, default=0.0)

    def _spread(self) -> float:
        """Interquartile range of the scores so far, or their range, or 1: a scale, never zero."""
        known = [score for score in self._scores().values() if score is not None]
        if not known:
            return 1.0
        low, high = np.quantile(known, [0.25, 0.75])
        return float(high - low) or max(known) - min(known) or 1.0
