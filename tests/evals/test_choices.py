import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.evals.choices import LETTERS, chosen, lettered, most_likely

CITIES = ("Rome", "Paris", "Paris, Texas", "U.S.")


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 0), min_size=1))
def test_most_likely_is_the_first_of_the_highest(logprobs: list[float]) -> None:
    assert most_likely(logprobs) == logprobs.index(max(logprobs))


def test_choices_are_shown_by_letter() -> None:
    assert lettered(["Rome", "Paris"]) == "A. Rome\nB. Paris"


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("B", 1),
        (" b.\n", 1),
        ("**(B)**", 1),
        ("E", None),
        ("paris", 1),
        ('"Paris, Texas."', 2),
        ("U.S.", 3),
        ("The answer is B.", 1),
        ("The correct answer is: **(C)**", 2),
        ("Answer: A\n\nAnswer: B", 1),
        ("A. Rome is wrong, so the answer is B", 1),
        ("The answer is option B because", 1),
        ("The answer is Paris", 1),
        ("The answer is U.S.", 3),
        ("the answer is a city", None),
        ("B. Paris", 1),
        ("B) it is the capital", 1),
        ("(B) since", 1),
        ("B\nbecause Rome is in Italy", 1),
        ("A city in France, that is Paris", 1),
        ("It lies in Paris, Texas", 2),
        ("Rome or Paris", None),
        ("Comparisons", None),
        ("I do not know", None),
        ("", None),
        (".", None),
    ],
)
def test_which_choice_an_answer_means(answer: str, index: int | None) -> None:
    assert chosen(answer, CITIES) == index


def test_choices_that_are_letters_or_punctuation_themselves() -> None:
    assert chosen("B", ("A", "B")) == 1
    assert chosen("b", ("a", "x")) == 1  # no choice's text: the letter
    assert chosen("", ("?", "yes")) is None
    assert chosen("3", ("2", "3", "4")) == 1
    assert chosen("it is 13", ("2", "3", "4")) is None


@settings(deadline=None)
@given(st.lists(st.text("abcdefgh xyz", min_size=2).map(str.strip).filter(lambda t: len(t) > 1), min_size=2, max_size=8,
                unique=True), st.data())  # fmt: skip
def test_every_choice_can_be_named(choices: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(choices) - 1))
    for answer in (choices[index], LETTERS[index], lettered(choices).split("\n")[index]):
        assert chosen(answer, choices) == index
    assert chosen(f"the answer is {LETTERS[index]}", choices) == index


@settings(deadline=None)
@given(st.text(), st.lists(st.text(min_size=1), min_size=2, max_size=4))
def test_reading_never_fails_on_what_a_model_writes(answer: str, choices: list[str]) -> None:
    index = chosen(answer, choices)
    assert index is None or 0 <= index < len(choices)
