"""`mergemix average`: which checkpoints of a run are averaged, what they are called, and how much each counts.

Source: the paper's checkpoint averaging at a constant learning rate, in place of learning-rate decay.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mergemix.errors import ConfigError
from mergemix.merge.scores import read_scores
from mergemix.mixture import Mixture
from mergemix_kernels.weights import MAX_SOURCES


@dataclass(frozen=True)
class Member:
    """A checkpoint of the run. source: as the user wrote it. weight: as given, 1.0 without weights."""

    name: str
    source: str
    weight: float
    score: float | None


@dataclass(frozen=True)
class Selection:
    """taken: what is averaged, in the order given. left_out: the rest, in that order.

    ties: names of all that have the score at which the cut was made, when some of them were taken and some not.
    """

    taken: tuple[Member, ...]
    left_out: tuple[Member, ...]
    ties: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What was taken, with the share of each, and what was not, for programs."""
        shares = self.mixture.weights
        return {
            "checkpoints": [
                {"name": each.name, "source": each.source, "weight": share, "score": each.score}
                for each, share in zip(self.taken, shares, strict=True)
            ],
            "left_out": [
                {"name": each.name, "source": each.source, "score": each.score} for each in self.left_out
            ],
            "ties": list(self.ties),
        }

    @property
    def given(self) -> dict[str, float]:
        return {member.name: member.weight for member in self.taken}

    @property
    def mixture(self) -> Mixture:
        """Over the names of `taken`. Raises ConfigError for weights below 0 or without a positive sum."""
        return Mixture.of([member.name for member in self.taken], self.given)


def select(
    sources: Sequence[str],
    *,
    weights: Sequence[float] | None = None,
    top: int | None = None,
    scores: Path | None = None,
    minimize: bool = False,
) -> Selection:
    """Name the checkpoints, and take all of them, or the `top` best by the file `scores`.

    sources: directories or Hub ids. weights: one per source. Of equal scores the one given first is better.
    Raises ConfigError when numbers do not fit together, a checkpoint is given twice, or a score is missing.
    """
    if len(sources) < 2 or (top is None and len(sources) > MAX_SOURCES):
        raise ConfigError(f"an average takes 2 to {MAX_SOURCES} checkpoints, but got {len(sources)}")
    if weights is not None and len(weights) != len(sources):
        raise ConfigError(
            f"--weights needs one number per checkpoint: {len(sources)} checkpoints, {len(weights)} weights"
        )
    if top is not None and not 1 <= top <= min(len(sources), MAX_SOURCES):
        raise ConfigError(
            f"--top must be from 1 to {min(len(sources), MAX_SOURCES)} for {len(sources)} checkpoints, but is {top}"
        )
    paths = [_path(source) for source in sources]
    names = distinct_names(sources, paths)
    found: Sequence[float | None] = [None] * len(sources)
    if scores is not None:
        found = read_scores(scores, names, paths)
    members = [
        Member(name, source, 1.0 if weights is None else weights[index], found[index])
        for index, (name, source) in enumerate(zip(names, sources, strict=True))
    ]
    if top is None:
        return Selection(tuple(members), (), ())
    return _best(members, top, minimize=minimize)


def _best(members: Sequence[Member], top: int, *, minimize: bool) -> Selection:
    """The `top` best of members, all of which have a score."""
    scores = [math.nan if member.score is None else member.score for member in members]
    order = sorted(range(len(members)), key=lambda index: scores[index] if minimize else -scores[index])
    taken, left_out = sorted(order[:top]), sorted(order[top:])
    cut = scores[order[top - 1]]
    tied = [index for index in range(len(members)) if scores[index] == cut]
    split = any(scores[index] == cut for index in left_out)
    return Selection(
        taken=tuple(members[index] for index in taken),
        left_out=tuple(members[index] for index in left_out),
        ties=tuple(members[index].name for index in tied) if split else (),
    )


def distinct_names(sources: Sequence[str], paths: Sequence[PurePath]) -> list[str]:
    """The shortest ends of the paths that differ: checkpoint-100; where two are equal, run1/checkpoint-100.

    sources: as the user wrote them, for messages. Raises ConfigError for a checkpoint that is given twice, also by
    a link to it.
    """
    seen: dict[str, str] = {}
    for source, path in zip(sources, paths, strict=True):
        place = os.path.realpath(path) if path.is_absolute() else str(path)
        if place in seen:
            raise ConfigError(
                f"{source} is the same checkpoint as {seen[place]}; give each once (--weights lets one count more)"
            )
        seen[place] = source
    depths = [1] * len(paths)
    while True:
        names = [str(PurePath(*path.parts[-depth:])) for path, depth in zip(paths, depths, strict=True)]
        holders: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            holders.setdefault(name, []).append(index)
        equal = [index for group in holders.values() if len(group) > 1 for index in group]
        if not equal:
            return names
        for index in equal:
            depths[index] += 1


def _path(source: str) -> PurePath:
    """The absolute path of a directory; a Hub id's two parts as they are."""
    local = Path(os.path.expanduser(source))
    return PurePath(os.path.abspath(local)) if os.path.isdir(local) else PurePath(source)
