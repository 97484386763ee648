"""Studies 8 and 9: how capabilities lie over a triangle of domains, and what the diagnostics of the paper say."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.miniature.corpora import CAPABILITIES, DOMAINS
from benchmarks.miniature.lab import Lab
from benchmarks.miniature.protocol import SEQUENCE
from mergemix.checkpoints.family import open_family
from mergemix.mixture import Mixture
from mergemix.preflight.curvature import measure_curvature
from mergemix.preflight.models import load_model
from mergemix.preflight.texts import read_texts
from mergemix.preflight.weights import measure_weights

TRIANGLE = ("math", "code", "python")
DOCUMENTS = 64  # of each domain, for gradients and curvature


def landscape(lab: Lab) -> dict[str, Any]:
    """Figure 8: every capability over the mixtures of three domains, and where each is highest."""
    cells = lab.protocol.landscape
    experts = lab.experts(lab.base("dense"), "experts dense")
    points = [
        (a / cells, b / cells, (cells - a - b) / cells)
        for a in range(cells + 1)
        for b in range(cells + 1 - a)
    ]
    mixtures = [
        {name: share for name, share in zip(TRIANGLE, point, strict=True) if share} for point in points
    ]
    scores = lab.score({name: experts[name] for name in TRIANGLE}, mixtures)
    surfaces = {c: [each[c] for each in scores] for c in CAPABILITIES}
    peaks = {c: mixtures[int(np.argmax(values))] for c, values in surfaces.items()}
    return {"triangle": TRIANGLE, "points": points, "surfaces": surfaces, "peaks": peaks}


def matrices(lab: Lab) -> dict[str, Any]:
    """Figure 7: the curvature matrix gamma; cosines of the task vectors, of experts of one seed and averaged."""
    base = lab.base("dense")
    single = lab.experts(base, "experts dense", seeds=(0,))
    averaged = lab.experts(base, "experts dense")
    cosines = {}
    for name, experts in (("one seed", single), ("mean of two seeds", averaged)):
        family = open_family(str(base), {domain: str(path) for domain, path in experts.items()})
        cosines[name] = measure_weights(family).whole.cosines.tolist()
    texts = read_texts(lab.data, base, documents=DOCUMENTS, tokens=SEQUENCE)
    found = measure_curvature(load_model(family, Mixture.base_only(family.names)), texts)
    return {"domains": DOMAINS, "cosines": cosines, "gamma": found.gamma, "gradient_cosines": found.cosines}
