"""Studies 3, 5, 6 and 7: models trained for longer on what each method chose, on items that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from benchmarks.miniature.corpora import CAPABILITIES, DOMAINS
from benchmarks.miniature.lab import Lab, Shares, Yardstick
from benchmarks.miniature.protocol import EXPERT_SEEDS, REFERENCE_SEEDS, Phase
from benchmarks.miniature.ranks import search, search_from
from mergemix.search.surrogates import open_surrogate

# Clusters of domains, as the paper's tree groups data sets.
TREE = {"skills": ["math", "code"], "rest": ["facts", "python", "spam"]}
REGMIX_SAMPLES, REGMIX_TOP = 100_000, 100  # mixtures that RegMix predicts, and the best that it averages


def final_quality(lab: Lab) -> dict[str, Any]:
    """Table 1: uniform, RegMix with as many tokens as the experts cost, MergeMix, and the best of a trained grid."""
    chosen = {
        "uniform": dict.fromkeys(DOMAINS, 1 / len(DOMAINS)),
        "RegMix": regmix(lab),
        "MergeMix": mergemix(lab),
    }
    grid = list(_lattice(lab.protocol.grid))
    models = {
        str(number): lab.train(
            lab.base("dense"), shares, lab.protocol.final, seed=REFERENCE_SEEDS[0], purpose="exhaustive grid"
        )
        for number, shares in enumerate(grid)
    }
    yardstick = _yardstick(lab, "dense", "search")
    utilities = [yardstick.utility(scores) for scores in lab.score_models(models).values()]
    chosen["best of the grid"] = grid[int(np.argmax(utilities))]
    return {
        **_table(lab, "dense", chosen, "final models"),
        "grid": {"models": len(grid), "utilities": utilities},
    }


def cross_scale(lab: Lab) -> dict[str, Any]:
    """Figure 6a: mixtures found with the small model, trained at four times its size."""
    chosen = {
        "uniform": dict.fromkeys(DOMAINS, 1 / len(DOMAINS)),
        "RegMix (small)": regmix(lab),
        "MergeMix (small)": mergemix(lab),
    }
    return _table(lab, "dense-4x", chosen, "final models, 4x")


def dynamic(lab: Lab) -> dict[str, Any]:
    """Figure 6b: the mixture kept to the end, or searched again with experts of the model at half of the training."""
    base, static, phase = lab.base("dense"), mergemix(lab), lab.protocol.final
    half = Phase(phase.steps // 2, phase.learning_rate, phase.warmup)
    rest = Phase(phase.steps - half.steps, phase.learning_rate)
    middles = [
        lab.train(base, static, half, seed=seed, purpose="dynamic, first half") for seed in REFERENCE_SEEDS
    ]
    experts = lab.experts(middles[0], "dynamic, experts", seeds=EXPERT_SEEDS[:1])
    again = search_from(lab, "middle", middles[0], experts)["best"]["mixture"]
    ends = {
        name: [
            lab.train(middle, shares, rest, seed=seed + 100, purpose="dynamic, second half")
            for middle, seed in zip(middles, REFERENCE_SEEDS, strict=True)
        ]
        for name, shares in (("static", static), ("dynamic", again))
    }
    moved = sum(abs(again.get(domain, 0) - static.get(domain, 0)) for domain in DOMAINS) / 2
    table = _scored(lab, "dense", ends)
    return {"moved": moved, "mixtures": {"static": static, "dynamic": again}, "rows": table}


def hierarchy(lab: Lab) -> dict[str, Any]:
    """Table 3: shares across clusters by search or equal, shares inside them by search or equal."""
    path = lab.root / "tree.yaml"
    chosen: dict[str, Shares] = {}
    for order in ("top-down", "bottom-up"):
        path = lab.root / f"tree-{order}.yaml"
        path.write_text(yaml.safe_dump({"order": order, "tree": TREE}, sort_keys=False))
        found = search(lab, "dense", f"tree-{order}", hierarchy=str(path))
        chosen[f"<MergeMix, MergeMix> {order}"] = found["best"]["mixture"]
    top_down = chosen["<MergeMix, MergeMix> top-down"]
    chosen["<MergeMix, uniform>"] = {
        domain: sum(top_down.get(each, 0) for each in members) / len(members)
        for members in TREE.values()
        for domain in members
    }
    chosen["flat MergeMix"] = mergemix(lab)
    return _table(lab, "dense", chosen, "hierarchy, final models")


def mergemix(lab: Lab) -> dict[str, float]:
    """The best mixture of the search on the small dense model."""
    found: dict[str, float] = search(lab, "dense")["best"]["mixture"]
    return found


def regmix(lab: Lab) -> dict[str, float]:
    """RegMix (arXiv 2407.01492) with the tokens that the experts cost: short proxies, LightGBM, the best predicted."""
    protocol = lab.protocol
    spent = len(DOMAINS) * len(EXPERT_SEEDS) * protocol.expert.steps
    phase = Phase(max(1, spent // protocol.proxies), protocol.expert.learning_rate)
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(len(DOMAINS)), protocol.proxies)
    models = {
        str(number): lab.train(
            lab.base("dense"), dict(zip(DOMAINS, shares.tolist(), strict=True)), phase, seed=0,
            purpose="RegMix proxies",
        )
        for number, shares in enumerate(mixtures)
    }  # fmt: skip
    scores = list(lab.score_models(models).values())
    yardstick = Yardstick.of(scores)
    candidates = rng.dirichlet(np.ones(len(DOMAINS)), REGMIX_SAMPLES)
    predicted = np.zeros(len(candidates))
    for capability in CAPABILITIES:
        known = np.array([yardstick.normalized(each)[capability] for each in scores])
        predicted += open_surrogate("lightgbm").fit(mixtures, known).predict(candidates).mean
    best = candidates[np.argsort(predicted)[-REGMIX_TOP:]].mean(axis=0)
    return dict(zip(DOMAINS, best.tolist(), strict=True))


def _table(lab: Lab, shape: str, chosen: Mapping[str, Shares], purpose: str) -> dict[str, Any]:
    """Every chosen mixture trained to the end, once a seed, and scored on the test items."""
    base = lab.base(shape)
    models = {
        name: [
            lab.train(base, shares, lab.protocol.final, seed=seed, purpose=purpose)
            for seed in REFERENCE_SEEDS
        ]
        for name, shares in chosen.items()
    }
    return {
        "mixtures": {name: dict(shares) for name, shares in chosen.items()},
        "rows": _scored(lab, shape, models),
    }


def _scored(lab: Lab, shape: str, models: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """By name the mean over seeds on the test items: nats by capability, utility, and its half range over seeds."""
    yardstick = _yardstick(lab, shape, "test")
    flat = {f"{name} {seed}": path for name, paths in models.items() for seed, path in enumerate(paths)}
    scores = lab.score_models(flat, "test")
    rows = {}
    for name, paths in models.items():
        own = [scores[f"{name} {seed}"] for seed in range(len(paths))]
        utilities = [yardstick.utility(each) for each in own]
        rows[name] = {
            **{capability: float(np.mean([each[capability] for each in own])) for capability in CAPABILITIES},
            "utility": float(np.mean(utilities)),
            "half_range": float(np.ptp(utilities) / 2),
        }
    return rows


def _yardstick(lab: Lab, shape: str, bench: str) -> Yardstick:
    """0 is the base, 1 the best that training on one domain alone reaches within an expert's horizon, by capability."""
    base = lab.base(shape)
    pure = {
        domain: lab.train(
            base, {domain: 1.0}, lab.protocol.expert, seed=EXPERT_SEEDS[0], purpose=f"yardstick {shape}"
        )
        for domain in DOMAINS
    }
    scores = lab.score_models({"base": base, **pure}, bench)
    yardstick = Yardstick.of(scores.values())
    return Yardstick(scores["base"], yardstick.high)


def _lattice(cells: int) -> Iterator[dict[str, float]]:
    """All mixtures of the domains in whole parts of 1 / cells."""

    def parts(left: int, domains: int) -> Iterator[tuple[int, ...]]:
        if domains == 1:
            yield (left,)
            return
        for own in range(left + 1):
            for others in parts(left - own, domains - 1):
                yield (own, *others)

    for units in parts(cells, len(DOMAINS)):
        yield {domain: unit / cells for domain, unit in zip(DOMAINS, units, strict=True) if unit}
