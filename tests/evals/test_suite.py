import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.benchmark import Benchmark, Item
from mergemix.evals.graders import Choice, Exact
from mergemix.evals.suite import ItemResult, Suite, benchmark_scores
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output


def item(identity: str, *choices: str) -> Item:
    return Item(identity, {}, f"{identity}?", answers=("yes",), choices=choices)


GENERATED = Benchmark(
    name="words",
    capability="language",
    metric="accuracy",
    grader=Exact(),
    items=(item("a"), item("b")),
    delimiter=None,
    stop=("\n",),
    max_tokens=4,
    source=Path("words.yaml"),
)
CHOSEN = dataclasses.replace(
    GENERATED, name="chosen", grader=Choice(), items=(item("a", "no", "yes", "maybe"), item("c", "yes", "no"))
)
LIKELY = dataclasses.replace(GENERATED, name="likely", capability="text", metric="loglikelihood", grader=None)
ALL = [GENERATED, CHOSEN, LIKELY]


def likelihoods(*logprobs: float) -> list[Output]:
    return [Likelihood(logprob, 1, False) for logprob in logprobs]


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


def test_one_flat_batch_and_its_scores() -> None:
    suite = Suite(ALL)
    assert suite.requests == [
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
    assert suite.score(OUTPUTS) == RESULTS
    assert benchmark_scores(RESULTS) == {"chosen": 0.5, "likely": -3.75, "words": 0.5}
    assert suite.num_items == 6
    assert suite.item_counts == {"chosen": 2, "likely": 2, "words": 2}
    assert suite.capabilities == {"language": ["chosen", "words"], "text": ["likely"]}


def test_the_order_of_the_benchmarks_changes_nothing() -> None:
    suite, reversed_suite = Suite(ALL), Suite(ALL[::-1])
    assert suite.requests == reversed_suite.requests
    assert suite.fingerprint() == reversed_suite.fingerprint()
    assert list(suite.capabilities) == list(reversed_suite.capabilities)


def test_item_scores_stand_in_suite_order_whatever_order_they_were_stored_in() -> None:
    shuffled = random.Random(0).sample(RESULTS, len(RESULTS))
    scores = Suite(ALL).item_scores(shuffled)
    assert list(scores) == ["chosen", "likely", "words"]
    for name, expected in {"chosen": [1.0, 0.0], "likely": [-7.0, -0.5], "words": [1.0, 0.0]}.items():
        np.testing.assert_array_equal(scores[name], expected)


@pytest.mark.parametrize(
    "results",
    [
        RESULTS[1:],
        [*RESULTS, RESULTS[0]],
        [*RESULTS[1:], ItemResult("words", "c", 0.0, "")],
        [RESULTS[1], *RESULTS[1:]],
    ],
)
def test_item_scores_of_other_items_are_refused(results: list[ItemResult]) -> None:
    with pytest.raises(ValueError, match="not one for each of the suite's 6 items"):
        Suite(ALL).item_scores(results)


def test_a_missing_answer_or_nan_fails_the_candidate() -> None:
    with pytest.raises(EngineError, match="each of 9 requests, but gave 8"):
        Suite(ALL).score(OUTPUTS[:-1])
    with pytest.raises(EngineError, match="must be finite, but is nan on item 'b'"):
        Suite(ALL).score([*OUTPUTS[:6], *likelihoods(float("nan")), *OUTPUTS[7:]])


def test_benchmarks_must_be_there_and_have_different_names() -> None:
    for benchmarks in ([], [GENERATED, GENERATED]):
        with pytest.raises(BenchmarkError, match=re.escape("needs benchmarks with different names")):
            Suite(benchmarks)


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "other"},
        {"capability": "other"},
        {"metric": "loglikelihood", "grader": None},
        {"grader": Exact(ignore_case=True)},
        {"grader": Choice()},
        {"items": (item("a"),)},
        {"items": (item("b"), item("a"))},
        {"items": (item("a"), dataclasses.replace(item("b"), prompt="B?"))},
        {"items": (item("a"), dataclasses.replace(item("b"), answers=("yes", "y")))},
        {"items": (item("a"), item("b", "yes", "no"))},
        {"delimiter": " "},
        {"stop": ()},
        {"max_tokens": 5},
    ],
)
def test_the_fingerprint_changes_with_all_that_determines_scores(changed: dict) -> None:
    assert (
        Suite([dataclasses.replace(GENERATED, **changed)]).fingerprint() != Suite([GENERATED]).fingerprint()
    )


def test_the_fingerprint_does_not_change_with_the_place_of_the_file() -> None:
    moved = dataclasses.replace(GENERATED, source=Path("elsewhere/words.yaml"))
    assert Suite([moved]).fingerprint() == Suite([GENERATED]).fingerprint()
