import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals import sandbox
from mergemix.evals.benchmark import Benchmark, Context, load_benchmark
from mergemix.evals.suite import Score, Suite
from mergemix.serve.engine import Generated
from tests.evals.benchmark_files import write

ALLOWED = Context(allow_code=True)
HEAD = 'def double(x):\n    """Twice x."""\n'
ITEM = {"prompt": HEAD, "test": "def check(f):\n    assert f(4) == 8", "entry_point": "double"}
GRADER = {"name": "code", "prefix": "{{ prompt }}", "tests": "{{ test }}\ncheck({{ entry_point }})"}


def load(directory: Path, context: Context = ALLOWED, /, items: Any = (ITEM,), **keys: Any) -> Benchmark:
    keys = {"prompt": "{{ prompt }}", "grader": GRADER, **keys}
    return load_benchmark(write(directory, list(items), **keys), context)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    sandbox.check_sandbox()
    return load(tmp_path_factory.mktemp("code"))


def test_a_completion_runs_between_prefix_and_tests(benchmark: Benchmark) -> None:
    [item] = benchmark.items
    assert item.tests is not None
    assert (item.tests.prefix, item.tests.suffix) == (HEAD, "")
    assert item.tests.tests == "def check(f):\n    assert f(4) == 8\ncheck(double)"
    assert benchmark.slow_to_score
    assert benchmark.metric == "accuracy"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("    return 2 * x\n", 1.0),
        ("    return x\n", 0.0),
        ("    return 2 *", 0.0),
        ("    raise SystemExit(0)\n", 0.0),
        ("", 0.0),
        ("Here:\n```python\ndef double(x):\n    return x + x\n```\nDone.", 1.0),
        ("First\n```\ndef double(x): return 0\n```\nno:\n```\ndef double(x): return 2 * x\n```\n", 1.0),
    ],
)
def test_answers_run_in_the_sandbox(benchmark: Benchmark, answer: str, score: float) -> None:
    assert benchmark.score(0, [Generated(answer, 1)]) == Score(score, answer)


def test_suffix_extraction_and_samples(tmp_path: Path) -> None:
    grader = {"name": "code", "tests": "assert one == 1", "suffix": "\none = ONE\n"}
    drawn = {"samples": 3, "temperature": 1, "pass_at": 2, "extract": "code_block"}
    benchmark = load(tmp_path, grader=grader, **drawn)
    answers = ["```\nONE = 1\n```", "```\nONE = 2\n```", "ONE = 1"]  # no block, so nothing is extracted
    assert benchmark.score(0, [Generated(answer, 1) for answer in answers]).value == pytest.approx(2 / 3)


def test_a_timeout_is_a_zero(tmp_path: Path) -> None:
    benchmark = load(tmp_path, grader={**GRADER, "timeout_s": 0.5})
    assert benchmark.score(0, [Generated("    while True: pass\n", 1)]).value == 0.0


def test_a_longer_timeout_allows_as_much_cpu_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        sandbox, "run_tests", lambda *_, limits: given.append(limits) or sandbox.Verdict(True, "", "")
    )
    load(tmp_path, grader={**GRADER, "timeout_s": 29.5}).score(0, [Generated("", 1)])
    load(tmp_path).score(0, [Generated("", 1)])
    assert given == [sandbox.Limits(wall_s=29.5, cpu_s=30), sandbox.Limits()]


def test_answers_are_scored_in_several_threads(benchmark: Benchmark) -> None:
    answers = [f"    return {factor} * x\n" for factor in (1, 2, 3, 2)]
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda answer: benchmark.score(0, [Generated(answer, 1)]).value, answers))
    assert scores == [0.0, 1.0, 0.0, 1.0]


def test_a_sandbox_that_breaks_is_an_error_of_the_item(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> object:
        raise OSError("no more processes")

    monkeypatch.setattr(sandbox, "run_tests", broken)
    [result] = Suite([benchmark]).batch().grade([(0, Generated("    return 2 * x\n", 1))])
    assert (result.score, result.error) == (None, "OSError: no more processes")


def test_code_is_off_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BenchmarkError, match=r"sums.yaml: grader code runs .*allow it with --allow-code-execution"
    ):
        load(tmp_path, Context())

    def lacking() -> None:
        raise ConfigError("the sandbox refuses to run code")

    monkeypatch.setattr(sandbox, "check_sandbox", lacking)
    with pytest.raises(ConfigError, match="refuses"):
        load(tmp_path)


def test_examples_of_code_show_a_reference_solution(tmp_path: Path) -> None:
    shot = {"prompt": "def one():\n", "solution": "    return 1\n"}
    write(tmp_path, [shot])
    (tmp_path / "items.jsonl").rename(tmp_path / "shots.jsonl")
    few_shot = {"count": 1, "items": "shots.jsonl"}
    benchmark = load(tmp_path, answer="{{ solution }}", few_shot=few_shot, delimiter="")
    assert benchmark.items[0].prompt == "def one():\n    return 1\n\n\n" + HEAD
    with pytest.raises(BenchmarkError, match=r"items.jsonl:1: item '1' is also a few-shot example"):
        load(tmp_path, items=[{**ITEM, "prompt": "def one():\n"}], answer="{{ solution }}", few_shot=few_shot)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grader": "code"}, "sums.yaml: grader code: needs the option 'tests'"),
        ({"grader": {**GRADER, "timeout_s": 0}}, "timeout_s must be a number of seconds > 0, but is 0"),
        ({"grader": {**GRADER, "timeout_s": True}}, "timeout_s must be a number"),
        ({"grader": {**GRADER, "tests": "{{ test"}}, "grader code: the template tests does not parse"),
        ({"grader": {**GRADER, "prefix": "{{ head }}"}}, "items.jsonl:1: the template prefix needs a field"),
        ({"grader": {**GRADER, "tests": " "}}, "items.jsonl:1: grader code needs unit tests"),
        ({"grader": {**GRADER, "tests": "assert ("}}, "items.jsonl:1: unit tests must be Python"),
        ({"answer": "{{ test }}"}, "grader code compares with no reference answer; remove 'answer'"),
    ],
)
def test_a_code_benchmark_that_makes_no_sense(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load(tmp_path, **keys)
