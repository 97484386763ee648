import dataclasses
import math
import random
import re
from typing import Any

import numpy as np
import pytest

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.benchmark import Benchmark
from mergemix.evals.code import UnitTests
from mergemix.evals.extract import Boxed
from mergemix.evals.forms import ChoiceLikelihood, Generation, ReferenceText, Sampling
from mergemix.evals.graders import Choice, Contains, Exact
from mergemix.evals.items import Item
from mergemix.evals.suite import Batch, ItemResult, Suite, benchmark_scores
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output


def item(identity: str, *choices: str) -> Item:
    continuations = tuple(f" {text}" for text in choices or ("yes",))
    return Item(identity, f"{identity}?", ("yes",), choices, continuations)


FORM = Generation(Exact(), max_tokens=4, stop=("\n",))
GENERATED = Benchmark("words", "language", FORM, (item("a"), item("b")), "words.yaml")
CHOSEN = dataclasses.replace(
    GENERATED,
    name="chosen",
    form=ChoiceLikelihood(),
    items=(item("a", "no", "yes", "maybe"), item("c", "yes", "no")),
)
LIKELY = dataclasses.replace(GENERATED, name="likely", capability="text", form=ReferenceText("loglikelihood"))
ALL = [GENERATED, CHOSEN, LIKELY]


def likelihoods(*logprobs: float) -> list[Output]:
    return [Likelihood(logprob, 1, False) for logprob in logprobs]


REQUESTS = [
    LogLikelihood("a?", " no"),
    LogLikelihood("a?", " yes"),
    LogLikelihood("a?", " maybe"),
    LogLikelihood("c?", " yes"),
    LogLikelihood("c?", " no"),
    LogLikelihood("a?", " yes"),
    LogLikelihood("b?", " yes"),
    Generate("a?", 4, ("\n",)),
    Generate("b?", 4, ("\n",)),
]
OUTPUTS: list[Output] = [
    *likelihoods(-3, -1, -2, -5, -4),
    *likelihoods(-7, -0.5),
    Generated("yes", 1),
    Generated("no", 1),
]
RESULTS = [
    ItemResult("chosen", "a", 1.0, "yes"),
    ItemResult("chosen", "c", 0.0, "no"),
    ItemResult("likely", "a", -7.0, None),
    ItemResult("likely", "b", -0.5, None),
    ItemResult("words", "a", 1.0, "yes"),
    ItemResult("words", "b", 0.0, "no"),
]


def answers(batch: Batch, outputs: list[Output] = OUTPUTS) -> list[tuple[int, Output]]:
    """What an engine gives: `outputs` stand in the order of REQUESTS, equal requests in the order of the batch."""
    waiting = list(zip(REQUESTS, outputs, strict=True))
    given = []
    for index, request in enumerate(batch.requests):
        place = next(n for n, (asked, _) in enumerate(waiting) if asked == request)
        given.append((index, waiting.pop(place)[1]))
    return given


def test_one_flat_batch_and_its_scores() -> None:
    suite = Suite(ALL)
    batch = suite.batch()
    assert sorted(batch.requests, key=repr) == sorted(REQUESTS, key=repr)
    assert all(isinstance(request, Generate) for request in batch.requests[:2]), "the longest first"
    assert suite.batch() is batch
    assert batch.grade(answers(batch)) == RESULTS
    assert batch.grade(answers(batch)[::-1]) == RESULTS
    assert benchmark_scores(RESULTS) == {"chosen": 0.5, "likely": -3.75, "words": 0.5}
    assert suite.num_items == 6
    assert suite.item_counts == {"chosen": 2, "likely": 2, "words": 2}
    assert suite.capabilities == {"language": ["chosen", "words"], "text": ["likely"]}


