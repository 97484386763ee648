"""Studies 8 and 9: how capabilities lie over a triangle of domains, and what the diagnostics of the paper say."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.miniature.corpora import CAPABILITIES, DOMAINS
from benchmarks.miniature.lab import Lab

TRIANGLE = ("math", "code", "prose")


def landscape(lab: Lab) -> dict[str, Any]:
    """Figure 8: every capability over the mixtures of three domains, and where each is highest."""
    cells = lab.protocol.landscape
    experts = lab.experts(lab.base("dense"), "experts dense")
    points = [
        (a / cells, b / cells, (cells - a - b) / cells)
        for a in range(cells + 1)
        for b in range(cells + 1 - a)
    ]
    mixtures = [{n: share for n, share in zip(TRIANGLE, point, strict=True) if share} for point in points]
    scores = lab.score({name: experts[name] for name in TRIANGLE}, mixtures)
    surfaces = {c: [each[c] for each in scores] for c in CAPABILITIES}
    peaks = {c: mixtures[int(np.argmax(values))] for c, values in surfaces.items()}
    return {"triangle": TRIANGLE, "points": points, "surfaces": surfaces, "peaks": peaks}
