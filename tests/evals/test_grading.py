"""Grading while the engine still answers: what is fast at once, what is slow in threads. Orders of events, no times."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import EngineError
from mergemix.evals.suite import Batch, Score, Suite
from mergemix.evals.threads import MOST_THREADS, Threads, thread_count
from mergemix.serve.engine import Generate, Generated, Output, Request

PATIENCE_S = 20.0


@dataclass
class Asking:
    """A benchmark of items with `samples` requests each, scored by `grade`, which gets the answers' texts."""

    name: str
    grade: Callable[[Sequence[str]], float]
    slow_to_score: bool = False
    items: int = 3
    samples: int = 1
    metric: str = "accuracy"
    higher_is_better: bool = True
    source: str = "test"
    threads: set[str] = field(default_factory=set)  # that scored

    @property
    def capability(self) -> str:
        return self.name

    @property
    def item_ids(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.items)))

    def requests(self, index: int) -> list[Request]:
        return [Generate(f"{self.name} {index} {n}", 1 + index) for n in range(self.samples)]

    def score(self, index: int, outputs: Sequence[Output]) -> Score:
        self.threads.add(threading.current_thread().name)
        texts = [output.text for output in outputs if isinstance(output, Generated)]
        return Score(self.grade(texts), " ".join(texts))

    def report(self, scores: Sequence[Score]) -> dict[str, float]:
        return {}

    def fingerprint(self) -> str:
        return self.name


def answers(batch: Batch) -> list[tuple[int, Output]]:
    """Each request's prompt, in the order of the requests."""
    return [
        (index, Generated(str(request.prompt), 1))
        for index, request in enumerate(batch.requests)
        if isinstance(request, Generate)
    ]


def test_slow_graders_run_while_the_engine_goes_on() -> None:
    """Each item is only scored once a later answer was asked for: in the caller's thread that would wait for ever."""
    asked_again, begun = threading.Event(), threading.Event()

    def grade(texts: Sequence[str]) -> float:
        begun.set()
        assert asked_again.wait(PATIENCE_S)
        return 1.0

    slow = Asking("slow", grade, slow_to_score=True)
    batch = Suite([slow]).batch()

    def stream() -> Iterator[tuple[int, Output]]:
        first, *rest = answers(batch)
        yield first
        assert begun.wait(PATIENCE_S), "its grading begins before the next answer is there"
        asked_again.set()
        yield from rest

    assert [result.score for result in batch.grade(stream())] == [1.0] * 3
    assert threading.current_thread().name not in slow.threads


def test_fast_graders_run_as_the_answers_come() -> None:
    scored: list[str] = []
    fast = Asking("fast", lambda texts: float(not scored.extend(texts)))
    batch = Suite([fast]).batch()

    def stream() -> Iterator[tuple[int, Output]]:
        for number, answer in enumerate(answers(batch)):
            assert len(scored) == number
            yield answer

    batch.grade(stream())
    assert fast.threads == {threading.current_thread().name}


@given(st.integers(0, 2**32), st.integers(1, 3), st.booleans())
def test_results_stand_in_the_order_of_the_items_whatever_comes_first(
    seed: int, samples: int, slow: bool
) -> None:
    grade = lambda texts: float(len(texts)) + int(texts[0].split()[1])  # noqa: E731
    suite = Suite(
        [Asking("a", grade, slow_to_score=slow, samples=samples), Asking("b", grade, slow_to_score=not slow)]
    )
    batch = suite.batch()
    outputs = answers(batch)
    random.Random(seed).shuffle(outputs)
    expected = [("a", f"{n}", samples + float(n)) for n in range(3)] + [
        ("b", f"{n}", 1.0 + n) for n in range(3)
    ]
    assert [(result.benchmark, result.item, result.score) for result in batch.grade(outputs)] == expected
    texts = [result.text for result in batch.grade(outputs)][:3]
    assert texts == [" ".join(f"a {n} {sample}" for sample in range(samples)) for n in range(3)]


@pytest.mark.parametrize("slow", [True, False])
def test_the_first_failure_of_the_candidate_stops_everything(slow: bool) -> None:
    failed = threading.Event()

    def grade(texts: Sequence[str]) -> float:
        failed.set()
        raise EngineError("not a number")

    batch = Suite([Asking("broken", grade, slow_to_score=slow, items=1000)]).batch()
    taken = 0

    def stream() -> Iterator[tuple[int, Output]]:
        nonlocal taken
        for answer in answers(batch):
            taken += 1
            yield answer
            assert failed.wait(PATIENCE_S)

    with pytest.raises(EngineError, match="not a number"):
        batch.grade(stream())
    assert taken < 1000


def test_a_slow_grader_that_raises_is_an_error_of_its_item() -> None:
    def grade(texts: Sequence[str]) -> float:
        if " 1 " in texts[0]:
            raise ZeroDivisionError("no such thing")
        return 0.5

    results = (batch := Suite([Asking("some", grade, slow_to_score=True)]).batch()).grade(answers(batch))
    assert [(result.score, result.error) for result in results] == [
        (0.5, None),
        (None, "ZeroDivisionError: no such thing"),
        (0.5, None),
    ]


def test_an_answer_that_is_missing_fails_the_candidate() -> None:
    batch = Suite([Asking("all", lambda texts: 1.0, slow_to_score=True, samples=2)]).batch()
    with pytest.raises(EngineError, match="left 1 items without an answer"):
        batch.grade(answers(batch)[:-1])


def test_what_had_not_begun_never_does_after_an_error() -> None:
    go, begun = threading.Event(), []

    def job(number: int) -> int:
        begun.append(number)
        assert go.wait(PATIENCE_S)
        return number

    def fail() -> None:
        with Threads() as threads:
            for number in range(MOST_THREADS + 5):
                threads.start(number, lambda number=number: job(number))  # type: ignore[misc]
            raise EngineError("elsewhere")

    with pytest.raises(EngineError, match="elsewhere"):
        fail()
    go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("mergemix-grading"):
            thread.join(PATIENCE_S)
    assert len(begun) <= thread_count()
