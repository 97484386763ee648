import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import BenchmarkError
from mergemix.evals.graders import (
    Choice,
    Contains,
    Exact,
    Numeric,
    Regex,
    grade,
    last_number,
    make_grader,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("so 3 + 4 = 7", "7"),
        ("x=-5", "-5"),
        ("it is \u22125 degrees", "-5"),
        ("+3", "3"),
        ("between 3-5", "5"),
        ("10 (10)-3", "3"),
        ("costs $1,234,567.50!", "1234567.50"),
        ("-$7", "-7"),
        ("-.5", "-.5"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("2.5e-3 metres", "0.0025"),
        ("1E6", "1000000"),
        ("about 3/4.", "0.75"),
        ("-3 / 4 of it", "-0.75"),
        ("5/0", "0"),
        ("1/2.5", "2.5"),
        ("50%", "50"),
        ("9007199254740993", "9007199254740993"),
        ("1e" + "9" * 30, "9" * 30),
    ],
)
def test_last_number_of_a_text(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", "½"])
def test_a_text_without_a_number(text: str) -> None:
    assert last_number(text) is None
    assert not Numeric()(text, "1")


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=4),
    st.sampled_from(["{:f}", "{:,f}", "{:+,f}", "{:.25e}"]),
    st.sampled_from(["{}", "The answer is {}.", "1 + 1 = 3, so: {}\n", "**{}** dollars"]),
)
def test_numeric_reads_every_format_of_a_number(value: Decimal, number_format: str, sentence: str) -> None:
    written = number_format.format(value)
    assert last_number(sentence.format(written)) == Decimal(written.replace(",", ""))
    assert Numeric()(sentence.format(written), written)
    assert not Numeric()(sentence.format(written), str(value + 1))


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_numeric_compares_fractions_after_reduction(top: int, bottom: int) -> None:
    assert Numeric()(f"it is {top}/{bottom}", f"{3 * top}/{3 * bottom}")
    assert not Numeric()(f"it is {top}/{bottom}", f"{top + 1}/{bottom}")


@given(st.text())
def test_numeric_never_fails_on_what_a_model_writes(text: str) -> None:
    assert Numeric(tolerance=1.0)(text, "7") in (True, False)


def test_numeric_tolerance_is_absolute_inclusive_and_decimal() -> None:
    assert Numeric(tolerance=0.1)("1.1", "1")
    assert Numeric(tolerance=0.1)("0.9", "1")
    assert not Numeric(tolerance=0.1)("1.1000001", "1")
    assert not Numeric()("1.0000001", "1")
    assert not Numeric(tolerance=10)("1e9999", "-1e9999")
    assert Numeric()("9007199254740993", "9,007,199,254,740,993")
    assert not Numeric()("9007199254740993", "9007199254740992")


def test_exact_ignores_white_space_around_and_case_on_request() -> None:
    assert Exact()(" Paris\n", "Paris")
    assert not Exact()("paris", "Paris")
    assert not Exact()("Paris.", "Paris")
    assert Exact(ignore_case=True)("PARIS", "paris")


def test_contains() -> None:
    assert Contains()("It is Paris, of course", "Paris")
    assert not Contains()("It is paris", "Paris")
    assert Contains(ignore_case=True)("It is paris", "Paris")


@pytest.mark.parametrize(
    ("grader", "text", "right"),
    [
        (Regex(r"#### (-?\d+)"), "thus\n#### 42\n#### 43", True),
        (Regex(r"#### (-?\d+)"), "thus 42", False),
        (Regex(r"\d+"), "first 42 then 43", True),
        (Regex(r"(\w)=(\d+)", group=2), "x=42", True),
        (Regex(r"(\w)=(?P<value>\d+)", group="value"), "x=42", True),
        (Regex(r"(\w)=(\d+)", group=0), "42=42", False),
        (Regex(r"a|(\d+)"), "a42", False),
        (Regex(r"ANSWER (\d+)", ignore_case=True), "answer 42", True),
    ],
)
def test_regex_compares_what_the_first_match_captured(grader: Regex, text: str, right: bool) -> None:
    assert grader(text, "42") is right


def test_any_of_several_references_is_right() -> None:
    assert grade(Exact(), "b", ["a", "b"]) == 1.0
    assert grade(Exact(), "c", ["a", "b"]) == 0.0


def test_a_grader_from_a_benchmark_file() -> None:
    assert make_grader("exact", "b.yaml") == Exact()
    assert make_grader({"name": "numeric", "tolerance": 1}, "b.yaml") == Numeric(1)
    assert make_grader({"name": "regex", "pattern": "(.)", "group": 1}, "b.yaml") == Regex("(.)", 1)
    assert make_grader("choice", "b.yaml") == Choice()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exakt", "b.yaml: unknown grader 'exakt'; did you mean 'exact'?"),
        (["exact"], "unknown grader ['exact']; known: choice, code, contains, exact, numeric, regex"),
        ({"ignore_case": True}, "unknown grader None"),
        ({"name": "exact", "ignore-case": True}, "unknown key 'ignore-case'; did you mean 'ignore_case'?"),
        ({"name": "exact", "ignore_case": 1}, "ignore_case must be true or false, but is 1 (int)"),
        ({"name": "numeric", "tolerance": True}, "tolerance must be a number"),
        ({"name": "numeric", "tolerance": "1e-6"}, "(YAML needs a dot: 1.0e-6), but is '1e-6' (str)"),
        ({"name": "numeric", "tolerance": -1}, "tolerance must be a finite number >= 0, but is -1"),
        (
            {"name": "numeric", "tolerance": float("nan")},
            "tolerance must be a finite number >= 0, but is nan",
        ),
        ({"name": "regex"}, "grader regex: needs the option 'pattern'"),
        ({"name": "regex", "pattern": "("}, "pattern must be a regular expression, but '(' is not"),
        ({"name": "regex", "pattern": "(a)", "group": 2}, "group must be one of [0, 1] in '(a)', but is 2"),
        ({"name": "regex", "pattern": "(a)", "group": 1.0}, "group must be a number or a name"),
    ],
)
def test_a_grader_that_makes_no_sense(spec: object, message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        make_grader(spec, "b.yaml")
