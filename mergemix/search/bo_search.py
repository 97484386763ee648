"""Bayesian optimisation: each proposal is where a Gaussian process expects the largest improvement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.base import Outcome
from mergemix.search.modelled import STARTS, ModelledSearch, ascend
from mergemix.search.posterior import Posterior

EARLY = 3  # of the best mixtures of another surface, proposed before the model is asked


class BoSearch(ModelledSearch):
    """Batch Bayesian optimisation with noisy expected improvement (Jones et al. 1998; Letham et al. 2019).

    One Gaussian process per capability (or of the utility, where there is no objective). As scores are noisy, the
    incumbent is the evaluated mixture with the best posterior mean, not the best score. Mixtures that wait for
    their results count as measured as expected, so the next proposal goes elsewhere.
    """

    kind = "bo"

    def _propose(self, count: int | None) -> list[Mixture]:
        posterior = self._posterior()
        rng = self._generator()
        if posterior is None:
            return self._random(count or self.batch, rng)
        if self._waiting:
            posterior = posterior.given(np.array([mixture.weights for mixture in self._waiting]))
        known = np.array([mixture.weights for mixture, _ in self._evidence()])
        found: list[Mixture] = []
        for _ in range(count or self.batch):
            proposal = self._next(posterior, known, found, rng)
            if proposal is None:
                break
            found.append(proposal)
            at = np.array([proposal.weights])
            mean, sd = posterior.moments(at)
            self.predictions[proposal] = float(mean[0] + self.region.penalty(at)[0]), float(sd[0])
            posterior = posterior.given(at)
        return found
        
    def _next(self, posterior: Posterior, known: np.ndarray, found: list[Mixture], rng) -> Mixture | None:
        means, _ = posterior.moments(known)
        best = float(means.max())
        starts = known[np.argsort(-means, kind="stable")[:STARTS]]
        points, values = ascend(lambda shares: posterior.expected_improvement(shares, best), self.region, rng, starts)
        for point in points:
            mixture = self.region.snap(point)
            if self._is_new(mixture) and mixture not in found:
                return mixture
        return None
