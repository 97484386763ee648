"""`mergemix design`: mixtures that are worth measuring, for proxies that are trained elsewhere."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.errors import ConfigError, OutputError
from mergemix.mixture import Mixture
from mergemix.search.constraints import Constraints
from mergemix.search.designs import design as lay_out


def design(
    names: Sequence[str],
    *,
    count: int,
    kind: str = "maximin",
    constraints: Constraints | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Up to `count` mixtures of `names` by one of designs.DESIGNS. For programs: {kind constraints mixtures out}.

    out: a CSV file with a row a mixture, an index and the shares, that must not exist. Raises ConfigError for names or
    constraints that make no sense or leave no mixture, OutputError where the file cannot be written.
    """
    if len(names) < 2 or len(set(names)) < len(names) or not all(names):
        raise ConfigError(
            f"a design needs two different domains or more, but got {', '.join(names) or 'none'}"
        )
    constraints = constraints or Constraints()
    region = constraints.region(names)
    prior = None if constraints.prior is None else Mixture.of(names, constraints.prior)
    mixtures = lay_out(kind, region, count, np.random.default_rng(seed), prior=prior)
    if not mixtures:
        raise ConfigError(
            f"no {kind} design of {count} mixtures or fewer lies inside the constraints: take --kind maximin"
        )
    if out is not None:
        _write(out, names, mixtures)
    return {
        "kind": kind,
        "constraints": [bound.text for bound in region.bounds],
        "mixtures": [mixture.as_dict() for mixture in mixtures],
        "out": None if out is None else str(out),
    }


def _write(path: Path, names: Sequence[str], mixtures: Sequence[Mixture]) -> None:
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["index", *names])
            rows.writerows([number, *mixture.weights] for number, mixture in enumerate(mixtures, 1))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; give another --out FILE") from error