def test_a_batch_of_some_items() -> None:
    batch = Suite(ALL).batch([3, 1])
    assert set(batch.requests) == {LogLikelihood("b?", " yes"), *REQUESTS[3:5]}
    outputs = {REQUESTS[3]: OUTPUTS[3], REQUESTS[4]: OUTPUTS[4], REQUESTS[6]: OUTPUTS[6]}
    graded = batch.grade((index, outputs[request]) for index, request in enumerate(batch.requests))
    assert graded == [RESULTS[3], RESULTS[1]]


def test_directions_come_from_the_metric() -> None:
    lower = dataclasses.replace(LIKELY, form=ReferenceText("perplexity"))
    assert Suite([GENERATED, CHOSEN, lower]).directions == {"chosen": 1, "likely": -1, "words": 1}


def test_what_benchmarks_report_besides_means() -> None:
    items = tuple(
        dataclasses.replace(entry, num_bytes=size) for entry, size in zip(LIKELY.items, (1, 3), strict=True)
    )
    likely = dataclasses.replace(LIKELY, items=items, form=ReferenceText("bits_per_byte"))
    suite = Suite([GENERATED, likely])
    results = [ItemResult("likely", "a", 4.0), ItemResult("likely", "b", 8.0), *RESULTS[4:]]
    assert suite.report(results) == {"likely": {"bits_per_byte of all text": 7.0}}


def test_a_grader_that_raises_is_an_error_of_the_item() -> None:
    @dataclasses.dataclass(frozen=True)
    class Broken(Exact):
        def __call__(self, text: str, reference: str) -> bool:
            raise ZeroDivisionError("division by zero")

    form = dataclasses.replace(FORM, grader=Broken())
    batch = Suite([dataclasses.replace(GENERATED, form=form)]).batch()
    results = batch.grade([(0, Generated("yes", 1)), (1, Generated("no", 1))])
    assert results[0] == ItemResult("words", "a", None, None, "ZeroDivisionError: division by zero")
    assert benchmark_scores(results) == {}
    assert np.isnan(Suite([GENERATED]).item_scores(results)["words"]).all()


def test_a_score_that_is_no_finite_number_is_an_error_of_the_item() -> None:
    batch = Suite([dataclasses.replace(LIKELY, form=ReferenceText("perplexity"))]).batch()
    first, second = batch.grade([(0, Likelihood(-1e9, 1, False)), (1, Likelihood(-1.0, 1, False))])
    assert first.score is None
    assert first.error == "OverflowError: math range error"
    assert second.score == math.e


def test_what_was_cut_and_not_finished_is_counted() -> None:
    batch = Suite([GENERATED]).batch()
    outputs = [(0, Generated("yes", 4, finished=False, cut=3)), (1, Generated("yes", 2))]
    first, second = batch.grade(outputs)
    assert (first.cut, first.unfinished) == (3, 1)
    assert (second.cut, second.unfinished) == (0, 0)


def test_the_order_of_the_benchmarks_changes_nothing() -> None:
    suite, reversed_suite = Suite(ALL), Suite(ALL[::-1])
    assert suite.batch().requests == reversed_suite.batch().requests
    assert suite.fingerprint() == reversed_suite.fingerprint()
    assert list(suite.capabilities) == list(reversed_suite.capabilities)


def test_item_scores_stand_in_suite_order_whatever_order_they_were_stored_in() -> None:
    shuffled = random.Random(0).sample(RESULTS, len(RESULTS))
    scores = Suite(ALL).item_scores(shuffled)
    assert list(scores) == ["chosen", "likely", "words"]
    for name, expected in {"chosen": [1.0, 0.0], "likely": [-7.0, -0.5], "words": [1.0, 0.0]}.items():
        np.testing.assert_array_equal(scores[name], expected)


def test_items_without_a_score_are_nan() -> None:
    results = [*RESULTS[1:5], ItemResult("words", "b", None, error="lost")]
    scores = Suite(ALL).item_scores(results)
    np.testing.assert_array_equal(scores["chosen"], [np.nan, 0.0])
    np.testing.assert_array_equal(scores["words"], [1.0, np.nan])


