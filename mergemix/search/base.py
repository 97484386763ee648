"""The ask/tell protocol, and the bookkeeping that every search shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.one_thread import one_thread
from mergemix.search.region import Region

# The utility of n candidates, float64 (n,), from their normalised scores by capability, (n,) each.
Objective = Callable[[Mapping[str, np.ndarray]], np.ndarray]

EARLY = 3  # mixtures that were the best on another surface, proposed after the start points


@dataclass(frozen=True)
class Outcome:
    """What the evaluation of a candidate gave.

    utility: higher is better; None when the candidate failed. stderr: its standard error as a measurement of the
    mixture, 0 where it is not known. capabilities: (normalised score, its standard error) by capability. partial: an
    estimate from a part of the items, because the candidate was stopped early.
    """

    utility: float | None
    stderr: float = 0.0
    capabilities: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    partial: bool = False

    @classmethod
    def of(cls, result: Outcome | float | None) -> Outcome:
        """An outcome from a bare score too. NaN and Inf are failures."""
        outcome = result if isinstance(result, Outcome) else cls(result)
        if outcome.utility is not None and not math.isfinite(outcome.utility):
            return replace(outcome, utility=None)
        return outcome


def check_experts(names: Sequence[str]) -> None:
    """Raise ConfigError unless there is something to mix."""
    if len(names) < 2:
        raise ConfigError(
            f"a search needs at least two experts to mix, but got {len(names)} ({', '.join(names)}): "
            "add another --experts NAME=PATH"
        )


class Search(ABC):
    """Proposes mixtures, is told what they are worth, and says when and why it stops.

        while not search.stop():
            for mixture in search.ask():
                search.tell([(mixture, evaluate(mixture))])

    Every proposal is new, inside the region, and counts once against the budget; the start points come
    first. A batch is finished when all of it has been told, one by one or together, in any order: what
    is proposed next depends only on the seed and the outcomes, never on the order or the timing of the
    results. A search is therefore resumed by telling a fresh one what the study holds. It depends on
    the budget only where `identity` says so: otherwise a larger budget continues the same sequence.

    With `ask(count)` a pool of engines is kept busy: more is proposed although some results are missing. The
    proposals then depend on what had been told at each call.

    kind: the name of the search. identity: what the sequence of proposals depends on besides the
    experts and the outcomes; a study is only continued by a search of the same identity.
    batch: how many candidates the evaluator answers at once, which sequential strategies propose together.
    objective: the utility as a function of capability scores, for strategies that model each capability; None: the
    utility itself is modelled. predictions: (mean, standard deviation) of the utility of a mixture at the time when a
    model proposed it.
    """

    kind: str

    def __init__(
        self,
        names: Sequence[str],
        *,
        budget: int,
        seed: int,
        prior: Mixture | None,
        region: Region | None = None,
        batch: int = 1,
    ) -> None:
        check_experts(names)
        self.names = tuple(names)
        self.region = region or Region.simplex(names)
        self._starts = self.region.start_points(prior)
        if budget < len(self._starts):
            raise ConfigError(
                f"--budget must cover the {len(self._starts)} start points (uniform, each single expert"
                f"{', the prior' if prior else ''}), but is {budget}: "
                f"give --budget {len(self._starts)} or more"
            )
        self.budget = budget
        self.batch = batch
        self.objective: Objective | None = None
        self.predictions: dict[Mixture, tuple[float, float]] = {}
        constraints = self.region.describe()
        self.identity: dict[str, object] = {
            "search": self.kind,
            "seed": seed,
            "prior": None if prior is None else prior.as_dict(),
            **({"constraints": constraints} if constraints else {}),
        }
        self._waiting: dict[Mixture, None] = {}  # asked and not told, in the order of proposal
        self._order: dict[Mixture, None] = {}  # all that was ever proposed, in the order of proposal
        self._outcomes: dict[Mixture, Outcome] = {}
        self._learned: dict[Mixture, Outcome] = {}  # of the same surface, not proposed by this search
        self._hints: list[tuple[Mixture, Outcome]] = []  # of another surface that may be like it
        self._reasons: dict[str, str] = {}

    def learn(self, evidence: Sequence[tuple[Mixture, Outcome]], *, same: bool) -> None:
        """Take evidence that this search did not ask for, before the first `ask`; it costs no budget.

        same: measured with these experts on these benchmarks, so it counts like own results (and may lie outside the
        region); otherwise on a surface that may be like this one, such as that of an earlier checkpoint. Strategies
        that learn nothing on the way ignore it. Of mixtures of other domains those count that are mixtures of these:
        all others have no share in them.
        """
        translated = [(self._translated(mixture), outcome) for mixture, outcome in evidence]
        known = [(mixture, Outcome.of(outcome)) for mixture, outcome in translated if mixture is not None]
        if same:
            self._learned.update(known)
        else:
            self._hints += known

    def ask(self, count: int | None = None) -> list[Mixture]:
        """The candidates to evaluate now: those asked and not yet told, in the order of proposal.

        count: how many should be under way at once; more are proposed until so many wait. By default a new batch is
        proposed when all of the last one has been told. Asking again before telling gives the same
        ones. Empty exactly when the search has stopped.
        """
        with one_thread():
            return self._asked(count)

    def _asked(self, count: int | None) -> list[Mixture]:
        while len(self._waiting) < (count or 1) and len(self._order) < self.budget and not self._reasons:
            missing = None if count is None else count - len(self._waiting)
            batch = self._propose(missing) if self._order else self._starts
            batch = batch[: self.budget - len(self._order)]
            if not batch:
                if not self._waiting and not self._reasons:
                    self._reasons = {"exhausted": "no mixture was found that is not known already"}
                break
            assert all(self.region.contains(mixture.without_groups()) for mixture in batch), "inside"
            self._order.update(dict.fromkeys(batch))
            self._waiting.update(dict.fromkeys(batch))
        return list(self._waiting)

    def tell(self, results: Sequence[tuple[Mixture, Outcome | float | None]]) -> None:
        """Report outcomes of asked mixtures, or bare scores (higher is better; None, NaN or Inf: it failed).

        Raises ValueError for a mixture that is not waiting for a result.
        """
        for mixture, result in results:
            if mixture not in self._waiting:
                raise ValueError(f"told a mixture that is not waiting for a result: {mixture}")
            del self._waiting[mixture]
            self._outcomes[mixture] = Outcome.of(result)

    def stop(self) -> dict[str, str]:
        """Why the search is over, by reason; empty while it goes on, or waits for results."""
        if self._waiting:
            return {}
        if len(self._outcomes) >= self.budget:
            return {"budget": "the budget is used up", **self._reasons}
        return dict(self._reasons)

    def told(self) -> list[tuple[Mixture, Outcome]]:
        """What has been told, in the order of proposal: independent of the order of the results."""
        return [(mixture, self._outcomes[mixture]) for mixture in self._order if mixture in self._outcomes]

    def recommend(self) -> tuple[Mixture, float, float] | None:
        """(mixture, mean, standard deviation): the evaluated one with the highest utility as far as all scores together
        say, by a Gaussian process. Under noise it is better than the one with the best score, which was also lucky.

        Of candidates inside the region without layer groups, less what straying from the prior costs; None when none
        has been told.
        """
        from mergemix.search.posterior import fit_posterior

        known = [
            m
            for m, o in self.evidence()
            if o.utility is not None and not m.groups and self.region.contains(m)
        ]
        posterior = fit_posterior(self.evidence(), self.objective, self.region.penalty) if known else None
        if posterior is None:
            return None
        mean, sd = posterior.moments(np.array([mixture.weights for mixture in known]))
        best = int(mean.argmax())
        return known[best], float(mean[best]), float(sd[best])

    def _translated(self, mixture: Mixture) -> Mixture | None:
        """The same mixture in this search's domains; None where there is none."""
        if mixture.names == self.names:
            return mixture
        used = {name: weight for name, weight in mixture.as_dict().items() if weight}
        if mixture.groups or not set(used) <= set(self.names):
            return None
        return Mixture.of(self.names, used, normalize=False)

    def evidence(self) -> list[tuple[Mixture, Outcome]]:
        """All that is known of the surface, each mixture once: what was learned before, then what has been told."""
        return list({**self._learned, **dict(self.told())}.items())

    def _early(self) -> list[Mixture]:
        """What earlier evidence holds for best, as far as it was not measured here.

        Of another surface the best mixtures, and of the same one the very best, so that the answer is not below it.
        """
        hinted = [(m, o.utility) for m, o in self._hints if o.utility is not None and not m.groups]
        ranked = sorted(hinted, key=lambda pair: -pair[1])  # stable: the first of equals
        best = dict.fromkeys(
            self.region.snap(self.region.project(np.array(m.weights))) for m, _ in ranked[:EARLY]
        )
        again = [
            (self._worth(m, o.utility), m)
            for m, o in self._learned.items()
            if o.utility is not None and not o.partial and self.region.contains(m)
        ]
        first = [max(again, key=lambda pair: pair[0])[1]] if again else []
        return [
            *(mixture for mixture in first if mixture not in self._order),
            *(mixture for mixture in best if self._is_new(mixture)),
        ]

    def _is_new(self, mixture: Mixture) -> bool:
        """Whether it was neither proposed nor learned."""
        return mixture not in self._order and mixture not in self._learned

    def _worth(self, mixture: Mixture, utility: float) -> float:
        """The utility, less what straying from the prior costs."""
        return utility - float(self.region.penalty(np.array([mixture.weights]))[0])

    def _scores(self) -> dict[Mixture, float | None]:
        """Utilities that were told, None of failed ones, in the order of proposal."""
        return {mixture: outcome.utility for mixture, outcome in self.told()}

    @abstractmethod
    def _propose(self, count: int | None) -> list[Mixture]:
        """A batch of new, distinct mixtures inside the region: at least one unless there is no more to propose.

        count: how many are wanted while others wait (`_waiting`); None: nothing waits, and the batch is as large as
        the strategy likes. Sets `_reasons` and returns nothing when there is no more to propose.
        """
