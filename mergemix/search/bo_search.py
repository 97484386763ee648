"""Bayesian optimisation: each proposal is where Gaussian processes expect the largest improvement."""

from __future__ import annotations

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.modelled import GAIN, SPREAD, STARTS, ModelledSearch, ascend
from mergemix.search.posterior import Posterior


class BoSearch(ModelledSearch):
    """Batch Bayesian optimisation by expected improvement (Jones et al. 1998) under noise.

    One Gaussian process per capability, pushed through the objective (or of the utility, where there is none). As
    scores are noisy, the mixture to improve on is the one with the best posterior mean, not with the best score.
    Mixtures that wait for their results count as measured as expected, so that the next proposal goes elsewhere.
    """

    kind = "bo"

    def _propose(self, count: int | None) -> list[Mixture]:
        if early := self._early():
            return early
        rng = self._generator()
        posterior = self._posterior()
        wanted = count or self.batch
        if posterior is None:
            return self._random(wanted, rng)
        inside = [m for m, o in self.evidence() if o.utility is not None and self.region.contains(m)]
        known = np.array([mixture.weights for mixture in inside or self._starts])
        if self._narrow(posterior, known, rng) or self._exhausted():
            return []
        if self._waiting:
            waiting = np.array([mixture.weights for mixture in self._waiting])
            posterior, known = posterior.given(waiting), np.concatenate([known, waiting])
        found: list[Mixture] = []
        for _ in range(wanted):
            mixture = self._next(posterior, known, found, rng)
            if mixture is None:
                break
            self._predict(posterior, mixture)
            found.append(mixture)
            at = np.array([mixture.weights])
            posterior, known = posterior.given(at), np.concatenate([known, at])
        return found

    def _next(
        self, posterior: Posterior, known: np.ndarray, found: list[Mixture], rng: np.random.Generator
    ) -> Mixture | None:
        means, _ = posterior.moments(known)
        best = float(means.max())
        starts = known[np.argsort(-means, kind="stable")[:STARTS]]
        points, gains = ascend(lambda x: posterior.expected_improvement(x, best), self.region, rng, starts)
        for point, gain in zip(points, gains, strict=True):
            mixture = self.region.snap(point)
            if self._is_new(mixture) and mixture not in found:
                noise = max(posterior.noise_sd(known), SPREAD * float(means.std()))
                self._gains.append(bool(gain > GAIN * noise))
                return mixture
        return None
