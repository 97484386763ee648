"""Evidence of earlier studies, for a search to begin with: `--warm-start STUDY`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import Outcome
from mergemix.stored import Candidate, StoredEvidence, read_evidence
from mergemix.valuation import Valuation

# What a measurement depends on besides experts and benchmarks.
ENGINE_KEYS = ("engine", "max_model_len", "tensor_parallel", "lora_in_flight")


@dataclass(frozen=True)
class WarmStart:
    """What an earlier study knows of mixtures of our experts.

    candidates: with their mixtures as mixtures of ours. same: measured with these very experts, on these benchmarks, by
    this engine: then it is as good as own evidence, whatever utility that study had. Otherwise, as of experts
    from another checkpoint or scale, it is a hint of the surface.
    """

    candidates: tuple[tuple[Mixture, Candidate], ...]
    same: bool

    def outcomes(self, valuation: Valuation) -> list[tuple[Mixture, Outcome]]:
        """What the search learns; valuation: of the study that begins, which values the same measurements."""
        valued = [
            (mixture, valuation.outcome(each.record, each.items) if self.same else each.outcome)
            for mixture, each in self.candidates
        ]
        return [(mixture, outcome) for mixture, outcome in valued if outcome.utility is not None]

    def digest(self) -> str:
        """Of all that it brings: proposals depend on it, so it is part of a study's identity."""
        content = [
            [mixture.key(), each.record.status, dict(each.record.scores)] for mixture, each in self.candidates
        ]
        return hashlib.sha256(json.dumps([self.same, content], sort_keys=True).encode()).hexdigest()[:16]


def load_warm_start(
    directory: Path, names: Sequence[str], identity: Mapping[str, Any], utility: str, normalize: str
) -> WarmStart:
    """The evidence of the study in `directory` on mixtures of the experts `names`.

    Domains that the earlier study did not have get no share; its mixtures with a share of a domain that is not
    among `names` are left out. identity: of the study that begins. Where its utility does not fit the earlier
    benchmarks, candidates are valued by that study's own. Raises StudyError when there is no such study, ConfigError
    when no mixture is left.
    """
    try:
        evidence = read_evidence(directory, utility=utility, normalize=normalize)
    except ConfigError:
        evidence = read_evidence(directory)
    found = []
    for each in evidence.candidates:
        shares = {name: share for name, share in each.mixture.as_dict().items() if share}
        if set(shares) <= set(names):
            found.append((Mixture(tuple(names), tuple(shares.get(name, 0.0) for name in names)), each))
    if not found:
        raise ConfigError(
            f"--warm-start: a mixture of {', '.join(names)} must have been measured, but {directory} has mixtures of "
            f"{', '.join(evidence.names)}: give another study, or the same names to the same domains"
        )
    return WarmStart(tuple(found), _same(evidence, names, identity))


def _same(evidence: StoredEvidence, names: Sequence[str], identity: Mapping[str, Any]) -> bool:
    """Whether scores of the earlier study are what this one would measure."""
    earlier = evidence.identity

    def asked(of: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in of.items() if key.startswith("benchmark ")}

    shared = [f"expert {name}" for name in names if f"expert {name}" in earlier]
    keys = (*shared, *ENGINE_KEYS)
    return asked(earlier) == asked(identity) and all(earlier.get(key) == identity.get(key) for key in keys)
