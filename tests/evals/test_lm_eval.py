"""lm-eval tasks as benchmarks: specs, requests, scores and reports, against lm-eval's own evaluation."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals.lm_eval_tasks import LmEvalSpec, lm_eval_spec, load_lm_eval, parse_lm_eval
from mergemix.evals.lm_eval_tasks.adapter import EngineLM
from mergemix.evals.lm_eval_tasks.task import LmEvalBenchmark
from mergemix.evals.suite import Score, Suite
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output, Request
from tests.evals.lm_eval_fixture import give_chat_template, keep_data_in, write_tasks
from tests.serve.tiny_models import MAX_POSITIONS, tiny_llama

ALL = ["mm_sums", "mm_choices", "mm_endings", "mm_pages", "mm_blanks", "mm_chat"]


@dataclass
class Made:
    tasks: Path
    root: Path

    def load(self, spec: str, **options: Any) -> list[LmEvalBenchmark]:
        return load_lm_eval(parse_lm_eval(f"lm_eval:{spec}"), [self.tasks], self.root, None, **options)

    def one(self, spec: str, **options: Any) -> LmEvalBenchmark:
        [benchmark] = self.load(spec, **options)
        return benchmark


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    directory = tmp_path_factory.mktemp("lm-eval")
    root = tiny_llama(directory / "model", seed=1)
    give_chat_template(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_data_in(directory / "data", monkeypatch)
        monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval forks for its bootstrap
        yield Made(write_tasks(directory / "tasks"), root)


def answers(requests: Sequence[Request], seed: int) -> list[Output]:
    """Outputs that depend on each request and the seed alone; some texts hold digits and stop strings."""
    found: list[Output] = []
    for request in requests:
        digest = hashlib.sha256(f"{seed} {request}".encode()).digest()
        rng = random.Random(digest)
        if isinstance(request, Generate):
            found.append(Generated("".join(rng.choices("0123456789 \nQ:x.", k=rng.randint(0, 6))), 3))
        else:
            found.append(Likelihood(-rng.expovariate(0.1), len(request.continuation), rng.random() < 0.3))
    return found


# Specs


@given(
    task=st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
    few_shot=st.none() | st.integers(0, 9),
    limit=st.none() | st.integers(1, 9) | st.floats(0.01, 0.99),
    chat_template=st.booleans(),
    metric=st.none() | st.just("acc_norm"),
    filter=st.none() | st.just("strict-match"),
    name=st.none() | st.just("mine"),
    capability=st.none() | st.just("math"),
)
def test_a_spec_in_text_is_the_same_as_in_a_file(**values: Any) -> None:
    given_values = {key: value for key, value in values.items() if value is not None}
    text = "lm_eval:" + given_values["task"]
    for key, value in given_values.items():
        if key != "task":
            text += f",{key}={str(value).lower() if isinstance(value, bool) else value}"
    given_values["lm_eval"] = given_values.pop("task")
    assert parse_lm_eval(text) == lm_eval_spec(given_values, "x.yaml") == LmEvalSpec(**values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_eval:", "lm_eval must name a task"),
        ("lm_eval:x,few_shot", "key=value .* 'few_shot'"),
        ("lm_eval:x,few_shot=-1", "few_shot must be a whole number >= 0, but is -1"),
        ("lm_eval:x,few_shot=many", "few_shot must be a whole number >= 0, but is 'many'"),
        ("lm_eval:x,limit=0", "limit must be .* but is 0"),
        ("lm_eval:x,limit=1.5", "limit must be .* but is 1.5"),
        ("lm_eval:x,limit=1,limit=2", "limit is given twice"),
        ("lm_eval:x,chat_template=yes", "chat_template must be true or false"),
        ("lm_eval:x,few_shots=1", "unknown key 'few_shots'; did you mean 'few_shot'"),
        ("lm_eval:x,capability=macro", "must not be 'macro'"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        parse_lm_eval(text)


def test_lm_eval_is_imported_only_for_a_task() -> None:
    code = (
        "import sys; from mergemix.evals.lm_eval_tasks import load_lm_eval, parse_lm_eval; "
        "parse_lm_eval('lm_eval:gsm8k'); "
        "assert not {'lm_eval', 'datasets', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Requests and reports


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_answered_the_report_is_lm_evals(made: Made, seed: int) -> None:
    asked: dict[str, list[Request]] = {}
    for name, kind in [*((name, "hf") for name in ALL), ("mm_pages", "vllm")]:
        requests: list[Request] = []

        def submit(given: Sequence[Request], kept: list[Request] = requests) -> list[Output]:
            kept.extend(given)
            return answers(given, seed)

        chat = name == "mm_chat"
        theirs = lm_eval.simple_evaluate(
            model=EngineLM(made.root, kind, None, submit),  # type: ignore[arg-type]
            tasks=[name],
            task_manager=TaskManager(include_path=str(made.tasks), include_defaults=False),
            apply_chat_template=chat,
            bootstrap_iters=2,
        )["results"][name]
        benchmark = made.one(f"{name},chat_template={str(chat).lower()}", engine=kind)
        suite = Suite([benchmark])
        batch = suite.batch()
        batch.grade(enumerate(answers(batch.requests, seed + 1)))  # another candidate
        results = batch.grade(list(enumerate(answers(batch.requests, seed)))[::-1])
        [report] = suite.report(results).values()
        assert {key: theirs[key] for key in report} == report
        assert {key for key in theirs if "," in key and "stderr" not in key} <= set(report)
        assert set(requests) == set(batch.requests)
        asked[f"{name} {kind}"] = requests
        # A study that is resumed has the texts alone.
        again = made.one(f"{name},chat_template={str(chat).lower()}", engine=kind)
        assert again.report([Score(each.score, each.text) for each in results]) == report
        [scores] = suite.item_scores(results).values()
        expected = float(np.mean(scores))
        found = report.get(f"{benchmark.metric},none", report.get(f"{benchmark.metric},strict"))
        if benchmark.metric.startswith("-log("):
            metric = benchmark.metric.removeprefix("-log(").removesuffix(")")
            found = -math.log(report[f"{metric},none"])
        if name != "mm_chat":
            assert found == pytest.approx(expected, rel=1e-12)
    assert asked["mm_pages hf"] != asked["mm_pages vllm"]


def test_bits_per_byte_are_negated_and_a_loss_keeps_its_direction(made: Made) -> None:
    bits, loss = made.one("mm_pages,metric=bits_per_byte"), made.one("mm_blanks,metric=surprise")
    assert (bits.metric, bits.higher_is_better) == ("-bits_per_byte", True)
    assert (loss.metric, loss.higher_is_better) == ("surprise", False)
    suite = Suite([bits])
    results = suite.batch().grade(enumerate(answers(suite.batch().requests, 3)))
    mean = float(np.mean([result.score for result in results]))
    assert suite.report(results)["mm_pages"]["bits_per_byte,none"] == pytest.approx(-mean, rel=1e-12)


def test_a_chosen_filter_gives_the_score(made: Made) -> None:
    strict, letter = made.one("mm_sums"), made.one("mm_sums,filter=letter,name=other")
    right = str(strict._docs[0][0].doc["answer"])[0]
    output = [Generated(f"  {right} or so", 4)]
    assert strict.score(0, output).value == 0
    expected = float(len(strict._docs[0][0].doc["answer"]) == 1)
    assert letter.score(0, output).value == expected
    assert letter.score(0, [Generated("x", 1)]).value == 0
    assert (strict.name, letter.name) == ("mm_sums", "other")


def test_a_group_is_its_leaf_tasks_and_one_capability(made: Made) -> None:
    group = made.load("mm_group")
    assert [each.name for each in group] == ["mm_sums", "mm_choices", "mm_endings"]
    assert {each.capability for each in group} == {"mm_group"}
    assert [each.capability for each in made.load("mm_arithmetic,capability=math")] == ["math", "math"]
    assert {each.name for each in made.load("mm_arithmetic")} == {"mm_chat", "mm_sums"}
    assert made.one("mm_pages").capability == "mm_pages"
    file = made.one(str(made.tasks / "pages.yaml"))
    assert (file.name, file.capability) == ("mm_pages", "mm_pages")
    assert [len(each.item_ids) for each in made.load("mm_group,limit=0.2")] == [3, 4, 3]


def test_a_greedy_answer_is_asked_for_once_and_drawn_ones_have_their_own_seeds(made: Made) -> None:
    chat = made.one("mm_chat,chat_template=true")
    assert len(chat.requests(0)) == 1
    score = chat.score(0, [Generated("12 </turn> 7", 3)])
    assert json.loads(score.text or "") == [["12 ", "12 ", "12 "]]
    drawn = made.one("mm_sampled")
    requests = [request for index in range(2) for request in drawn.requests(index)]
    assert len({request.seed for request in requests if isinstance(request, Generate)}) == 6
    assert all(
        (request.temperature, request.top_p) == (0.7, 0.9)
        for request in requests
        if isinstance(request, Generate)
    )
    score = drawn.score(0, [Generated(text, 1) for text in "abc"])
    assert json.loads(score.text or "") == [["a", "b", "c"]]


def test_outputs_that_are_no_answers_fail_the_candidate(made: Made) -> None:
    endings, sums = made.one("mm_endings"), made.one("mm_sums")
    with pytest.raises(EngineError, match="must be finite, but is nan in document 2 of mm_endings"):
        endings.score(2, [Likelihood(math.nan, 1, False)])
    with pytest.raises(EngineError, match="answered a log-likelihood with Generated"):
        endings.score(0, [Generated("x", 1)])
    with pytest.raises(EngineError, match="answered a generation with Likelihood"):
        sums.score(0, [Likelihood(-1.0, 1, False)])
    scores = [endings.score(index, [Likelihood(-1.0, 1, True)]) for index in range(len(endings.item_ids))]
    assert endings.report(scores)["perplexity,none"] == pytest.approx(math.e)
    assert endings.report([*scores[:-1], Score(None, None, "the grader failed")]) == {}


# Errors


def test_what_a_task_does_not_have_is_refused_with_what_it_has(made: Made) -> None:
    for spec, message in [
        ("mm_sums,metric=acc", "unknown metric 'acc'; known: exact_match"),
        ("mm_sums,filter=strct", r"did you mean 'strict'\? \(known: strict, letter\)"),
        ("mm_chat,metric=bleu", "bleu is not.*take one of exact_match"),
        ("mm_choices,metric=brier_score", "take one of acc, acc_norm, acc_mutual_info"),
        ("mm_group,name=x", "mm_group holds 3: leave it out"),
        ("mm_sums,few_shot=99", "mm_sums: lm-eval cannot make its requests: ValueError: Sample larger"),
    ]:
        with pytest.raises(BenchmarkError, match=message):
            made.load(spec)


COMMON = "dataset_path: json\ntest_split: test\ndoc_to_target: answer\n"
DATA = "dataset_kwargs: {data_files: {test: DIRECTORY/sums.jsonl}}\n"


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (f"{COMMON}{DATA}doc_to_text: '{{{{question'", "TemplateSyntaxError"),
        (f"{COMMON}{DATA}doc_to_txt: question", "unexpected keyword argument 'doc_to_txt'"),
        (
            f"{COMMON}dataset_kwargs: {{data_files: {{test: /nowhere/x.jsonl}}}}\ndoc_to_text: question",
            "its json files could not be loaded .*x.jsonl.*relative to the current directory",
        ),
        (f"{COMMON}{DATA}doc_to_text: question\nunsafe_code: true", "without a sandbox"),
        (f"{COMMON}{DATA}doc_to_text: question\ndoc_to_image: [x]", "images or sounds"),
        (
            f"{COMMON}{DATA}doc_to_text: question\ngeneration_kwargs: {{until: [], num_beams: 4}}",
            "num_beams: 4",
        ),
        (
            f"{COMMON}{DATA}doc_to_text: question\ngeneration_kwargs: {{until: [], do_sample: true}}",
            "do_sample needs a temperature above 0",
        ),
        (
            f"{COMMON}{DATA}doc_to_text: question\ngeneration_kwargs: {{until: [], max_gen_toks: 999}}",
            f"less than the model's length of {MAX_POSITIONS} tokens, but is 999",
        ),
        (
            f"{COMMON}{DATA}doc_to_text: question\nmetric_list: [{{metric: bleu, aggregation: bleu}}]\n"
            "generation_kwargs: {until: [], max_gen_toks: 4}",
            "mean over documents, but the task has only bleu",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_one_message(
    made: Made, tmp_path: Path, yaml: str, message: str
) -> None:
    text = f"task: mm_bad\n{yaml}\n".replace("DIRECTORY", str(made.tasks))
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(BenchmarkError, match=message) as caught:
        load_lm_eval(LmEvalSpec("mm_bad"), [tmp_path], made.root, None)
    assert "\n" not in str(caught.value)


def test_an_empty_page_is_refused(made: Made, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "pages.jsonl").write_text('{"page": "one"}\n{"page": ""}\n')
    with pytest.raises(BenchmarkError, match="mm_pages: document 1 is empty"):
        load_lm_eval(LmEvalSpec("mm_pages"), [tasks], made.root, None)


def test_a_chat_template_is_needed_for_one(made: Made, tmp_path: Path) -> None:
    root = tiny_llama(tmp_path / "model", seed=1)
    with pytest.raises(BenchmarkError, match="chat_template needs a tokenizer with a chat template"):
        load_lm_eval(LmEvalSpec("mm_chat", chat_template=True), [made.tasks], root, None)
    with pytest.raises(BenchmarkError, match="--include-path must be a directory"):
        load_lm_eval(LmEvalSpec("mm_chat"), [tmp_path / "none"], made.root, None)


def test_a_name_unknown_to_lm_eval_and_a_data_set_that_is_not_here(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With lm-eval's whole index, which takes seconds to read."""
    (tmp_path / "broken.yaml").write_text("task: mm_broken\ndoc_to_text: 'x\n")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    for spec, message in [
        ("gsm9k", "no task, group or tag .* did you mean 'gsm8k'"),
        ("mm_broken", r"broken\.yaml could not be read"),
        ("gsm8k", "needs the data set 'openai/gsm8k main'.*OfflineModeIsEnabled.*HF_HOME.*--include-path"),
    ]:
        with pytest.raises(BenchmarkError, match=message):
            load_lm_eval(LmEvalSpec(spec), [tmp_path], made.root, None)
    from huggingface_hub import constants

    assert not constants.HF_HUB_OFFLINE


