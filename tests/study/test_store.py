"""What is put into a study comes back, and belongs to one configuration."""

import sqlite3
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import StudyError
from mergemix.mixture import Mixture
from mergemix.study import Estimate, ItemRecord, Study
from tests.study.answers import IDENTITY, INFO, NAMES, Answer, answers, mixture, open_study, record


def test_a_candidate_comes_back_whole(tmp_path):
    with open_study(tmp_path / "new" / "study") as study:
        given_back = study.record(
            mixture(3333),
            origin="prior",
            results=[Answer("zeta", "z", 1.0, "yes"), Answer("arith", "a", 0.25), Answer("arith", "b", 0.5)],
            timings={"swap": 0.01, "generate": 2},
            proven=True,
        )
    with Study.read(tmp_path / "new" / "study") as study:
        (candidate,) = study.candidates()
        assert candidate == given_back == study.find(mixture(3333))
        assert (candidate.id, candidate.repeat, candidate.origin) == (1, 0, "prior")
        assert candidate.mixture == mixture(3333)
        assert candidate.done
        assert candidate.reason is None
        assert candidate.timings == {"swap": 0.01, "generate": 2.0}
        assert candidate.proven
        assert candidate.scores == {"zeta": 1.0, "arith": 0.375}
        assert study.results(1) == [
            ItemRecord("zeta", "z", 1.0, "yes"),
            ItemRecord("arith", "a", 0.25, None),
            ItemRecord("arith", "b", 0.5, None),
        ]
        assert study.item_evaluations() == 3


@settings(deadline=None, max_examples=20)
@given(
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    scores=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    texts=st.text(),
)
def test_floats_and_texts_survive_exactly(tmp_path_factory, weights, scores, texts):
    candidate = Mixture(tuple(f"ü{i}" for i in range(len(weights))), tuple(weights))
    results = [Answer("b", f"{texts}{i}", score, texts) for i, score in enumerate(scores)]
    with open_study(tmp_path_factory.mktemp("study")) as study:
        try:
            study.record(candidate, origin="cma", results=results, timings={})
        except OverflowError:  # a mean beyond the largest float
            assert study.candidates() == []
            return
        assert study.find(candidate).mixture.weights == candidate.weights
        assert [r.score for r in study.results(1)] == scores
        assert {r.text for r in study.results(1)} == {texts}


def test_candidates_keep_their_order_and_repeats_are_apart(tmp_path):
    with open_study(tmp_path) as study:
        for n in (5, 3, 4):
            record(study, n)
        study.record(mixture(3), repeat=1, origin="cma", results=answers(9), timings={})
        assert [c.id for c in study.candidates()] == [1, 2, 3, 4]
        assert [c.mixture for c in study.candidates()] == [mixture(n) for n in (5, 3, 4, 3)]
        assert study.find(mixture(3)).id == 2
        assert study.find(mixture(3), repeat=1).id == 4
        assert study.find(mixture(3), repeat=2) is None
        assert study.find(mixture(6)) is None


def test_the_base_alone_is_a_candidate_too(tmp_path):
    with open_study(tmp_path) as study:
        base = Mixture.base_only(NAMES)
        study.record(base, origin="base", results=answers(1), timings={})
        assert study.find(base).mixture == base


def test_score_matrices_are_paired_in_suite_order(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 1)
        # A later candidate may answer in another order, or fewer items.
        study.record(mixture(2), origin="cma", results=answers(2)[::-1], timings={})
        study.record(mixture(3), origin="cma", results=answers(3)[:1], timings={})
        matrices = study.score_matrices([3, 1, 2])
        assert list(matrices) == list(dict.fromkeys(answer.benchmark for answer in answers(1)))
        for name, matrix in matrices.items():
            own = [[answer.score for answer in answers(n) if answer.benchmark == name] for n in (3, 1, 2)]
            own[0][1 if name == "zeta" else 0 :] = [np.nan] * (len(own[0]) - (name == "zeta"))
            np.testing.assert_array_equal(matrix, own)
        assert study.score_matrices([])["zeta"].shape == (0, 3)


def test_an_item_without_a_score_keeps_its_reason_and_is_no_zero(tmp_path):
    broken = Answer("zeta", "b", None, "1/0", error="ZeroDivisionError", cut=7, unfinished=1)
    with open_study(tmp_path) as study:
        results = [Answer("zeta", "a", 1.0), broken, Answer("arith", "c", 0.5)]
        given_back = study.record(mixture(1), origin="cma", results=results, timings={})
        assert given_back.scores == {"zeta": 1.0, "arith": 0.5}
        assert study.results(1)[1] == ItemRecord("zeta", "b", None, "1/0", "ZeroDivisionError", 7, 1)
        np.testing.assert_array_equal(study.score_matrices([1])["zeta"], [[1.0, np.nan]])
        for wrong in (replace(broken, error=None), replace(broken, score=1.0)):
            with pytest.raises((ValueError, sqlite3.IntegrityError)):
                study.record(mixture(2), origin="cma", results=[wrong], timings={})
        assert study.find(mixture(2)) is None


