"""What training.json says of a training: enough to make it again, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from mergemix import __version__
from mergemix.train.prepare import Prepared
from mergemix.train.states import Progress

CURVE_POINTS = 200


def make_record(prepared: Prepared, progress: Progress, parameters: int, accelerator: Any) -> dict[str, Any]:
    """Losses are nats a learned token: first_loss and last_loss are means over the first and the last tenth of the
    steps, `losses` the mean of each of at most 200 equal stretches, with the step it ends at; all of the weights as
    they were then, not of their mean.
    """
    config, plan, corpora = prepared.config, prepared.plan, prepared.corpora
    tokens = plan.tokens_of(corpora)
    general = dict.fromkeys(corpora, 0)
    for source, count in zip(plan.sources, plan.consumed(plan.steps).tolist(), strict=True):
        if source.general:
            general[source.domain] += count
    edge = max(1, plan.steps // 10)
    return {
        "mergemix": __version__,
        "out": str(config.out),
        "base": {"source": config.base, "revision": prepared.base.revision},
        "mixture": {"given": dict(config.mixture), "used": config.own_shares()},
        "general": {
            "share": config.general_share,
            "given": dict(config.general),
            "used": config.general_shares(),
        },
        "tokens": prepared.tokens,
        "tokens_asked_for": config.tokens,
        "steps": plan.steps,
        "batch": plan.batch,
        "sequence_length": plan.sequence_length,
        "learning_rate": config.learning_rate,
        "warmup": prepared.warmup,
        "average_last": config.average_last,
        "seed": config.seed,
        "domains": {
            domain: {
                "file": str(corpus.path),
                "sha256": corpus.digest,
                "documents": corpus.documents,
                "corpus_tokens": len(corpus.tokens),
                "tokens": tokens[domain],
                "general_tokens": general[domain],
                "share": tokens[domain] / prepared.tokens,
                "epochs": tokens[domain] / len(corpus.tokens),
            }
            for domain, corpus in corpora.items()
        },
        "parameters": parameters,
        "first_loss": _mean(progress.losses[:edge]),
        "last_loss": _mean(progress.losses[-edge:]),
        "losses": _curve(progress.losses),
        "seconds": progress.seconds,
        "tokens_per_s": prepared.tokens / progress.seconds,
        "resumed_at": progress.resumed_at,
        "reused": False,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")},
        "identity": prepared.identity,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    ends = sorted({-(-len(losses) * i // CURVE_POINTS) for i in range(1, CURVE_POINTS + 1)} - {0})
    return [(end, _mean(losses[begin:end])) for begin, end in zip([0, *ends], ends, strict=False)]
