import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.benchmark import Benchmark, Context, load_benchmark, load_benchmarks
from mergemix.evals.graders import Exact, Numeric
from mergemix.evals.suite import Score
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood
from tests.evals.benchmark_files import SUM, write

CHOICES = [
    {"question": "France?", "choices": ["Rome", "Paris"], "answer": "Paris"},
    {"question": "Italy?", "choices": ["Rome", "Paris"], "answer": 0},
]
Load = Callable[..., Benchmark]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(items: list[Any] | bytes, /, **keys: Any) -> Benchmark:
        return load_benchmark(write(tmp_path, items, **keys))

    return load


def test_a_benchmark_with_every_key(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text(
        '{"question": "0+1", "answer": ["1", "one"]}\n{"question": "unused"}\n'
    )
    benchmark = load(
        [{"id": "easy", **SUM}, {"question": "2+2", "answer": ["4", "four"]}, {"not": "reached"}],
        capability="math",
        answer="{{ answer }}",
        delimiter="=",
        few_shot={"count": 1, "items": "shots.jsonl", "separator": "\n--\n"},
        stop=["\n", "Question:"],
        max_tokens=8,
        grader={"name": "exact", "ignore_case": True},
        metric="accuracy",
        limit=2,
    )
    assert (benchmark.name, benchmark.capability, benchmark.metric) == ("sums", "math", "accuracy")
    assert benchmark.form.grader == Exact(ignore_case=True)
    assert [(item.id, item.answers) for item in benchmark.items] == [("easy", ("2",)), ("2", ("4", "four"))]
    shots = "Question: 0+1\nAnswer:=1\n--\n"
    assert benchmark.requests(0) == [
        Generate(f"{shots}Question: 1+1\nAnswer:", max_tokens=8, stop=("\n", "Question:"))
    ]
    assert benchmark.score(1, [Generated(" FOUR", 1)]) == Score(1.0, " FOUR")
    assert benchmark.score(1, [Generated("five", 1)]) == Score(0.0, "five")


def test_defaults(load: Load) -> None:
    benchmark = load([SUM])
    assert benchmark.capability == "sums"
    assert benchmark.requests(0) == [Generate("Question: 1+1\nAnswer:", max_tokens=256)]


def test_a_prompt_is_what_the_file_says_to_the_last_character(load: Load) -> None:
    assert load([{"q": "<a> & b", "answer": "c"}], prompt=" {{ q }}\n").items[0].prompt == " <a> & b\n"


def test_ids_are_line_numbers_and_blank_lines_are_passed_over(load: Load) -> None:
    benchmark = load(
        b'\xef\xbb\xbf{"question": "a\xe2\x80\xa8b", "answer": 1}\r\n\n  \n{"question": "c", "answer": 2}'
    )
    assert [item.id for item in benchmark.items] == ["1", "4"]
    assert benchmark.items[0].prompt == "Question: a\u2028b\nAnswer:"


@pytest.mark.parametrize(
    ("prompt", "delimiter", "continuation"),
    [
        ("{{ question }}", None, " 2"),
        ("{{ question }}\n", None, "2"),
        ("{{ question }}\n", " ", " 2"),
        ("{{ question }}", "", "2"),
    ],
)
def test_loglikelihood_of_the_reference_answer(
    load: Load, prompt: str, delimiter: str | None, continuation: str
) -> None:
    benchmark = load([SUM], metric="loglikelihood", grader=None, prompt=prompt, delimiter=delimiter)
    assert benchmark.requests(0) == [LogLikelihood(benchmark.items[0].prompt, continuation)]
    assert benchmark.score(0, [Likelihood(-3.25, 2, False)]) == Score(-3.25)


def test_choice_asks_for_each_choice_and_takes_the_likeliest(load: Load) -> None:
    benchmark = load(CHOICES, grader="choice")
    assert benchmark.requests(0) == [
        LogLikelihood("Question: France?\nAnswer:", " Rome"),
        LogLikelihood("Question: France?\nAnswer:", " Paris"),
    ]
    rome = [Likelihood(-1.0, 1, True), Likelihood(-2.0, 1, False)]
    tie = [Likelihood(-2.0, 1, True), Likelihood(-2.0, 1, False)]
    assert benchmark.score(0, rome) == Score(0.0, "Rome")
    assert benchmark.score(1, rome) == Score(1.0, "Rome")
    assert benchmark.score(1, tie) == Score(1.0, "Rome")


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["a", "b"], "b", "b"),
        (["a", "b"], 1, "b"),
        (["a", "b"], "1", "b"),
        (["1", "2"], "1", "1"),
        ([5, 6], 6, "6"),
    ],
)
def test_the_right_choice_is_named_or_numbered_from_0(
    load: Load, choices: list[Any], answer: Any, right: str
) -> None:
    [item] = load([{"question": "", "choices": choices, "answer": answer}], grader="choice").items
    assert item.answers == (right,)


