import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import BenchmarkError
from mergemix.evals.extract import Boxed, CodeBlock, LastLine, Regex, make_extractor

# Text with nested braces, all closed; what is escaped does not count.
BALANCED = st.recursive(
    st.sampled_from(["", "x", "\\frac", "\\{", "\\}", "\\\\", " 3", "\n"]),
    lambda inner: st.one_of(st.tuples(inner, inner).map("".join), inner.map(lambda text: "{" + text + "}")),
)
LINES = st.lists(st.text(st.characters(blacklist_characters="`~\n\r"), max_size=8), max_size=5)


@settings(deadline=None)
@given(
    BALANCED, st.sampled_from(["\\boxed", "\\fbox", "\\boxed "]), st.sampled_from(["", "}", "so \\boxed{4"])
)
def test_boxed_takes_all_up_to_the_brace_that_closes_it(inside: str, box: str, after: str) -> None:
    assert Boxed()(f"thus $\\boxed{{0}}$, no: ${box}{{{inside}}}$ {after}") == inside


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("\\boxed{1} or \\boxed{2}", "1", "2"),
        ("\\boxed{1} or \\boxed{2", "1", "1"),
        ("\\boxed{\\boxed{1}}", "\\boxed{1}", "1"),
        ("\\unboxed{1} and boxed{2}", None, None),
        ("\\boxed 5", None, None),
        ("", None, None),
    ],
)
def test_first_and_last_box(text: str, first: str | None, last: str | None) -> None:
    assert Boxed(which="first")(text) == first
    assert Boxed()(text) == last


@settings(deadline=None)
@given(LINES, st.sampled_from(["```", "~~~", "````"]), st.sampled_from(["", "python", " py title=x"]))
def test_a_code_block_is_what_stands_between_its_fences(lines: list[str], fence: str, info: str) -> None:
    block = "".join(f"{line}\n" for line in lines)
    assert CodeBlock()(f"I think:\n{fence}{info}\n{block}{fence}\nThat is all.") == block
    assert CodeBlock()(f"```\nother\n```\n{fence}{info}\n{block}{fence}") == block
    assert CodeBlock("first")(f"{fence}{info}\n{block}{fence}\n```\nother\n```") == block


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("no code", None),
        ("```python\n    return 1", "    return 1\n"),  # a stop string may have ended it
        ("```python\nx = 1\n```\nand\n```\n", "x = 1\n"),
        ("  ```\n  if x:\n      y\n z\n  ```", "if x:\n    y\nz\n"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```\nx\n``` not a fence\n```", "x\n``` not a fence\n"),
        ("```\r\nx\r\n```\r\n", "x\r\n"),
        ("use ```x``` here", None),
        ("``` `x` ```\n", None),
        ("```\n\n```", "\n"),
    ],
)
def test_code_blocks_as_models_write_them(text: str, block: str | None) -> None:
    assert CodeBlock()(text) == block


@pytest.mark.parametrize(
    ("text", "line"), [("a\n\n b \n \n", "b"), ("a", "a"), ("", None), (" \n", None), ("a\r\nb\r\n", "b")]
)
def test_last_line(text: str, line: str | None) -> None:
    assert LastLine()(text) == line


@pytest.mark.parametrize(
    ("extractor", "answer"),
    [
        (Regex(r"#### (-?\d+)"), "2"),
        (Regex(r"#### (-?\d+)", which="first"), "-1"),
        (Regex(r"#### (-)?(\d+)", group=2), "2"),
        (Regex(r"#### (?P<sign>-)?\d+", group="sign"), "-"),  # the match without the sign does not count
        (Regex(r"#### -?\d+"), "#### 2"),
        (Regex(r"answer"), None),
    ],
)
def test_regex(extractor: Regex, answer: str | None) -> None:
    assert extractor("#### -1, no: #### 2") == answer


@settings(deadline=None)
@given(st.text())
def test_extraction_never_fails_on_what_a_model_writes(text: str) -> None:
    for extractor in (Boxed(), CodeBlock(), LastLine(), Regex("(a)|b")):
        answer = extractor(text)
        assert answer is None or isinstance(answer, str)


def test_an_extractor_from_a_benchmark_file() -> None:
    assert make_extractor("boxed", "b.yaml") == Boxed()
    assert make_extractor({"name": "code_block", "which": "first"}, "b.yaml") == CodeBlock("first")
    assert make_extractor({"name": "regex", "pattern": "(.)", "group": 1}, "b.yaml") == Regex("(.)", 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("box", "b.yaml: unknown extract 'box'; did you mean 'boxed'?"),
        (7, "unknown extract 7; known: boxed, code_block, last_line, regex"),
        ({"name": "boxed", "witch": "last"}, "extract boxed: unknown key 'witch'; did you mean 'which'?"),
        ({"name": "boxed", "which": "second"}, "extract boxed: which must be first or last, but is 'second'"),
        ({"name": "regex"}, "extract regex: needs the option 'pattern'"),
        ({"name": "regex", "pattern": "("}, "pattern must be a regular expression, but '(' is not"),
        ({"name": "regex", "pattern": "a", "group": "x"}, "group must be one of [0] in 'a', but is 'x'"),
        ({"name": "last_line", "which": "last"}, "extract last_line: unknown key 'which'"),
    ],
)
def test_an_extractor_that_makes_no_sense(spec: object, message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        make_extractor(spec, "b.yaml")
