"""Studies 1 and 2: do merged experts score, and rank, as models trained on the mixture do?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.miniature.corpora import CAPABILITIES, DOMAINS
from benchmarks.miniature.lab import Lab, Shares
from benchmarks.miniature.protocol import CONCENTRATION, REFERENCE_SEEDS
from mergemix.config import RunConfig
from mergemix.rank_stats import rank_agreement
from mergemix.run import run
from mergemix.verify import verify

PAIR = ("math", "code")  # of the dual-capability study
POINTS = 9
HELD_OUT_SEED = 20_260_117  # of the held-out mixtures; no other study draws with it


def dual_capability(lab: Lab) -> dict[str, Any]:
    """Figures 2 and 3: nine mixtures of two domains, merged and trained; curves by capability, and their ranks."""
    base = lab.base("dense")
    experts = lab.experts(base, "experts dense")
    first, second = PAIR
    mixtures = [{first: part, second: 1 - part} for part in np.linspace(0, 1, POINTS).tolist()]
    merged = lab.score({name: experts[name] for name in PAIR}, mixtures)
    trained = _trained(lab, "dense", mixtures, "dual capability")
    capabilities = {}
    for capability in CAPABILITIES:
        proxy = np.array([scores[capability] for scores in merged])
        runs = np.array([[scores[capability] for scores in seeds] for seeds in trained])
        capabilities[capability] = {
            "merged": proxy.tolist(), "trained": runs.tolist(), **rank_agreement(proxy, runs)
        }  # fmt: skip
    return {"pair": PAIR, "share": [shares[first] for shares in mixtures], "capabilities": capabilities}


def rank_consistency(lab: Lab, shape: str, seeds: Sequence[int] = REFERENCE_SEEDS) -> dict[str, Any]:
    """Table 2: a search over the experts, then `mergemix verify` on mixtures that the search was not told of.

    seeds: of the references, each of which is trained once with each.
    """
    search(lab, shape)
    study = lab.root / "studies" / shape
    return {"shape": shape, **verify(study, _references(lab, shape, held_out(lab), seeds))}


def search(lab: Lab, shape: str, name: str = "", **settings: Any) -> dict[str, Any]:
    """The answer of `mergemix run` on the averaged experts of a base.

    name: of the study, by default that of the shape. settings: of RunConfig, beside the protocol's.
    """
    base = lab.base(shape)
    return search_from(lab, name or shape, base, lab.experts(base, f"experts {shape}"), **settings)


def search_from(lab: Lab, name: str, base: Any, experts: Any, **settings: Any) -> dict[str, Any]:
    """The same on other experts; the study is called `name`."""
    config = RunConfig(
        base=str(base),
        experts={domain: str(path) for domain, path in experts.items()},
        bench=(str(lab.bench()),),
        study=lab.root / "studies" / name,
        budget=lab.protocol.budget,
        normalize="minmax",
        engine=lab.protocol.engine,
        **settings,
    )
    return lab.timed(f"search {name}", lambda: run(config))


def held_out(lab: Lab) -> list[dict[str, float]]:
    """Mixtures of the protocol's Dirichlet distribution over all domains, in whole thousandths."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    drawn = rng.dirichlet(np.full(len(DOMAINS), CONCENTRATION), lab.protocol.held_out)
    mixtures = []
    for shares in drawn:
        units = np.floor(shares * 1000).astype(int)
        units[np.argsort(units - shares * 1000)[: 1000 - units.sum()]] += 1
        mixtures.append(dict(zip(DOMAINS, (units / 1000).tolist(), strict=True)))
    return mixtures


def _references(lab: Lab, shape: str, mixtures: Sequence[Shares], seeds: Sequence[int]) -> Any:
    """The file of references that `verify` takes: every mixture, trained once a seed."""
    base = lab.base(shape)
    lines = [
        {
            "mixture": shares,
            "checkpoint": str(
                lab.train(base, shares, lab.protocol.expert, seed=seed, purpose=f"references {shape}")
            ),
            "seed": seed,
        }
        for shares in mixtures
        for seed in seeds
    ]
    path = lab.root / f"references-{shape}-{len(seeds)}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _trained(lab: Lab, shape: str, mixtures: Sequence[Shares], purpose: str) -> list[list[dict[str, float]]]:
    """Scores of models trained on each mixture, by mixture, then by seed."""
    base = lab.base(shape)
    models = {
        f"{number}-{seed}": lab.train(base, shares, lab.protocol.expert, seed=seed, purpose=purpose)
        for number, shares in enumerate(mixtures)
        for seed in REFERENCE_SEEDS
    }
    scores = lab.score_models(models)
    return [[scores[f"{number}-{seed}"] for seed in REFERENCE_SEEDS] for number in range(len(mixtures))]
