"""Which tokens of which domain are in which sequence of which step: decided before the first step, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """Where tokens come from: the tokens of a domain, read on by the general data or by the mixture itself."""

    domain: str
    general: bool


Recipe = tuple[tuple[int, int], ...]  # what a sequence is made of: (index of the source, tokens), in order


@dataclass(frozen=True)
class Plan:
    """steps * batch sequences of `sequence_length` tokens.

    sources: S of them. recipes: the kinds of sequences. kinds: [steps * batch] index of each sequence's recipe.
    """

    steps: int
    batch: int
    sequence_length: int
    sources: tuple[Source, ...]
    recipes: tuple[Recipe, ...]
    kinds: np.ndarray

    def consumed(self, steps: int) -> np.ndarray:
        """[S] tokens that the first `steps` steps take from each source."""
        table = np.zeros((len(self.recipes), len(self.sources)), np.int64)
        for row, recipe in zip(table, self.recipes, strict=True):
            for source, tokens in recipe:
                row[source] += tokens
        counts = np.bincount(self.kinds[: steps * self.batch], minlength=len(self.recipes))
        total: np.ndarray = counts.astype(np.int64) @ table
        return total

    def recipes_of(self, step: int) -> list[Recipe]:
        """Of the `batch` sequences of one step."""
        return [self.recipes[kind] for kind in self.kinds[step * self.batch : (step + 1) * self.batch]]

    def tokens_of(self, domains: Iterable[str]) -> dict[str, int]:
        """Tokens of each domain in the whole training, general data included."""
        total = dict.fromkeys(domains, 0)
        for source, tokens in zip(self.sources, self.consumed(self.steps).tolist(), strict=True):
            total[source.domain] += tokens
        return total


def make_plan(
    shares: Mapping[str, float],
    *,
    steps: int,
    batch: int,
    sequence_length: int,
    general: Mapping[str, float] | None = None,
    general_share: float = 0.0,
) -> Plan:
    """Divide the tokens of a training among domains. shares, general: > 0, each sums to 1.

    Every source gets its share of the tokens to within one token. Most of a source's tokens fill sequences of their
    own; what is left of all sources is packed end to end into a few mixed ones. All kinds of sequences are spread
    evenly over the steps, so that the shares hold at every stage. The general data's sequences stand at
    places that `shares` has no influence on.
    """
    sequences = steps * batch
    general = general or {}
    general_tokens = round(Fraction(general_share) * sequences * sequence_length) if general else 0
    parts = ((general, True, general_tokens), (shares, False, sequences * sequence_length - general_tokens))
    sources: list[Source] = []
    whole: list[list[Recipe]] = []  # of each part
    counts: list[list[int]] = []
    remainders: list[list[tuple[int, int]]] = []
    for part, is_general, total in parts:
        tokens = apportion(total, list(part.values()))
        indices = range(len(sources), len(sources) + len(part))
        sources += [Source(domain, is_general) for domain in part]
        whole.append([((index, sequence_length),) for index in indices])
        counts.append([amount // sequence_length for amount in tokens])
        remainders.append([(i, n % sequence_length) for i, n in zip(indices, tokens, strict=True)])
    mixed = _packed([*remainders[0], *remainders[1]], sequence_length)
    # The mixed sequence that is only partly general stands at a general place, its general tokens first.
    general_mixed = -(-sum(tokens for _, tokens in remainders[0]) // sequence_length)
    recipes: list[Recipe] = []
    orders = []
    for part_whole, part_counts, part_mixed in zip(
        whole, counts, (mixed[:general_mixed], mixed[general_mixed:]), strict=True
    ):
        order = spread([*part_counts, len(part_mixed)])
        order[order == len(part_counts)] += np.arange(
            len(part_mixed)
        )  # each mixed sequence is a kind of its own
        orders.append(order + len(recipes))
        recipes += [*part_whole, *part_mixed]
    places = spread([len(order) for order in orders])
    kinds = np.empty(sequences, np.int32)
    for index, order in enumerate(orders):
        kinds[places == index] = order
    return Plan(steps, batch, sequence_length, tuple(sources), tuple(recipes), kinds)


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """`total` divided by shares > 0, whatever their sum, by largest remainder; ties go to the earlier share."""
    exact = [Fraction(share) for share in shares]
    quotas = [total * share / sum(exact) for share in exact]
    parts = [int(quota) for quota in quotas]
    order = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts


def spread(counts: Sequence[int]) -> np.ndarray:
    """[sum(counts)] kinds 0, 1, ..., each as often as `counts` says, spread evenly.

    The j-th of n of a kind belongs at (j + 1/2) / n of the way. In every beginning, the number of each kind differs
    from its share by less than half the number of kinds, plus one.
    """
    kinds = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts]) if counts else np.empty(0)
    order: np.ndarray = kinds[np.argsort(places, kind="stable")]
    return order


def _packed(pieces: Iterable[tuple[int, int]], length: int) -> list[Recipe]:
    """Pieces (source, tokens) end to end, cut into sequences of `length`, which their sum is a multiple of."""
    recipes: list[Recipe] = []
    current: list[tuple[int, int]] = []
    room = length
    for source, tokens in pieces:
        while tokens:
            taken = min(tokens, room)
            current.append((source, taken))
            tokens -= taken
            room -= taken
            if not room:
                recipes.append(tuple(current))
                current, room = [], length
    assert not current
    return recipes
