"""A benchmark: a YAML file, its items, and how an engine's answers to them become scores.

The format is described in docs/benchmarks.md. Everything is checked and rendered when the file is
loaded, so that a search never meets a bad item.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals import code
from mergemix.evals.chat import ChatTemplate
from mergemix.evals.files import Section, read_records, read_yaml
from mergemix.evals.form_keys import FORM_KEYS, grader_of, read_form
from mergemix.evals.forms import Form, Generation, ReferenceText
from mergemix.evals.graders import Code
from mergemix.evals.items import Item, ItemBuilder
from mergemix.evals.suite import Benchmark as AnyBenchmark
from mergemix.evals.suite import Score
from mergemix.serve.engine import Generated, Likelihood, Output, Request

LM_EVAL = "lm_eval"
_KEYS = (
    "name",
    "capability",
    "items",
    "chat",
    "system",
    "prompt",
    "answer",
    "delimiter",
    "few_shot",
    *FORM_KEYS,
    "limit",
)
# Part of every fingerprint: raise it when a change of this code gives the same answers other scores.
_SCORING_VERSION = 2


@dataclass(frozen=True)
class Context:
    """What benchmarks need to know of a study.

    root: directory of the checkpoint whose tokenizer and chat template make prompts; None where no benchmark needs one.
    include_paths: directories with lm-eval task files. allow_code: what a model writes may run, in a sandbox.
    max_model_len: tokens of prompt plus answer; None is the model's own limit. engine: which will answer. seed: of the
    study.
    """

    root: Path | None = None
    include_paths: Sequence[Path] = ()
    allow_code: bool = False
    max_model_len: int | None = None
    engine: Literal["hf", "vllm"] = "vllm"
    seed: int = 0

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Raises BenchmarkError when there is none."""
        if self.root is None:
            raise BenchmarkError(
                "chat: true needs a checkpoint, whose chat template makes the prompt, but none is given"
            )
        return ChatTemplate(self.root)


@dataclass(frozen=True)
class Benchmark:
    """Items with one form of asking and scoring them."""

    name: str
    capability: str
    form: Form
    items: tuple[Item, ...]
    source: str

    @property
    def metric(self) -> str:
        return self.form.metric

    @property
    def higher_is_better(self) -> bool:
        return self.form.higher_is_better

    @property
    def slow_to_score(self) -> bool:
        """Scoring waits for other processes, so that several threads, which may call `score` at once, are faster."""
        return isinstance(self.form, Generation) and isinstance(self.form.grader, Code)

    @property
    def item_ids(self) -> tuple[str, ...]:
        return tuple(item.id for item in self.items)

    def requests(self, index: int) -> list[Request]:
        """What the engine is asked for one item: generations, or log-likelihoods of the possible answers."""
        return self.form.requests(self.items[index])

    def score(self, index: int, outputs: Sequence[Output]) -> Score:
        """From the outputs of `requests(index)`, in their order.

        Raises EngineError when an output is of the wrong kind or a log-likelihood is not finite: the
        candidate has then failed, which is not the same as a low score.
        """
        item = self.items[index]
        if isinstance(self.form, Generation):
            return self.form.score(item, [self._generated(output) for output in outputs])
        return self.form.score(item, [self._likelihood(item, output) for output in outputs])

    def _generated(self, output: Output) -> Generated:
        if not isinstance(output, Generated):
            raise EngineError(f"{self.name}: the engine answered a generation with {type(output).__name__}")
        return output

    def _likelihood(self, item: Item, output: Output) -> Likelihood:
        if not isinstance(output, Likelihood):
            raise EngineError(
                f"{self.name}: the engine answered a log-likelihood with {type(output).__name__}"
            )
        if not math.isfinite(output.logprob):
            raise EngineError(
                f"{self.name}: a log-likelihood must be finite, but is {output.logprob} on item {item.id!r}: "
                "the merged weights give no usable probabilities"
            )
        return output

    def report(self, scores: Sequence[Score]) -> dict[str, float]:
        return self.form.report(self.items, scores) if isinstance(self.form, ReferenceText) else {}

    def fingerprint(self) -> str:
        """Hex digest of all that determines the scores, and of nothing else: paths may change."""
        content = [_SCORING_VERSION, self.name, self.capability, self.form, self.items]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_named_fields).encode()).hexdigest()