def test_a_stopped_candidate_has_an_estimate_and_no_means(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 1)
        stopped = ("worse than candidate 1 after 1 of 6 items", Estimate(0.25, 0.05, {"math": [0.5, 0.1]}))
        given_back = study.record(
            mixture(2), origin="cma", results=answers(2)[3:4], timings={}, stopped=stopped
        )
        assert (given_back.status, given_back.done) == ("stopped", False)
        assert (given_back.reason, given_back.estimate) == stopped
        assert given_back.scores == {}
        study.record_failure(mixture(3), origin="cma", reason="the engine died")
    with open_study(tmp_path) as study:
        assert study.find(mixture(2)) == given_back
        assert study.find(mixture(3)) is None, "a failure that ended the run is tried again"
        assert study.item_evaluations() == 7


def test_what_benchmarks_report_besides_is_kept(tmp_path):
    metrics = {"zeta": {"exact_match,strict": 1 / 3}}
    with open_study(tmp_path) as study:
        study.record(mixture(1), origin="cma", results=answers(1), timings={}, metrics=metrics)
        assert study.find(mixture(1)).metrics == metrics


def test_a_second_result_for_the_same_candidate_is_refused(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 1)
        study.record_failure(mixture(2), origin="cma", reason="out of memory")
        for n in (1, 2):
            with pytest.raises(ValueError, match="has a result already"):
                record(study, n)
            with pytest.raises(ValueError, match="has a result already"):
                study.record_failure(mixture(n), origin="cma", reason="again")
        assert len(study.candidates()) == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused(tmp_path, score):
    with open_study(tmp_path) as study:
        with pytest.raises(ValueError, match="item 'arith-2' of 'arith'"):
            study.record(
                mixture(1),
                origin="cma",
                results=[*answers(1)[:-1], replace(answers(1)[-1], score=score)],
                timings={},
            )
        assert study.candidates() == []
        assert study.item_evaluations() == 0


def test_no_results_and_the_same_item_twice_are_refused_whole(tmp_path):
    with open_study(tmp_path) as study:
        with pytest.raises(ValueError, match="has none"):
            study.record(mixture(1), origin="cma", results=[], timings={})
        with pytest.raises(sqlite3.IntegrityError):
            study.record(mixture(1), origin="cma", results=answers(1) * 2, timings={})
        assert study.candidates() == []
        record(study, 1)  # nothing is left of the refused ones
        assert study.find(mixture(1)).id == 1


def test_a_failure_is_kept_with_its_reason_and_is_final_in_its_run(tmp_path):
    with open_study(tmp_path) as study:
        study.record_failure(mixture(1), origin="cma", reason="the engine died", timings={"swap": 0.5})
        failed = study.find(mixture(1))
        assert (failed.status, failed.reason, failed.done) == ("failed", "the engine died", False)
        assert failed.timings == {"swap": 0.5}
        assert failed.scores == {}
        assert study.results(failed.id) == []


def test_failures_that_a_run_broke_off_with_are_tried_once_by_the_next(tmp_path):
    with open_study(tmp_path) as study:
        study.record_failure(mixture(1), origin="cma", reason="one bad mixture")
        record(study, 2)
        for n in (3, 4):
            study.record_failure(mixture(n), origin="cma", reason="the GPU is full")
    with open_study(tmp_path) as study:
        assert study.find(mixture(1)).reason == "one bad mixture"  # the search went on from it
        assert study.find(mixture(3)) is None
        assert [c.status for c in study.candidates()] == ["failed", "done", "failed", "failed"]
        record(study, 3)
        study.record_failure(mixture(4), origin="cma", reason="still full")
        assert study.find(mixture(3)).id == 3  # in its old place
        assert study.find(mixture(3)).reason is None
        assert study.find(mixture(4)).reason == "still full"
    with open_study(tmp_path) as study:
        assert study.find(mixture(4)) is None  # again nothing done after it
        record(study, 5)
    with open_study(tmp_path) as study:
        assert study.find(mixture(4)).reason == "still full"
    with Study.read(tmp_path) as study:
        assert study.find(mixture(4)).reason == "still full"


def test_the_same_identity_continues_and_info_is_replaced(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 1)
    reordered = dict(reversed(IDENTITY.items()))
    with Study.open(tmp_path, {**reordered, "experts": ("1f", "2e")}, {"budget": 80}) as study:
        assert len(study.candidates()) == 1
        assert study.info == {"budget": 80}
        assert study.identity == IDENTITY


def test_another_identity_is_refused_with_the_differences_listed(tmp_path):
    with open_study(tmp_path) as study:
        record(study, 1)
    other = {**IDENTITY, "seed": 1, "benchmarks": {"arith": "ff"}, "engine": "hf"}
    del other["experts"]
    with pytest.raises(StudyError) as error:
        Study.open(tmp_path, other, {"budget": 1})
    lines = str(error.value).splitlines()
    assert str(tmp_path) in lines[0]
    assert lines[1:-1] == [
        "  seed: the study has 0, this run has 1",
        '  benchmarks: the study has {"arith": "ab12"}, this run has {"arith": "ff"}',
        '  experts: the study has ["1f", "2e"], this run has nothing',
        '  engine: the study has nothing, this run has "hf"',
    ]
    with open_study(tmp_path) as study:  # not locked, not changed
        assert study.identity == IDENTITY
        assert len(study.candidates()) == 1
    with pytest.raises(StudyError):
        Study.open(tmp_path, other, {"budget": 1})
    with Study.read(tmp_path) as study:
        assert study.info == INFO


def test_closing_twice_is_safe(tmp_path):
    study = open_study(tmp_path)
    study.close()
    study.close()
