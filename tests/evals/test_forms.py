import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask

from mergemix.evals.benchmark import Benchmark, Context, load_benchmark
from mergemix.evals.choices import NORMALIZED_BY
from mergemix.evals.forms import ChoiceLikelihood, ReferenceText, pass_at_k
from mergemix.evals.items import Item
from mergemix.evals.suite import Score
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood
from tests.evals.benchmark_files import SUM, write

Load = Callable[..., Benchmark]
CHOICES = [{"question": "France?", "choices": ["Rome", "Paris"], "answer": "Paris"}]
DRAWN: dict[str, Any] = {"samples": 4, "temperature": 0.5, "top_p": 0.9}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(items: list[Any], /, seed: int = 0, **keys: Any) -> Benchmark:
        return load_benchmark(write(tmp_path, items, **keys), Context(seed=seed))

    return load


def written(*texts: str) -> list[Generated]:
    return [Generated(text, 1) for text in texts]


@settings(deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 9))
    right, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_pass_at_k_is_a_probability_that_grows_with_k(samples: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, samples))
    estimates = [pass_at_k(samples, right, k) for k in range(1, samples + 1)]
    assert estimates[0] == pytest.approx(right / samples)
    assert estimates == sorted(estimates)
    assert estimates[-1] == (1.0 if right else 0.0)


def test_samples_have_seeds_of_their_own(load: Load) -> None:
    benchmark = load([SUM, {"question": "1+2", "answer": 3}], stop=["\n"], max_tokens=8, **DRAWN)
    requests = [request for index in (0, 1) for request in benchmark.requests(index)]
    assert len({request.seed for request in requests}) == 8
    assert all(0 <= request.seed < 2**63 for request in requests)
    assert requests[0] == Generate("Question: 1+1\nAnswer:", 8, ("\n",), 0.5, 0.9, requests[0].seed)
    assert requests == [request for index in (0, 1) for request in benchmark.requests(index)]


def test_seeds_come_from_study_benchmark_item_and_sample(load: Load) -> None:
    first = load([SUM], **DRAWN).requests(0)
    assert load([SUM], **DRAWN).requests(0) == first
    assert load([SUM], **{**DRAWN, "samples": 2}).requests(0) == first[:2]
    others = [
        load([SUM], seed=1, **DRAWN),
        load([SUM], name="other", **DRAWN),
        load([{"id": "x", **SUM}], **DRAWN),
    ]
    for other in others:
        assert not {request.seed for request in other.requests(0)} & {request.seed for request in first}


def test_a_greedy_benchmark_does_not_depend_on_the_seed(load: Load) -> None:
    first, second = load([SUM], seed=1), load([SUM], seed=2)
    assert first.requests(0) == second.requests(0)
    assert first.fingerprint() == second.fingerprint()
    assert load([SUM], seed=1, **DRAWN).fingerprint() != load([SUM], seed=2, **DRAWN).fingerprint()


def test_the_mean_of_samples_and_pass_at_k(load: Load) -> None:
    answers = written("2", "3", " 2", "x")
    mean = load([SUM], **DRAWN)
    assert (mean.metric, mean.higher_is_better) == ("mean@4", True)
    assert mean.score(0, answers) == Score(0.5, '["2", "3", " 2", "x"]')
    passed = load([SUM], pass_at=2, **DRAWN)
    assert passed.metric == "pass@2"
    assert passed.score(0, answers).value == pytest.approx(5 / 6)
    assert load([SUM], temperature=0.5).metric == "accuracy"


def test_what_is_extracted_is_graded(load: Load) -> None:
    benchmark = load([SUM], extract={"name": "regex", "pattern": "= (.*)"})
    assert benchmark.score(0, written("1 + 1 = 2")) == Score(1.0, "1 + 1 = 2")
    assert benchmark.score(0, written("2")) == Score(0.0, "2")
    assert load([SUM], extract="last_line", grader="contains").score(0, written("2\n3")) == Score(0.0, "2\n3")


def test_choices_by_generation_are_shown_and_read_by_letter(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text(
        '{"question": "Italy?", "choices": ["Rome", "Oslo"], "answer": 0}\n'
    )
    benchmark = load(
        CHOICES,
        prompt="{{ question }}\n{{ options }}\n",
        grader={"name": "choice", "by": "generation"},
        few_shot={"count": 1, "items": "shots.jsonl"},
        max_tokens=4,
    )
    shot = "Italy?\nA. Rome\nB. Oslo\nA\n\n"
    assert benchmark.requests(0) == [Generate(f"{shot}France?\nA. Rome\nB. Paris\n", 4)]
    assert benchmark.score(0, written("B")) == Score(1.0, "B")
    assert benchmark.score(0, written("Rome")) == Score(0.0, "Rome")
    assert benchmark.score(0, written("neither")) == Score(0.0, "neither")


class LmEvalTask(ConfigurableTask):
    """Multiple choice of lm-eval, without a data set: the first choice is right."""

    OUTPUT_TYPE = "multiple_choice"
    multiple_input = multiple_target = 0
    config = SimpleNamespace(use_prompt=None, process_results=None)  # type: ignore[assignment]
    _metric_fn_list = dict.fromkeys(("acc", "acc_norm", "acc_bytes"))

    def __init__(self) -> None:
        """Nothing to load."""

    def doc_to_choice(self, doc: Any) -> list[str]:
        return list(doc)

    def doc_to_target(self, doc: Any) -> int:
        return 0


CHOICE_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(CHOICE_TEXT, st.floats(-50, -0.01), st.integers(1, 9)),
        min_size=2,
        max_size=5,
        unique_by=lambda drawn: drawn[0],
    )
)
def test_length_normalised_choice_is_what_lm_eval_reports(drawn: list[tuple[str, float, int]]) -> None:
    """acc, acc_norm and acc_bytes of ConfigurableTask.process_results in lm_eval/api/task.py."""
    choices, logprobs, tokens = zip(*drawn, strict=True)
    reported = LmEvalTask().process_results(choices, [(logprob, False) for logprob in logprobs])
    item = Item("1", "?", answers=choices[:1], choices=choices)
    outputs = [Likelihood(logprob, count, False) for logprob, count in zip(logprobs, tokens, strict=True)]
    for normalize, metric in (("none", "acc"), ("characters", "acc_norm"), ("bytes", "acc_bytes")):
        assert ChoiceLikelihood(normalize).score(item, outputs).value == reported[metric]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-50, -0.01), st.integers(1, 9)), min_size=2, max_size=5))