# What else a study relies on


def test_the_fingerprint_is_of_the_scores_and_not_of_the_place(made: Made, tmp_path: Path) -> None:
    def fingerprint(tasks: Path, spec: str) -> str:
        [benchmark] = load_lm_eval(parse_lm_eval(f"lm_eval:{spec}"), [tasks], made.root, None)
        return benchmark.fingerprint()

    copy = write_tasks(tmp_path / "copy")
    specs = [
        *(
            "mm_sums",
            "mm_sums,few_shot=1",
            "mm_sums,limit=3",
            "mm_sums,filter=letter",
            "mm_sums,capability=x",
        ),
        *("mm_sums,chat_template=true", "mm_blanks", "mm_blanks,metric=surprise"),
    ]
    found = [fingerprint(made.tasks, spec) for spec in specs]
    assert len(set(found)) == len(specs)
    assert [fingerprint(copy, spec) for spec in specs] == found
    changes = [("sums.jsonl", '"answer": "', '"answer": "1'), ("blanks.py", ">= max", "> min")]
    for (name, old, new), spec in zip(changes, ("mm_sums", "mm_blanks"), strict=True):
        text = (copy / name).read_text()
        assert old in text
        (copy / name).write_text(text.replace(old, new))
        assert fingerprint(copy, spec) != fingerprint(made.tasks, spec), name


