from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.preflight.families import Trainer

RATE = 1e-3  # of a sound expert


@dataclass(frozen=True)
class Trained:
    """Experts by domain: sound ones; all at 10 times the rate; of another base; the sound ones with one that diverged.

    data: held-out text of each domain.
    """

    base: str
    sound: dict[str, str]
    hot: dict[str, str]
    of_other_base: dict[str, str]
    diverged: dict[str, str]
    data: dict[str, Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from tests.preflight.families import DOMAINS, Trainer  # imports torch and transformers

    trainer: Trainer = Trainer(tmp_path_factory.mktemp("trained"))
    base = trainer.base("base", 0)
    sound = trainer.family(base, "sound", dict.fromkeys(DOMAINS, RATE))
    other = trainer.base("other", 1, steps=60)
    return Trained(
        base=str(base),
        sound=sound,
        hot=trainer.family(base, "hot", dict.fromkeys(DOMAINS, 10 * RATE)),
        of_other_base=trainer.family(other, "other", dict.fromkeys(DOMAINS[:2], RATE)),
        diverged={**sound, "code": str(trainer.expert(base, "diverged", "code", 100 * RATE))},
        data=trainer.held_out(),
    )