@pytest.mark.parametrize("logprob", [math.nan, math.inf, -math.inf])
def test_a_loglikelihood_that_is_not_finite_fails_the_candidate(load: Load, logprob: float) -> None:
    for keys in ({"metric": "loglikelihood", "grader": None}, {"grader": "choice"}):
        benchmark = load(CHOICES, **keys)
        outputs = [Likelihood(-1.0, 1, False), Likelihood(logprob, 1, False)][-len(benchmark.requests(0)) :]
        with pytest.raises(EngineError, match=f"must be finite, but is {logprob} on item '1'"):
            benchmark.score(0, outputs)


def test_an_output_of_the_wrong_kind_fails_the_candidate(load: Load) -> None:
    benchmark = load([SUM])
    with pytest.raises(EngineError, match="answered a generation with Likelihood"):
        benchmark.score(0, [Likelihood(-1.0, 1, True)])
    benchmark = load([SUM], metric="loglikelihood", grader=None)
    with pytest.raises(EngineError, match="answered a log-likelihood with Generated"):
        benchmark.score(0, [Generated("2", 1)])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"few-shot": {}}, "unknown key 'few-shot'; did you mean 'few_shot'?"),
        (
            {"few_shot": {"count": 1, "file": "x"}},
            "few_shot: unknown key 'file'; known: count, items, separator",
        ),
        ({"few_shot": 3}, "few_shot: must be a mapping of keys to values, but is 3 (int)"),
        ({"few_shot": {"count": 1}}, "few_shot: needs the key 'items'"),
        ({"name": None}, "needs the key 'name' (text)"),
        ({"name": 7}, "name must be text (put it in quotes), but is 7 (int)"),
        ({"name": "a=b"}, "name must be a name without '=', ',' or surrounding spaces, but is 'a=b'"),
        ({"capability": "macro"}, "capability must not be 'macro'"),
        ({"items": "none.jsonl"}, "none.jsonl: cannot be read: No such file or directory"),
        ({"items": "."}, "cannot be read: Is a directory"),
        ({"prompt": None}, "needs the key 'prompt'"),
        ({"prompt": ["a"]}, "prompt must be text, but is ['a'] (list)"),
        ({"prompt": "{{ question"}, "the template prompt does not parse"),
        ({"stop": "\\n"}, "stop: entry is a backslash and a letter"),
        ({"stop": [""]}, "stop must be a list of non-empty texts, but is [''] (list)"),
        ({"stop": [1]}, "stop must be a list of non-empty texts, but is [1] (list)"),
        ({"max_tokens": "8"}, "max_tokens must be a whole number >= 1, but is '8' (str)"),
        ({"max_tokens": 0}, "max_tokens must be a whole number >= 1, but is 0 (int)"),
        ({"max_tokens": True}, "max_tokens must be a whole number >= 1, but is True (bool)"),
        ({"limit": 0}, "limit must be a whole number >= 1"),
        ({"metric": "loglik"}, "unknown metric 'loglik'; did you mean 'loglikelihood'?"),
        ({"metric": "loglikelihood"}, "generates nothing; remove 'grader'"),
        ({"metric": "loglikelihood", "grader": None, "stop": ["a"]}, "generates nothing; remove 'stop'"),
        ({"grader": "choice", "max_tokens": 8}, "generates nothing; remove 'max_tokens'"),
        (
            {"grader": None},
            "needs the key 'grader' (exact, numeric, regex, contains, choice, code), or a metric of text",
        ),
        (
            {"metric": "perplexity"},
            "metric perplexity scores log-likelihoods and generates nothing; remove 'grader'",
        ),
        ({"metric": "bits_per_byte", "grader": None, "samples": 2}, "generates nothing; remove 'samples'"),
        ({"metric": "bits_per_byte", "grader": None, "extract": "boxed"}, "remove 'extract'"),
        (
            {"grader": "choice", "temperature": 1},
            "grader choice scores log-likelihoods and generates nothing",
        ),
        (
            {"prompt": None, "metric": "perplexity", "grader": None, "delimiter": ""},
            "no prompt; remove 'delimiter'",
        ),
        (
            {"prompt": None, "metric": "perplexity", "grader": None, "few_shot": {}},
            "no prompt; remove 'few_shot'",
        ),
        ({"extract": "box"}, "unknown extract 'box'; did you mean 'boxed'?"),
        ({"samples": 0}, "samples must be a whole number >= 1, but is 0 (int)"),
        ({"samples": 2}, "2 samples at temperature 0 are all the same: set temperature > 0"),
        ({"temperature": -1}, "temperature must be a number >= 0, but is -1 (int)"),
        ({"temperature": "1"}, "temperature must be a finite number, but is '1' (str)"),
        ({"temperature": math.inf}, "temperature must be a finite number, but is inf (float)"),
        ({"temperature": 1, "top_p": 0}, "top_p must be a number > 0 and <= 1, but is 0 (int)"),
        ({"temperature": 1, "top_p": 1.5}, "top_p must be a number > 0 and <= 1, but is 1.5 (float)"),
        ({"top_p": 0.9}, "top_p is for drawn answers, and at temperature 0 none is drawn; remove it"),
        ({"samples": 2, "temperature": 1, "pass_at": 3}, "pass_at must be at most the 2 samples, but is 3"),
        ({"pass_at": 0}, "pass_at must be a whole number >= 1, but is 0 (int)"),
        (
            {"grader": {"name": "choice", "by": "letter"}},
            "unknown by 'letter'; known: generation, likelihood",
        ),
        (
            {"grader": {"name": "choice", "normalize": "character"}},
            "unknown normalize 'character'; did you mean 'characters'?",
        ),
        (
            {"grader": {"name": "choice", "by": "generation", "normalize": "bytes"}},
            "normalize is for log-likelihoods, and there are none by: generation; remove it",
        ),
        ({"grader": {"name": "choice", "by": "generation"}}, "write {{ options }} in the prompt"),
        ({"grader": "numerical"}, "unknown grader 'numerical'; did you mean 'numeric'?"),
    ],
)
def test_a_benchmark_file_that_makes_no_sense(load: Load, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load([SUM], **keys)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (b"", "items.jsonl: has no items"),
        (b"\n \n", "items.jsonl: has no items"),
        (b'{"question": 1}\n\n{"question":\n', "items.jsonl:3: not valid JSON"),
        (b'{"question": NaN}', "items.jsonl:1: not valid JSON: NaN is not a JSON number"),
        (b"[" * 100_000, "items.jsonl:1: not valid JSON"),
        (b"[1]", "items.jsonl:1: each line must be a JSON object, but is [1] (list)"),
        (
            b'{"question": 1, "answer": 1}\n{"question": "\xff"}',
            "items.jsonl:2: must be UTF-8, but byte 0xff is not",
        ),
        ([{"id": 2, **SUM}, SUM], "items.jsonl:2: ids must be unique, but '2' is also on line 1"),
        ([{"id": True, **SUM}], "items.jsonl:1: id must be text or a whole number, but is True (bool)"),
        ([SUM, {"answer": 1}], "items.jsonl:2: the template prompt needs a field the item lacks: 'question'"),
        ([SUM, {"question": 1}], "items.jsonl:2: the template answer needs a field the item lacks: 'answer'"),
        ([{"question": None, "answer": 1}], "items.jsonl:1: the template prompt fails on this item"),
        ([{"question": 1, "answer": " "}], "items.jsonl:1: a reference answer must not be empty"),
        ([{"question": 1, "answer": []}], "items.jsonl:1: a reference answer must not be empty, but is []"),
        ([{"question": 1, "answer": [{}]}], "items.jsonl:1: an accepted answer must be text or a number"),
    ],
)
def test_items_that_cannot_be_used(load: Load, items: list[Any] | bytes, message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load(items)


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        (None, 0, "grader choice needs the field 'choices', a list of at least 2, but it is None"),
        (["a"], 0, "a list of at least 2, but it is ['a']"),
        (["a", "a"], 0, "choices must differ and not be empty"),
        (["a", ""], 0, "choices must differ and not be empty"),
        (["a", None], 0, "a choice must be text or a number, but is None"),
        (["a", "b"], 2, "one of the choices or a position from 0 to 1, but is '2'"),
        (["a", "b"], -1, "one of the choices or a position from 0 to 1, but is '-1'"),
        (["a", "b"], "c", "one of the choices or a position from 0 to 1, but is 'c'"),
        (["a", "b"], True, "one of the choices or a position from 0 to 1, but is 'True'"),
        ([1, 2], 1, "the answer 1 is a choice and the position of another"),
    ],
)
def test_choices_that_cannot_be_used(load: Load, choices: Any, answer: Any, message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape("items.jsonl:1: ") + ".*" + re.escape(message)):
        load([{"question": "?", "choices": choices, "answer": answer}], grader="choice")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"choices": ["B", "A"]}, "the choice 'B' is the letter of another one (['B', 'A'])"),
        ({"choices": ["x", "(a)"]}, "the choice '(a)' is the letter of another one"),
        ({"choices": [f"c{n}" for n in range(27)]}, "choices by letter must be at most 26, but are 27"),
        ({"choices": ["x", "y"], "options": "z"}, "the field 'options' hides the lettered choices"),
    ],
)
def test_choices_that_letters_cannot_name(load: Load, item: dict[str, Any], message: str) -> None:
    keys = {"prompt": "{{ question }} {{ options }}", "grader": {"name": "choice", "by": "generation"}}
    with pytest.raises(BenchmarkError, match=re.escape("items.jsonl:1: ") + ".*" + re.escape(message)):
        load([{"question": "?", "answer": 0, **item}], **keys)
    own = {"prompt": "{{ question }} {{ choices | join('/') }}", "grader": keys["grader"]}
    letters = {"question": "?", "choices": ["A", "b"], "answer": 1}
    assert load([letters], **own).items[0].prompt == "? A/b"


