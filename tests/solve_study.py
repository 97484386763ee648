"""A stored study whose scores follow known surfaces, for tests of what is decided from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.mixture import Mixture
from mergemix.study import Estimate, ItemRecord, Study

Surface = Callable[[np.ndarray], float]

NAMES = ("math", "code", "web")
TIMINGS = {"swap_s": 0.1, "generate_s": 1.0, "score_s": 0.1, "overhead_s": 0.1}
SURFACES: dict[str, Surface] = {
    # Of shares (math, code, web): math is best at 60% math, code at 90% code, language is web itself.
    "sums": lambda s: 0.7 - (s[0] - 0.6) ** 2 - 0.3 * s[2],
    "mbpp": lambda s: 0.7 - 0.8 * (s[1] - 0.9) ** 2,
    "words": lambda s: 0.3 + 0.4 * s[2],
}
CAPABILITY = {"sums": "math", "mbpp": "code", "words": "language"}


def write_study(
    directory: Path,
    *,
    names: Sequence[str] = NAMES,
    surfaces: Mapping[str, Surface] = SURFACES,
    capability: Mapping[str, str] = CAPABILITY,
    candidates: int = 30,
    items: int = 60,
    noise: float = 0.05,
    seed: int = 0,
    base: bool = True,
    stopped: int = 0,
    identity: Mapping[str, Any] | None = None,
    lower: Sequence[str] = (),
    suite: bool = True,
) -> list[Mixture]:
    """Baselines, `candidates` random mixtures, uniform once more; scores are surface + item difficulty + noise.

    stopped: how many of the last random mixtures answered half of the items only. lower: benchmarks whose scores are
    turned round. Returns the mixtures that were evaluated, the base left out.
    """
    rng = np.random.default_rng(seed)
    difficulty = {name: rng.normal(0, 0.2, items) for name in surfaces}
    difficulty = {name: each - each.mean() for name, each in difficulty.items()}
    about = {
        name: {
            "capability": capability[name],
            "higher_is_better": name not in lower,
            "metric": "accuracy",
            "items": items,
        }
        for name in surfaces
    }
    facts = {"experts": list(names), "utility": "macro", "normalize": "raw", **(identity or {})}
    mixtures = [Mixture.uniform(names), *(Mixture.one_hot(names, name) for name in names)]
    random = [
        Mixture(tuple(names), tuple(int(n) / 10000 for n in rng.multinomial(10000, shares)))
        for shares in rng.dirichlet(np.ones(len(names)), size=candidates)
    ]

    def results(mixture: Mixture, asked: int) -> list[ItemRecord]:
        found = []
        for name, surface in surfaces.items():
            value = surface(np.array(mixture.weights)) + difficulty[name] + rng.normal(0, noise, items)
            sign = -1.0 if name in lower else 1.0
            found += [ItemRecord(name, f"{name}-{i}", sign * float(value[i]), None) for i in range(asked)]
        return found

    with Study.open(directory, facts, {"suite": about} if suite else {}) as study:
        for mixture in [*([Mixture.base_only(names)] if base else []), *mixtures]:
            study.record(mixture, origin="baseline", results=results(mixture, items), timings=TIMINGS)
        for number, mixture in enumerate(random):
            if study.find(mixture) is not None:
                continue
            if number < len(random) - stopped:
                study.record(mixture, origin="random", results=results(mixture, items), timings=TIMINGS)
                continue
            half = results(mixture, items // 2)
            means = {
                name: (float(np.mean([r.score for r in half if r.benchmark == name])), noise)
                for name in surfaces
            }
            estimate = Estimate(float(np.mean([mean for mean, _ in means.values()])), noise, means)
            study.record(
                mixture, origin="random", results=half, timings=TIMINGS, stopped=("clearly worse", estimate)
            )
        study.record(
            mixtures[0], repeat=1, origin="repeat", results=results(mixtures[0], items), timings=TIMINGS
        )
    return [*mixtures, *dict.fromkeys(random)]
