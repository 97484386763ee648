"""The ask/tell protocol, and the bookkeeping that every search shares."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.simplex import start_points


class Search(ABC):
    """Proposes mixtures, is told their scores, and says when and why it stops.

        while not search.stop():
            for mixture in search.ask():
                search.tell([(mixture, evaluate(mixture))])

    Every proposal is new, on the simplex, and counts once against the budget; the start points come
    first. A batch is finished when all of it has been told, one by one or together, in any order: what
    is proposed next depends only on the seed and the scores, never on the order or the timing of the
    results. A search is therefore resumed by telling a fresh one what the study holds. It depends on
    the budget only where `identity` says so: otherwise a larger budget continues the same sequence.

    kind: the name of the search. identity: what the sequence of proposals depends on besides the
    experts and the scores; a study is only continued by a search of the same identity.
    """

    kind: str

    def __init__(self, names: Sequence[str], *, budget: int, seed: int, prior: Mixture | None) -> None:
        if len(names) < 2:
            raise ConfigError(
                f"a search needs at least two experts to mix, but got {len(names)} ({', '.join(names)}): "
                "add another --experts NAME=PATH"
            )
        self.names = tuple(names)
        self._starts = start_points(names, prior)
        if budget < len(self._starts):
            raise ConfigError(
                f"--budget must cover the {len(self._starts)} start points (uniform, each single expert"
                f"{', the prior' if prior else ''}), but is {budget}: "
                f"give --budget {len(self._starts)} or more"
            )
        self.budget = budget
        self.identity: dict[str, object] = {
            "search": self.kind,
            "seed": seed,
            "prior": None if prior is None else prior.as_dict(),
        }
        self._waiting: dict[Mixture, None] = {}  # asked and not told, in the order of proposal
        self._scores: dict[Mixture, float | None] = {}
        self._reasons: dict[str, str] = {}

    def ask(self) -> list[Mixture]:
        """The candidates to evaluate now: those of the current batch that have not been told.

        Asking again before telling gives the same ones. Empty exactly when the search has stopped.
        """
        if not self._waiting and not self.stop():
            batch = self._propose() if self._scores else self._starts
            self._waiting = dict.fromkeys(batch[: self.budget - len(self._scores)])
        return list(self._waiting)

    def tell(self, results: Sequence[tuple[Mixture, float | None]]) -> None:
        """Report scores (higher is better) of asked mixtures; None is a failed candidate, as is NaN or Inf.

        Raises ValueError for a mixture that is not waiting for a result.
        """
        for mixture, score in results:
            if mixture not in self._waiting:
                raise ValueError(f"told a mixture that is not waiting for a result: {mixture}")
            del self._waiting[mixture]
            self._scores[mixture] = score if score is not None and math.isfinite(score) else None

    def stop(self) -> dict[str, str]:
        """Why the search is over, by reason; empty while it goes on."""
        if len(self._scores) >= self.budget:
            return {"budget": "the budget is used up", **self._reasons}
        return dict(self._reasons)

    @abstractmethod
    def _propose(self) -> list[Mixture]:
        """The next batch of new, distinct mixtures once everything asked before has been told.

        Sets `_reasons` and returns nothing when there is no more to propose.
        """