def test_an_answer_that_the_model_has_no_room_for(tmp_path: Path) -> None:
    path = write(tmp_path, [SUM], max_tokens=64)
    with pytest.raises(
        BenchmarkError, match="max_tokens must be less than the model's length of 64 tokens, but is 64"
    ):
        load_benchmark(path, Context(max_model_len=64))
    assert load_benchmark(path, Context(max_model_len=65)).items


def test_references_that_the_grader_or_metric_cannot_use(load: Load) -> None:
    with pytest.raises(BenchmarkError, match=r"items.jsonl:2: grader numeric needs a number .* it is 'two'"):
        load([SUM, {"question": "1+1", "answer": ["2", "two"]}], grader="numeric")
    assert load([SUM], grader="numeric").form.grader == Numeric()
    with pytest.raises(
        BenchmarkError, match=r"items.jsonl:1: metric loglikelihood needs one reference answer"
    ):
        load([{"question": "1+1", "answer": ["2", "two"]}], metric="loglikelihood", grader=None)


def test_few_shot_examples_must_be_there_and_must_not_be_evaluated(load: Load, tmp_path: Path) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"id": "other", "question": "1+1", "answer": 2}\n')
    with pytest.raises(
        BenchmarkError, match=r"items.jsonl:1: item '1' is also a few-shot example \(.*shots.jsonl:1\)"
    ):
        load([SUM], few_shot={"count": 1, "items": "shots.jsonl"})
    with pytest.raises(BenchmarkError, match=r"few_shot: count is 2, but .*shots.jsonl holds 1 examples"):
        load([SUM], few_shot={"count": 2, "items": "shots.jsonl"})
    assert (
        load([SUM], few_shot={"count": 0, "items": "shots.jsonl"}).items[0].prompt == "Question: 1+1\nAnswer:"
    )


