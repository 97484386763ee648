"""The paper in miniature (arXiv 2601.17858): every study with this tool, its results beside the paper's.

Everything is kept in --work: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import conditions
from benchmarks.miniature.diagnostics import landscape, matrices
from benchmarks.miniature.lab import Lab
from benchmarks.miniature.protocol import MORE_SEEDS, REFERENCE_SEEDS, SCALES
from benchmarks.miniature.quality import cross_scale, dynamic, final_quality, hierarchy
from benchmarks.miniature.ranks import dual_capability, rank_consistency
from benchmarks.miniature.tables import misses, page

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "scipy", "lightgbm")
STUDIES: dict[str, Callable[[Lab], Any]] = {
    "dual": dual_capability,
    "ranks": lambda lab: [rank_consistency(lab, shape) for shape in ("dense", "moe")],
    "more seeds": lambda lab: rank_consistency(lab, "dense", REFERENCE_SEEDS + MORE_SEEDS),
    "quality": final_quality,
    "scale": cross_scale,
    "dynamic": dynamic,
    "hierarchy": hierarchy,
    "landscape": landscape,
    "matrices": matrices,
}


def reproduce(work: Path, scale: str, say: Callable[[str], None]) -> dict[str, Any]:
    """All studies; JSON values. seconds: of this call, those of models trained before not among them."""
    begin = time.perf_counter()
    lab = Lab(work, SCALES[scale], say)
    results: dict[str, Any] = {"scale_name": scale, "protocol": asdict(lab.protocol), "studies_s": {}}
    for name, study in STUDIES.items():
        say(f"== {name}")
        started = time.perf_counter()
        results[name] = study(lab)
        results["studies_s"][name] = time.perf_counter() - started
    results["ledger"] = lab.ledger
    results["seconds"] = time.perf_counter() - begin
    results["conditions"] = conditions(PACKAGES)
    return results


def write(results: dict[str, Any], out: Path) -> None:
    """results.json, README.md and the figures."""
    from benchmarks.miniature.figures import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "README.md").write_text(page(results))
    draw(results, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--work", type=Path, default=Path("mergemix-reproduce"), help="directory for models and scores"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    options = parser.parse_args()
    begin = time.perf_counter()
    results = reproduce(
        options.work,
        options.scale,
        lambda line: print(f"{time.perf_counter() - begin:6.0f} s  {line}", flush=True),
    )
    write(results, options.out)
    print(json.dumps({"out": str(options.out), "missed": misses(results)}))


if __name__ == "__main__":
    main()