def _named_fields(value: Any) -> list[Any]:
    """A dataclass with its name, so that two kinds with the same options differ."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return [type(value).__name__, fields]


def load_benchmark(path: Path, context: Context | None = None) -> Benchmark:
    """Read a benchmark file and its items.

    Raises BenchmarkError naming file, line (of an item) and rule; see docs/benchmarks.md for the keys. ConfigError for
    code on a machine that cannot confine it.
    """
    return _benchmark(read_yaml(path), path, context or Context())


def _benchmark(values: dict[str, Any], path: Path, context: Context) -> Benchmark:
    where = str(path)
    section = Section(values, where, _KEYS)
    name = section.name("name")
    capability = section.name("capability", name)
    if capability == "macro":
        raise BenchmarkError(f"{where}: capability must not be 'macro', which names the default utility")
    form = read_form(section, name, context.seed, context.max_model_len)
    limit = section.count("limit", None, least=1)
    grader = grader_of(form)
    builder = ItemBuilder(section, grader, _chat_template(section, context))
    if isinstance(grader, Code):
        code.check_allowed(where, context.allow_code)
    items_path = path.parent / section.text("items")
    records = read_records(items_path)[:limit]
    items = tuple(builder.item(record, items_path) for record in records)
    return Benchmark(name, capability, form, items, source=where)


def load_benchmarks(specs: Sequence[str], context: Context | None = None) -> list[AnyBenchmark]:
    """The benchmarks of all specs: benchmark files, directories of *.yaml files (taken by name), or "lm_eval:TASK".

    Raises BenchmarkError for a spec that is none of these, an empty directory, or a name used twice; and as
    `load_benchmark` does.
    """
    context = context or Context()
    benchmarks: dict[str, AnyBenchmark] = {}
    for benchmark in [benchmark for spec in specs for benchmark in _load(spec, context)]:
        if benchmark.name in benchmarks:
            first = benchmarks[benchmark.name].source
            raise BenchmarkError(
                f"benchmark names must be unique, but {benchmark.name!r} is in {first} and in {benchmark.source}"
            )
        benchmarks[benchmark.name] = benchmark
    if not benchmarks:
        raise BenchmarkError(
            "a search needs at least one benchmark: give --bench FILE.yaml, a directory of them, or lm_eval:TASK"
        )
    return list(benchmarks.values())


def _load(spec: str, context: Context) -> list[AnyBenchmark]:
    if spec.startswith(f"{LM_EVAL}:"):
        return _lm_eval(spec, None, context)
    benchmarks: list[AnyBenchmark] = []
    for path in _benchmark_files(spec):
        values = read_yaml(path)
        if LM_EVAL in values:
            benchmarks += _lm_eval(str(path), values, context)
        else:
            benchmarks.append(_benchmark(values, path, context))
    return benchmarks


def _lm_eval(where: str, values: dict[str, Any] | None, context: Context) -> list[AnyBenchmark]:
    """Of the text "lm_eval:...", or of the values of the benchmark file `where`."""
    if context.root is None:
        raise BenchmarkError(
            f"{where}: tasks of lm-eval need a checkpoint, whose tokenizer makes the prompts"
        )
    from mergemix.evals import lm_eval_tasks  # no other benchmark needs it

    spec = lm_eval_tasks.parse_lm_eval(where) if values is None else lm_eval_tasks.lm_eval_spec(values, where)
    return list(
        lm_eval_tasks.load_lm_eval(
            spec, context.include_paths, context.root, context.max_model_len, context.engine
        )
    )


def _benchmark_files(spec: str) -> list[Path]:
    path = Path(spec)
    if not path.is_dir():
        if not path.exists():
            raise BenchmarkError(
                f"{spec}: a benchmark must be a YAML file, a directory of *.yaml, or lm_eval:TASK, but there is "
                "none"
            )
        return [path]
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise BenchmarkError(f"{spec}: the directory holds no *.yaml benchmark file")
    return files


def _chat_template(section: Section, context: Context) -> ChatTemplate | None:
    if not section.flag("chat"):
        return None
    try:
        return context.chat_template
    except BenchmarkError as error:
        raise BenchmarkError(f"{section.where}: {error}") from error