def test_templates_are_sandboxed(load: Load) -> None:
    for prompt in ("{{ question.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ range(10**9) }}"):
        with pytest.raises(BenchmarkError, match=r"items.jsonl:1: the template prompt"):
            load([SUM], prompt=prompt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a mapping of keys to values, but is None"),
        (b"- name", "must be a mapping of keys to values, but is ['name'] (list)"),
        (b"name: a\nname: b\n", "sums.yaml:2: not valid YAML: key 'name' is given twice"),
        (b"name: a\nprompt: {{ question }}\n", "sums.yaml:2: not valid YAML"),
        (b"name: 'a\n", "not valid YAML"),
        (b"name: \xff", "sums.yaml: must be UTF-8"),
        (b"name: 2024-13-45\n", "not valid YAML"),
        (b"[" * 600, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "sums.yaml"
    path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load_benchmark(path)


def test_specs_are_files_or_directories(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [SUM], name=name)
    assert [b.name for b in load_benchmarks([str(tmp_path / "b"), str(tmp_path / "a" / "sums.yaml")])] == [
        "b",
        "a",
    ]
    with pytest.raises(BenchmarkError, match=r"'a' is in .*sums.yaml and in .*sums.yaml"):
        load_benchmarks([str(tmp_path / "a"), str(tmp_path / "a")])
    with pytest.raises(BenchmarkError, match=r"holds no \*.yaml benchmark file"):
        load_benchmarks([str(tmp_path)])
    with pytest.raises(BenchmarkError, match="but there is none"):
        load_benchmarks([str(tmp_path / "none.yaml")])
    with pytest.raises(BenchmarkError, match="at least one benchmark"):
        load_benchmarks([])
