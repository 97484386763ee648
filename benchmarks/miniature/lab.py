"""What every study needs: corpora and benchmarks on disk, models trained once, mixtures scored once, what each cost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.miniature.bases import write_random
from benchmarks.miniature.corpora import CAPABILITIES, DOMAINS, Item, make_corpora
from benchmarks.miniature.protocol import (
    AVERAGED,
    BATCH,
    EXPERT_SEEDS,
    GENERAL,
    GENERAL_SHARE,
    SEQUENCE,
    Phase,
    Protocol,
)
from mergemix.checkpoints.family import open_family
from mergemix.evals.benchmark import Context, load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Silent
from mergemix.merge.average import select
from mergemix.merge.request import average_request
from mergemix.mixture import Mixture
from mergemix.serve import open_engine, resolve_kind
from mergemix.serve.engine import EngineSpec
from mergemix.study import Study
from mergemix.train import TrainConfig, train

MEMORY = 1 << 28
Shares = Mapping[str, float]
Scores = Mapping[str, float]  # by capability: mean log-probability of an item's answer, nats


@dataclass(frozen=True)
class Yardstick:
    """Scores of a capability are measured between the worst (0) and the best (1) of some references."""

    low: Scores
    high: Scores

    @classmethod
    def of(cls, references: Iterable[Scores]) -> Yardstick:
        known = list(references)
        return cls(
            {c: min(each[c] for each in known) for c in CAPABILITIES},
            {c: max(each[c] for each in known) for c in CAPABILITIES},
        )

    def normalized(self, scores: Scores) -> dict[str, float]:
        return {c: (scores[c] - self.low[c]) / (self.high[c] - self.low[c]) for c in CAPABILITIES}

    def utility(self, scores: Scores) -> float:
        """Mean over capabilities."""
        return float(np.mean(list(self.normalized(scores).values())))


class Lab:
    """One directory; everything in it is made once, and reused when the same is asked again.

    protocol: the numbers. say: receives a line for every step. ledger: for each purpose the tokens trained on and the
    seconds that took, reused ones with what they took when they were made.
    """

    def __init__(self, root: Path, protocol: Protocol, say: Callable[[str], None]) -> None:
        self.root = root
        self.protocol = protocol
        self.say = say
        self.ledger: dict[str, dict[str, float]] = {}
        self._counted: set[tuple[str, Path]] = set()
        self.models.mkdir(parents=True, exist_ok=True)

    @property
    def models(self) -> Path:
        return self.root / "models"

    @cached_property
    def data(self) -> dict[str, Path]:
        """The corpus of every domain; writes the benchmarks, too."""
        protocol = self.protocol
        made = make_corpora(0, documents=protocol.documents, items=protocol.items, people=protocol.people)
        paths = {}
        for domain in DOMAINS:
            paths[domain] = self.root / "corpora" / f"{domain}.jsonl"
            _write(paths[domain], ({"text": text} for text in made.documents[domain]))
        for name, items in (("search", made.search), ("test", made.test)):
            for capability in CAPABILITIES:
                _write_benchmark(self.root / "benchmarks" / name, capability, items[capability])
        return paths

    def bench(self, name: str = "search") -> Path:
        """The directory of the benchmarks: `search`, or `test` with other items."""
        assert self.data
        return self.root / "benchmarks" / name

    def base(self, shape: str) -> Path:
        """Trained from scratch on general data; every phase at a constant learning rate."""
        about = self.protocol.shapes[shape]
        path = write_random(self.models / f"random-{shape}-{_digest(repr(about))}", about, seed=0)
        for phase in self.protocol.base:
            path = self.train(path, GENERAL, phase, seed=99, purpose=f"base {shape}", general=False)
        return path

    def train(
        self, start: Path, shares: Shares, phase: Phase, *, seed: int, purpose: str, general: bool = True
    ) -> Path:
        """A model trained from `start` on `shares`; where `general`, the protocol's part of it is general data.

        Then it is also the mean of its last weights, as a model that is used is; a base is trained on.
        """
        shares = {domain: round(float(share), 6) for domain, share in sorted(shares.items()) if share > 0}
        average = max(1, round(AVERAGED * phase.steps)) if general else 1
        what = [start.name, shares, phase.steps, phase.learning_rate, phase.warmup, average, seed, general]
        out = self.models / _digest(what)
        if not out.exists():
            told = ", ".join(f"{domain} {share:.2f}" for domain, share in shares.items())
            self.say(f"{purpose}: {phase.steps} steps on {told} (seed {seed})")
        record = train(
            TrainConfig(
                base=str(start),
                data=self.data,
                mixture=shares,
                out=out,
                tokens=phase.steps * BATCH * SEQUENCE,
                sequence_length=SEQUENCE,
                batch=BATCH,
                learning_rate=phase.learning_rate,
                warmup=phase.warmup,
                average_last=average,
                general=GENERAL if general else {},
                general_share=GENERAL_SHARE if general else 0.0,
                seed=seed,
                save_every=10**6,
                max_epochs=1000,
            )
        )
        self._spend(purpose, out, record)
        return out

    def experts(self, start: Path, purpose: str, seeds: Sequence[int] = EXPERT_SEEDS) -> dict[str, Path]:
        """One expert a domain, its weights the mean over `seeds`."""
        return {
            domain: self.mean([
                self.train(start, {domain: 1.0}, self.protocol.expert, seed=seed, purpose=purpose) for seed in seeds
            ])
            for domain in DOMAINS
        }  # fmt: skip

    def mean(self, checkpoints: Sequence[Path]) -> Path:
        """The checkpoint of their mean weights."""
        if len(checkpoints) == 1:
            return checkpoints[0]
        out = self.models / "-".join(path.name[:8] for path in checkpoints)
        if not out.exists():
            chosen = select(
                [str(path) for path in checkpoints], weights=None, top=None, scores=None, minimize=False
            )
            average_request(chosen, out=out, memory_bytes=MEMORY, download=False).run(lambda done: None)
        return out

    def score(
        self, experts: Mapping[str, Path], mixtures: Sequence[Shares], bench: str = "search"
    ) -> list[dict[str, float]]:
        """Scores by capability of merges of the experts, in their order; each is paid for once."""
        family = open_family(None, {name: str(path) for name, path in experts.items()})
        wanted = [Mixture.of(family.names, shares) for shares in mixtures]
        identity = {"experts": {name: path.name for name, path in experts.items()}, "bench": bench}
        kind = resolve_kind(self.protocol.engine)
        context = Context(root=family.template.root, engine=kind)
        suite = Suite(load_benchmarks((str(self.bench(bench)),), context))
        key = _digest([identity, kind])
        directory = self.root / "scores" / key
        directory.mkdir(parents=True, exist_ok=True)
        spec = EngineSpec(family, kind, 0, log=directory / "engine.log")
        with (
            Study.open(directory, identity, {}) as study,
            LocalEvaluator(lambda: open_engine(spec, Mixture.uniform(family.names))) as pool,
        ):
            evidence = Evidence(study, suite, pool, Silent(), expected=len(wanted))
            records = evidence.collect(wanted, origin="study")
        failed = [record.reason for record in records if record.status == "failed"]
        if failed:
            raise RuntimeError(f"a mixture could not be scored: {failed[0]}")
        return [dict(record.scores) for record in records]

    def score_models(self, models: Mapping[str, Path], bench: str = "search") -> dict[str, dict[str, float]]:
        """Scores by capability of models as they are."""
        scores = self.score(models, [{name: 1.0} for name in models], bench)
        return dict(zip(models, scores, strict=True))

    def timed(self, name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `call` returns; made once. Its seconds are entered under `name`."""
        path = self.root / "timed" / f"{_digest(name)}.json"
        if not path.is_file():
            self.say(name)
            begin = time.perf_counter()
            result = call()
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"seconds": time.perf_counter() - begin, "result": result}))
        made: dict[str, Any] = json.loads(path.read_text())
        self.ledger[name] = {"models": 0, "tokens": 0, "seconds": made["seconds"]}
        result = made["result"]
        return result

    def _spend(self, purpose: str, out: Path, record: Mapping[str, Any]) -> None:
        if (purpose, out) in self._counted:
            return
        self._counted.add((purpose, out))
        entry = self.ledger.setdefault(purpose, {"models": 0, "tokens": 0, "seconds": 0.0})
        entry["models"] += 1
        entry["tokens"] += (
            sum(record["tokens"].values()) if isinstance(record["tokens"], dict) else record["tokens"]
        )
        entry["seconds"] += record["seconds"]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _write_benchmark(directory: Path, capability: str, items: Sequence[Item]) -> None:
    records = (
        {"id": f"{capability}-{number}", "prompt": item.prompt, "answer": item.answer}
        for number, item in enumerate(items)
    )
    _write(directory / f"{capability}.jsonl", records)
    benchmark = {
        "name": capability,
        "capability": capability,
        "items": f"{capability}.jsonl",
        "prompt": "{{ prompt }}",
        "answer": "{{ answer }}",
        "delimiter": "",
        "metric": "loglikelihood",
    }
    (directory / f"{capability}.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))


def _write(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    if not path.is_file() or path.read_text() != text:  # a file that is touched is tokenised again
        path.write_text(text)
