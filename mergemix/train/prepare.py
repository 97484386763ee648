"""All that is decided and checked before the first step: base, corpora, plan, what makes two trainings the same."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.checkpoint import Checkpoint, fingerprint, open_checkpoint
from mergemix.errors import ConfigError
from mergemix.serve.tokens import load_tokenizer
from mergemix.train.config import MAX_WARMUP, TrainConfig
from mergemix.train.corpus import CACHE, Corpus, open_corpus, tokenizer_digest
from mergemix.train.documents import end_token
from mergemix.train.observer import Observer
from mergemix.train.plan import Plan, make_plan

LONGEST_DEFAULT = 2048  # tokens of a sequence, where none is given


@dataclass(frozen=True)
class Prepared:
    """corpora: of the domains that have a share. identity: what two trainings that end in the same weights share."""

    config: TrainConfig
    base: Checkpoint
    corpora: Mapping[str, Corpus]
    plan: Plan
    warmup: int
    identity: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.plan.steps * self.plan.batch * self.plan.sequence_length


def prepare(config: TrainConfig, observer: Observer) -> Prepared:
    """Open the base, tokenise the corpora (once: what a cache beside `out` holds is taken from there), plan the steps.

    Raises CheckpointError, CorpusError, and ConfigError where the base, the data and the configuration do not fit.
    """
    base = open_checkpoint("base", config.base)
    length = _sequence_length(config, base)
    observer.stage("reading the corpora")
    corpora = _open_corpora(config, base, observer)
    shares, general = config.own_shares(), config.general_shares()
    needed = {
        domain: (1 - config.general_share) * shares.get(domain, 0.0)
        + config.general_share * general.get(domain, 0.0)
        for domain in corpora
    }
    per_step = config.batch * length
    if config.tokens is None:
        available = min(len(corpora[domain].tokens) / share for domain, share in needed.items())
        steps = max(1, int(available // per_step))
    else:
        steps = -(-config.tokens // per_step)
    plan = make_plan(
        shares,
        steps=steps,
        batch=config.batch,
        sequence_length=length,
        general=general,
        general_share=config.general_share,
    )
    _check_epochs(config, corpora, plan)
    if config.average_last > steps:
        raise ConfigError(f"average_last must be at most the {steps} steps, but is {config.average_last}")
    warmup = min(MAX_WARMUP, steps // 10) if config.warmup is None else config.warmup
    return Prepared(config, base, corpora, plan, warmup, _identity(config, base, corpora, plan, warmup))


def _sequence_length(config: TrainConfig, base: Checkpoint) -> int:
    text = base.config.get("text_config", base.config)
    most = text.get("max_position_embeddings") or text.get("n_positions")
    if config.sequence_length is None:
        return min(most, LONGEST_DEFAULT) if isinstance(most, int) else LONGEST_DEFAULT
    if isinstance(most, int) and config.sequence_length > most:
        raise ConfigError(
            f"sequence_length must be at most the {most} positions of the base, but is {config.sequence_length}"
        )
    return config.sequence_length


def _open_corpora(config: TrainConfig, base: Checkpoint, observer: Observer) -> dict[str, Corpus]:
    tokenizer = load_tokenizer(base.root)
    key = tokenizer_digest(base.root, end_token(tokenizer))
    cache = Path(os.path.abspath(config.out)).parent / CACHE
    corpora = {}
    for domain in {**config.own_shares(), **config.general_shares()}:

        def progress(done: int, total: int, domain: str = domain) -> None:
            observer.corpus(domain, done, total)

        corpora[domain] = open_corpus(Path(config.data[domain]), tokenizer, key, cache, progress)
    text = base.config.get("text_config", base.config)
    for corpus in corpora.values():
        if isinstance(text.get("vocab_size"), int) and corpus.largest >= text["vocab_size"]:
            raise ConfigError(
                f"the tokenizer gives token {corpus.largest} in {corpus.path}, but the base has only "
                f"{text['vocab_size']}: its tokenizer is another model's"
            )
    return corpora


def _check_epochs(config: TrainConfig, corpora: Mapping[str, Corpus], plan: Plan) -> None:
    """Refuse to repeat a corpus more often than allowed."""
    for domain, tokens in plan.tokens_of(corpora).items():
        there = len(corpora[domain].tokens)
        if tokens > config.max_epochs * there:
            most = math.floor(config.max_epochs * there)
            least = (
                f"; one step alone takes {plan.batch} sequences of {plan.sequence_length} tokens: give a smaller batch "
                "or sequence_length"
            )
            raise ConfigError(
                f"a corpus may be repeated {config.max_epochs:g} times (max_epochs), but {domain} would be "
                f"{tokens / there:.2f} times: {tokens} tokens are asked of it, and it has {there}; ask for at most "
                f"{most} of it with fewer tokens or a smaller share, give more data, or raise max_epochs"
                f"{least if plan.steps == 1 else ''}"
            )


def _identity(
    config: TrainConfig, base: Checkpoint, corpora: Mapping[str, Corpus], plan: Plan, warmup: int
) -> dict[str, Any]:
    return {
        "base": fingerprint(base),
        "data": {domain: corpus.digest for domain, corpus in sorted(corpora.items())},
        "mixture": dict(sorted(config.own_shares().items())),
        "general": dict(sorted(config.general_shares().items())),
        "general_share": config.general_share,
        "steps": plan.steps,
        "batch": plan.batch,
        "sequence_length": plan.sequence_length,
        "learning_rate": config.learning_rate,
        "warmup": warmup,
        "average_last": config.average_last,
        "seed": config.seed,
    }
