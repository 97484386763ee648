"""Packed sequences: the documents of each domain end to end, in a shuffled order, cut where a sequence is full."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from mergemix.train.corpus import Corpus
from mergemix.train.plan import Plan

IGNORED = -100  # the target of a token that is not learned


class TokenStream:
    """The tokens of one corpus, endless: its documents in an order that `seed` and `domain` decide, another each epoch.

    The general data of a training reads the same order from its other end (`backwards`), so that it meets what the
    mixture reads of that domain as late as can be.
    """

    def __init__(self, corpus: Corpus, domain: str, seed: int, *, backwards: bool) -> None:
        self._corpus = corpus
        self._key = [seed, *np.frombuffer(hashlib.sha256(domain.encode()).digest(), np.uint32).tolist()]
        self._backwards = backwards
        self._epoch = -1
        self._order = np.empty(0, np.int64)
        self._ends = np.empty(0, np.int64)  # where each document of the order ends in the epoch

    def read(self, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """([count] token ids, [count] whether each is learned) from `begin` of the stream."""
        size = len(self._corpus.tokens)
        parts = []
        while count:
            epoch, start = divmod(begin, size)
            taken = min(count, size - start)
            self._shuffle(epoch)
            parts.append(self._within(start, taken))
            begin, count = begin + taken, count - taken
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([learned for _, learned in parts])

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        order = np.random.default_rng([epoch, *self._key]).permutation(self._corpus.documents)
        self._order = order[::-1] if self._backwards else order
        self._ends = np.cumsum(np.diff(self._corpus.offsets)[self._order])
        self._epoch = epoch

    def _within(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same, inside the epoch that is shuffled."""
        first, last = np.searchsorted(self._ends, [start, start + count - 1], side="right")
        documents = self._order[first : last + 1]
        begins = self._corpus.offsets[documents]
        lengths = self._corpus.offsets[documents + 1] - begins
        ends = self._ends[first : last + 1]
        positions = np.arange(start, start + count)
        which = np.searchsorted(ends, positions, side="right")
        within = positions - (ends - lengths)[which]
        ids = self._corpus.tokens[begins[which] + within]
        return ids, within >= self._corpus.prompts[documents][which]


class Batches:
    """The batches of a plan, read one after the other from `step` on."""

    def __init__(self, plan: Plan, corpora: Mapping[str, Corpus], seed: int, step: int = 0) -> None:
        self._plan = plan
        self._streams = [
            TokenStream(corpora[source.domain], source.domain, seed, backwards=source.general)
            for source in plan.sources
        ]
        self._consumed = plan.consumed(step).tolist()
        self._step = step

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """([batch, length] token ids, [batch, length] the token to be predicted after each, or IGNORED), int64."""
        shape = (self._plan.batch, self._plan.sequence_length)
        ids = np.empty(shape, np.int64)
        learned = np.empty(shape, bool)
        for row, recipe in enumerate(self._plan.recipes_of(self._step)):
            place = 0
            for source, count in recipe:
                part = slice(place, place + count)
                ids[row, part], learned[row, part] = self._streams[source].read(self._consumed[source], count)
                self._consumed[source] += count
                place += count
        targets = np.full(shape, IGNORED, np.int64)
        targets[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], IGNORED)
        self._step += 1
        return ids, targets
