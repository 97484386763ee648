"""Racing and the item budget, and that a run which was broken off decides as one that was not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mergemix.evals.suite import Score, Suite
from mergemix.evals.utility import Utility
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Silent
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Generate, Generated, Output, Request, Swap
from mergemix.study import CandidateRecord, Study
from tests.evals.test_split import Listed

NAMES = ("math", "code")
ITEMS = 400
BASELINES = [Mixture(NAMES, (0.5, 0.5)), Mixture(NAMES, (1.0, 0.0)), Mixture(NAMES, (0.0, 1.0))]
# The share of the first expert is the chance to be right: the worst, one like the best baseline, one better.
SEARCHED = [Mixture(NAMES, (share, 1 - share)) for share in (0.05, 0.97, 0.1, 0.55, 0.9, 0.02)]


class Chance(Engine):
    """Stands in for an engine: right on an item with a chance that is the first expert's share. Repeats itself."""

    kind = "stand-in"

    def __init__(self) -> None:
        self.proven = True
        self.asked: list[int] = []

    def apply(self, mixture: Mixture) -> Swap:
        self._mixture = mixture
        self.asked.append(0)
        return Swap(0.0, 0)

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        self.asked[-1] += len(requests)
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        pass

    def _answer(self, request: Request) -> Output:
        assert isinstance(request, Generate)
        draw = hashlib.sha256(f"{request.prompt} {self._mixture.key()}".encode()).digest()
        right = int.from_bytes(draw[:4], "little") / 2**32 < 0.1 + 0.8 * self._mixture.weights[0]
        return Generated(str(request.prompt) if right else "wrong", 1)


class Better(Listed):
    higher_is_better = True


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite([Better(name, [f"{name} {i}" for i in range(ITEMS // 2)]) for name in ("a", "b")])


def search(
    directory: Path,
    suite: Suite,
    *,
    race: bool = True,
    item_budget: int | None = None,
    break_off: int | None = None,
    engine: Chance | None = None,
) -> tuple[list[CandidateRecord], Evidence]:
    """Baselines, then what is searched, in two batches. break_off: after so many candidates of the search."""
    engine = engine or Chance()
    with Study.open(directory, {}, {}) as study, LocalEvaluator(lambda: engine) as pool:
        evidence = Evidence(study, suite, pool, Silent(), expected=9, item_budget=item_budget)
        evidence.utility = Utility({"a": 0.5, "b": 0.5}, 0.0)
        evidence.collect(BASELINES, origin="baseline")
        if race:
            evidence.race(seed=3)
        found = []
        for batch in (SEARCHED[:4], SEARCHED[4:]):
            wanted = batch if break_off is None else batch[: max(break_off - len(found), 0)]
            found += evidence.collect(wanted, origin="search", searched=True)
        return found, evidence


def test_clearly_worse_candidates_stop_early_and_good_ones_do_not(tmp_path: Path, suite: Suite) -> None:
    engine = Chance()
    found, evidence = search(tmp_path, suite, engine=engine)
    assert engine.asked[:3] == [ITEMS] * 3, "baselines answer everything"
    by_share = {record.mixture.weights[0]: record for record in found}
    for share in (0.05, 0.1, 0.02):
        record = by_share[share]
        assert record.status == "stopped"
        assert record.items == engine.asked[3 + SEARCHED.index(record.mixture)] < ITEMS / 4
        assert record.estimate is not None
        assert abs(record.estimate.utility - (0.1 + 0.8 * share)) < 0.25
        assert 0 < record.estimate.stderr < 0.25
        assert evidence.score_of(record) == record.estimate.utility
        assert evidence.utility_of(record) is None
        assert f"after {record.items} of {ITEMS} items" in (record.reason or "")
    assert by_share[0.97].done
    assert by_share[0.97].items == ITEMS
    assert by_share[0.9].items > by_share[0.02].items, "a little worse takes longer to be seen"
    with Study.read(tmp_path) as study:
        assert study.item_evaluations() == sum(engine.asked)


def test_an_interrupted_run_decides_as_one_that_was_not(tmp_path: Path, suite: Suite) -> None:
    whole, _ = search(tmp_path / "whole", suite)
    for broken_at in range(1, len(SEARCHED)):
        search(tmp_path / f"{broken_at}", suite, break_off=broken_at)
        engine = Chance()
        again, evidence = search(tmp_path / f"{broken_at}", suite, engine=engine)
        assert len(engine.asked) == len(SEARCHED) - broken_at, "what is stored is not paid for again"
        assert [evidence.score_of(r) for r in again] == [evidence.score_of(r) for r in whole]
        assert [(r.status, r.items, r.reason) for r in again] == [
            (r.status, r.items, r.reason) for r in whole
        ]


def test_without_a_race_everybody_answers_everything(tmp_path: Path, suite: Suite) -> None:
    found, _ = search(tmp_path, suite, race=False)
    assert [record.items for record in found] == [ITEMS] * len(SEARCHED)
    with Study.read(tmp_path) as study:
        for record in found:
            scores = suite.item_scores(study.results(record.id))
            assert all(np.isfinite(values).all() for values in scores.values())


def test_full_results_are_the_same_whatever_the_blocks(tmp_path: Path, suite: Suite) -> None:
    raced, _ = search(tmp_path / "raced", suite)
    plain, _ = search(tmp_path / "plain", suite, race=False)
    with Study.read(tmp_path / "raced") as one, Study.read(tmp_path / "plain") as other:
        for a, b in zip(raced, plain, strict=True):
            if a.done:
                assert one.results(a.id) == other.results(b.id)
                assert a.scores == b.scores


def test_the_item_budget_ends_the_search_also_after_a_resume(tmp_path: Path, suite: Suite) -> None:
    budget = 3 * ITEMS + 10
    for _ in range(2):
        found, evidence = search(tmp_path, suite, item_budget=budget)
        assert len(found) == 1, "the first candidate of the search uses up what is left"
        spent = 3 * ITEMS + found[0].items
        assert evidence.stop() == {"item_budget": f"the item budget is used up: {spent} of {budget} items"}
    found, evidence = search(tmp_path, suite, item_budget=100 * ITEMS)
    assert len(found) == len(SEARCHED)
    assert evidence.stop() == {}


class Broken(Better):
    """Its grader fails on every item."""

    def score(self, index: int, outputs: list[Output]) -> Score:
        raise ZeroDivisionError("in the grader")


@pytest.mark.parametrize("race", [False, True])
def test_a_benchmark_that_cannot_be_scored_at_all_fails_the_candidate_with_its_reason(
    tmp_path: Path, race: bool
) -> None:
    suite = Suite([Better("a", [f"a {i}" for i in range(200)]), Broken("b", ["b 1", "b 2"])])
    found, evidence = search(tmp_path, suite, race=race)
    assert {record.status for record in found} == {"failed"}
    assert found[0].reason == (
        "no item of b could be scored, the first one because of ZeroDivisionError: in the grader"
    )
    assert [evidence.score_of(record) for record in found] == [None] * len(found)