def test_choice_by_log_likelihood_of_a_token(drawn: list[tuple[float, int]]) -> None:
    choices = tuple(f"choice {number}" for number in range(len(drawn)))
    means = [logprob / count for logprob, count in drawn]
    assume(len(set(means)) == len(means))
    item = Item("1", "?", answers=choices[:1], choices=choices)
    score = ChoiceLikelihood("tokens").score(item, [Likelihood(lp, n, False) for lp, n in drawn])
    assert score.text == choices[means.index(max(means))]


def test_a_length_without_the_delimiter(load: Load) -> None:
    benchmark = load(
        [{"question": "?", "choices": ["ab", "abcd"], "answer": 0}],
        grader={"name": "choice", "normalize": "characters"},
    )
    assert benchmark.requests(0)[0] == LogLikelihood("Question: ?\nAnswer:", " ab")
    # -2.9 / 4 > -1.5 / 2, but with the delimiter -2.9 / 5 < -1.5 / 3.
    assert benchmark.score(0, [Likelihood(-1.5, 1, False), Likelihood(-2.9, 2, False)]) == Score(0.0, "abcd")
    assert set(NORMALIZED_BY) == {"none", "characters", "bytes", "tokens"}


@pytest.mark.parametrize(
    ("metric", "score", "higher"),
    [
        ("loglikelihood", -6.0, True),
        ("perplexity", math.exp(6 / 3), False),
        ("bits_per_byte", 6 / math.log(2) / len(" Zürich".encode()), False),
    ],
)
def test_metrics_of_reference_text(load: Load, metric: str, score: float, higher: bool) -> None:
    benchmark = load([{"question": "?", "answer": "Zürich"}], metric=metric, grader=None)
    assert (benchmark.metric, benchmark.higher_is_better) == (metric, higher)
    assert benchmark.requests(0) == [LogLikelihood("Question: ?\nAnswer:", " Zürich")]
    assert benchmark.score(0, [Likelihood(-6.0, 3, False)]).value == pytest.approx(score, rel=1e-15)


@pytest.mark.parametrize("metric", ["loglikelihood", "perplexity", "bits_per_byte"])
def test_a_text_may_stand_alone(load: Load, metric: str) -> None:
    benchmark = load([{"text": "It rained."}], prompt=None, grader=None, metric=metric, answer="{{ text }}")
    assert benchmark.requests(0) == [LogLikelihood("", "It rained.")]
    assert benchmark.items[0].num_bytes == len("It rained.")
    score = benchmark.score(0, [Likelihood(-6.0, 3, False, cut=2)])
    assert score.value is None
    assert score.error == "the text is 2 tokens longer than the model can read: cut it into several items"
    assert benchmark.score(0, [Likelihood(0.0, 0, False)]) == Score(
        None, error="the text gives no token to score"
    )


def test_bytes_are_those_that_the_engine_scores(load: Load) -> None:
    keys = {"metric": "bits_per_byte", "grader": None}
    # White space that ends a prompt is scored with what follows it.
    assert load([SUM], prompt="{{ question }}\n\n", **keys).items[0].num_bytes == len("\n\n2")
    assert load([SUM], prompt="{{ question }}", **keys).items[0].num_bytes == len(" 2")
    assert load([SUM], prompt="{{ question }}", delimiter="=", **keys).items[0].num_bytes == len("=2")


def test_bits_per_byte_of_all_texts_together(load: Load) -> None:
    items = [{"text": "ab"}, {"text": "cdefgh"}, {"text": "lost"}]
    benchmark = load(items, prompt=None, grader=None, metric="bits_per_byte", answer="{{ text }}")
    assert isinstance(benchmark.form, ReferenceText)
    scores = [benchmark.score(n, [Likelihood(lp, 1, False)]) for n, lp in enumerate((-4.0, -6.0))]
    report = benchmark.report([*scores, Score(None, error="too long")])
    assert report == {"bits_per_byte of all text": pytest.approx(10 / math.log(2) / 8)}
    assert benchmark.report([Score(None, error="too long")] * 3) == {}
    assert load([SUM]).report([Score(1.0)]) == {}