def test_loading_leaves_random_numbers_and_stdout_alone(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    made.one("mm_sums")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index, union-attr]
    assert capsys.readouterr().out == ""


def test_a_task_that_sets_no_examples_keeps_none(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = (made.tasks / "sums.yaml").read_text()
    (tmp_path / "zero.yaml").write_text(text.replace("num_fewshot: 3", "num_fewshot: 0"))
    [zero] = load_lm_eval(LmEvalSpec("mm_sums", few_shot=2), [tmp_path], made.root, None)
    assert "few_shot 2 has no effect" in caplog.text
    lengths = [
        len(request.prompt)
        for benchmark in (zero, made.one("mm_sums,few_shot=2"))
        for request in benchmark.requests(0)
        if isinstance(request, Generate)
    ]
    assert lengths[0] < lengths[1] - 20


def test_requests_are_in_ids_that_fit_the_kind_of_engine(made: Made) -> None:
    for kind, most in (("hf", MAX_POSITIONS + 1), ("vllm", MAX_POSITIONS - 1)):
        pages = made.one("mm_pages", engine=kind)
        lengths = [
            len(request.context) + len(request.continuation)
            for index in range(len(pages.item_ids))
            for request in pages.requests(index)
            if isinstance(request, LogLikelihood)
        ]
        assert max(lengths) == most
