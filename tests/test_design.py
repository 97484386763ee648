"""`mergemix design`: mixtures to measure, as a table, JSON and CSV."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergemix.config import DESIGNS
from mergemix.mixture import Mixture
from mergemix.search import designs
from mergemix.search.constraints import Constraints
from tests.command_line import Invoke, refused

NAMES = ("math", "code", "web", "sft")
LIMITED = Constraints(max={"web": 0.4}, min={"math": 0.1}, prior=dict.fromkeys(NAMES, 0.25), kl_limit=0.6)


def test_the_names_are_those_of_the_search() -> None:
    assert designs.DESIGNS == DESIGNS


@pytest.mark.parametrize("kind", DESIGNS)
def test_every_kind_is_inside_distinct_and_new(kind: str) -> None:
    region = LIMITED.region(NAMES)
    existing = region.start_points(None)
    found = designs.design(kind, region, 12, np.random.default_rng(0), existing=existing)
    assert len(set(found)) == len(found) <= 12
    assert not set(found) & set(existing)
    assert all(region.contains(mixture) for mixture in found)
    if kind not in ("lattice", "vertices"):
        assert len(found) == 12


def test_a_dirichlet_design_is_centred_on_the_prior() -> None:
    prior = Mixture(NAMES, (0.7, 0.1, 0.1, 0.1))
    region = Constraints().region(NAMES)
    found = designs.design("dirichlet", region, 400, np.random.default_rng(0), prior=prior)
    np.testing.assert_allclose(np.mean([m.weights for m in found], axis=0), prior.weights, atol=0.05)


def test_the_command_writes_what_fit_reads(tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "mixtures.csv"
    arguments = ("design", "--domain", "math,code", "--domain", "web", "--count", "20", "--max", "web=0.5")
    code, printed, err = invoke(*arguments, "--out", out, "--json")
    assert code == 0, err
    mixtures = json.loads(printed)["mixtures"]
    assert len(mixtures) == 20
    assert all(mixture["web"] <= 0.5 for mixture in mixtures)
    scores = tmp_path / "scores.csv"
    rows = [f"{n},{-((m['math'] - 0.6) ** 2) - (m['web'] - 0.2) ** 2}" for n, m in enumerate(mixtures, 1)]
    scores.write_text("\n".join(["index,score", *rows]) + "\n")
    code, printed, err = invoke("fit", "--mixtures", out, "--scores", scores, "--surrogate", "gp", "--json")
    assert code == 0, err
    assert json.loads(printed)["optimum"]["mixture"]["math"] == pytest.approx(0.6, abs=0.05)
    refused(invoke(*arguments, "--out", out), 1, "cannot write")
    code, printed, err = invoke(*arguments)
    assert code == 0, err
    assert "20 mixtures (maximin)" in printed


def test_what_makes_no_design_is_refused(invoke: Invoke) -> None:
    refused(invoke("design", "--domain", "math", "--count", "3"), 1, "two different domains")
    refused(invoke("design", "--domain", "a,b,a", "--count", "3"), 1, "two different domains")
    refused(invoke("design", "--domain", "a,b", "--count", "3", "--min", "a=0.7,b=0.4"), 1, "a", "b")
    refused(invoke("design", "--domain", "a,b", "--count", "3", "--kind", "best"), 2, "--kind")
