"""Proxy and trained scores of the same mixtures beside each other, per capability and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergemix.evals.utility import AnyUtility, Utility
from mergemix.mixture import Mixture
from mergemix.rank_stats import drawn_means, rank_agreement
from mergemix.valuation import Valuation
from mergemix.verify.measure import Scored

OVERALL = None  # beside the names of capabilities, which may be any text


@dataclass(frozen=True)
class Reference:
    """A mixture with its proxy and its training runs, in the order of their seeds.

    sources: of each run, "checkpoint", or what its scores were given by: "capability" or "benchmark".
    """

    mixture: Mixture
    proxy: Scored
    runs: tuple[Scored, ...]
    seeds: tuple[int, ...]
    sources: tuple[str, ...]


def values(valuation: Valuation, scored: Scored) -> dict[str | None, float]:
    """The utility (OVERALL) and each capability, higher is better."""
    found: dict[str | None, float] = {OVERALL: valuation.utility(scored.means)}
    return found | {name: each(scored.means) for name, each in valuation.capabilities.items()}


def rank(
    references: Sequence[Reference], valuation: Valuation, *, top: int | None, seed: int
) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """Agreement overall, that of each capability, and whether items are among the sources of the intervals."""
    models = [each for reference in references for each in (reference.proxy, *reference.runs)]
    found = [values(valuation, each) for each in models]
    layout = _Layout(references)
    redrawn = _redraw(models, valuation, seed)
    agreements = {}
    for name in found[0]:
        proxy, trained = layout.split(np.array([[each[name] for each in found]]))
        redraws = None if redrawn is None else layout.split(redrawn[name])
        agreements[name] = rank_agreement(proxy[0], trained[0], top=top, redraws=redraws, seed=seed)
    overall = agreements[OVERALL]
    capabilities = {name: each for name, each in agreements.items() if name is not None}
    return overall, capabilities, redrawn is not None


class _Layout:
    """Where the scores of proxies and runs are in a row of all models."""

    def __init__(self, references: Sequence[Reference]) -> None:
        widest = max(len(each.runs) for each in references)
        self.proxies, self.runs = [], np.full((len(references), widest), -1)
        place = 0
        for row, each in enumerate(references):
            self.proxies.append(place)
            self.runs[row, : len(each.runs)] = np.arange(place + 1, place + 1 + len(each.runs))
            place += 1 + len(each.runs)

    def split(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Proxies (R, n) and runs (R, n, s), NaN where a reference has fewer, from (R, models)."""
        return scores[:, self.proxies], np.where(self.runs >= 0, scores[:, self.runs], np.nan)


def _redraw(models: Sequence[Scored], valuation: Valuation, seed: int) -> dict[str | None, np.ndarray] | None:
    """Utility and capabilities of all models under draws of items, the same for all: (RESAMPLES, models) by name.

    None where the items of a model are not known, or none was answered by all.
    """
    rng = np.random.default_rng([seed, 1])
    means: dict[str, np.ndarray] = {}
    for benchmark in sorted({name for each in valuation.capabilities.values() for name in each.weights}):
        answered = [set(() if each.items is None else each.items.get(benchmark, ())) for each in models]
        if not set.intersection(*answered):
            return None
        order = sorted(set.union(*answered))
        scores = np.array([[each.items[benchmark].get(item, np.nan) for item in order] for each in models])  # type: ignore[index]
        means[benchmark] = drawn_means(scores, rng)
    found: dict[str | None, np.ndarray] = {OVERALL: _valued(valuation.utility, means)}
    return found | {name: _valued(each, means) for name, each in valuation.capabilities.items()}


def _valued(utility: AnyUtility, means: Mapping[str, np.ndarray]) -> np.ndarray:
    """The utility of benchmark means of any shape, in that shape."""
    if isinstance(utility, Utility):
        return np.asarray(utility.offset + sum(w * means[name] for name, w in utility.weights.items()))
    shape = next(iter(means.values())).shape
    return utility.of_means({name: means[name].ravel() for name in utility.benchmarks}).reshape(shape)