def test_the_same_id_in_two_benchmarks_is_two_items() -> None:
    results = [ItemResult("likely", "a", -1.0), ItemResult("words", "a", 0.0)]
    scores = Suite(ALL).item_scores(results)
    assert (scores["likely"][0], scores["words"][0]) == (-1.0, 0.0)


def test_item_scores_of_other_items_are_refused() -> None:
    suite = Suite(ALL)
    with pytest.raises(ValueError, match="two results of item 'a' of 'chosen'"):
        suite.item_scores([*RESULTS, RESULTS[0]])
    with pytest.raises(ValueError, match=re.escape("the suite has no item ('words', 'c')")):
        suite.item_scores([*RESULTS, ItemResult("words", "c", 0.0, "")])


def test_a_missing_answer_or_nan_fails_the_candidate() -> None:
    batch = Suite(ALL).batch()
    with pytest.raises(EngineError, match="each of 9 requests, but left 1 items without an answer"):
        batch.grade(answers(batch)[:-1])
    with pytest.raises(EngineError, match="must be finite, but is nan on item 'b'"):
        batch.grade(answers(batch, [*OUTPUTS[:6], *likelihoods(math.nan), *OUTPUTS[7:]]))


def test_benchmarks_must_be_there_and_have_different_names() -> None:
    for benchmarks in ([], [GENERATED, GENERATED]):
        with pytest.raises(BenchmarkError, match=re.escape("needs benchmarks with different names")):
            Suite(benchmarks)


def changed(entry: Item, **values: object) -> dict[str, tuple[Item, ...]]:
    return {"items": (item("a"), dataclasses.replace(entry, **values))}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"name": "other"},
    {"capability": "other"},
    {"form": ReferenceText("loglikelihood")},
    {"form": ReferenceText("perplexity")},
    {"form": ChoiceLikelihood()},
    {"form": ChoiceLikelihood("bytes")},
    {"form": dataclasses.replace(FORM, grader=Exact(ignore_case=True))},
    {"form": dataclasses.replace(FORM, grader=Contains())},
    {"form": dataclasses.replace(FORM, grader=Choice(by="generation"))},
    {"form": dataclasses.replace(FORM, stop=())},
    {"form": dataclasses.replace(FORM, max_tokens=5)},
    {"form": dataclasses.replace(FORM, extract=Boxed())},
    {"form": dataclasses.replace(FORM, extract=Boxed("first"))},
    {"form": dataclasses.replace(FORM, sampling=Sampling(2, 0.5))},
    {"form": dataclasses.replace(FORM, sampling=Sampling(2, 0.6))},
    {"form": dataclasses.replace(FORM, sampling=Sampling(2, 0.5, top_p=0.9))},
    {"form": dataclasses.replace(FORM, sampling=Sampling(2, 0.5, pass_at=1))},
    {"form": dataclasses.replace(FORM, sampling=Sampling(2, 0.5, seed=1))},
    {"items": (item("a"),)},
    {"items": (item("b"), item("a"))},
    changed(item("b"), prompt="B?"),
    changed(item("b"), prompt=(1, 2)),
    changed(item("b"), answers=("yes", "y")),
    changed(item("b"), choices=("yes", "no")),
    changed(item("b"), continuations=(" Yes",)),
    changed(item("b"), num_bytes=3),
    changed(item("b"), tests=UnitTests("", "", "assert True")),
    changed(item("b"), tests=UnitTests("", "", "assert False")),
]


def test_the_fingerprint_changes_with_all_that_determines_scores() -> None:
    found: dict[str, dict[str, Any]] = {}
    for values in VARIANTS:
        fingerprint = Suite([dataclasses.replace(GENERATED, **values)]).fingerprint()
        assert fingerprint not in found, (values, found[fingerprint])
        found[fingerprint] = values


def test_the_fingerprint_does_not_change_with_the_place_of_the_file() -> None:
    moved = dataclasses.replace(GENERATED, source="elsewhere/words.yaml")
    assert Suite([moved]).fingerprint() == Suite([GENERATED]).fingerprint()
