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
from pathlib import Path

from mergemix.errors import BenchmarkError, EngineError
from mergemix.evals import graders
from mergemix.evals.files import Section, read_records, read_yaml
from mergemix.evals.graders import Choice, Grader
from mergemix.evals.items import Item, ItemBuilder, delimiter_after
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output, Request

METRICS = ("accuracy", "loglikelihood")
DEFAULT_MAX_TOKENS = 256
_KEYS = (
    "name",
    "capability",
    "items",
    "prompt",
    "answer",
    "delimiter",
    "few_shot",
    "stop",
    "max_tokens",
    "grader",
    "metric",
    "limit",
)
# Part of every fingerprint: raise it when a change of this code gives the same answers other scores.
_SCORING_VERSION = 1


@dataclass(frozen=True)
class Benchmark:
    """Items with one way of asking and grading them.

    metric: "accuracy" is the mean grade; "loglikelihood" the mean over items of the log-likelihood of
    the reference answer after the prompt, in nats, summed over the answer's tokens. Higher is better
    in both. grader: None for loglikelihood. delimiter: stands between prompt and answer; None is one
    space, or nothing after a prompt that ends in white space.
    """

    name: str
    capability: str
    metric: str
    grader: Grader | None
    items: tuple[Item, ...]
    delimiter: str | None
    stop: tuple[str, ...]
    max_tokens: int
    source: Path

    def requests(self, item: Item) -> list[Request]:
        """What the engine is asked for one item: a generation, or one log-likelihood per possible answer."""
        if self.grader is not None and not isinstance(self.grader, Choice):
            return [Generate(item.prompt, self.max_tokens, self.stop)]
        answers = item.choices or item.answers
        return [
            LogLikelihood(item.prompt, delimiter_after(item.prompt, self.delimiter) + answer)
            for answer in answers
        ]

    def score(self, item: Item, outputs: Sequence[Output]) -> tuple[float, str | None]:
        """(score, what was answered or None) from the outputs of `requests(item)`, in their order.

        Raises EngineError when an output is of the wrong kind or a log-likelihood is not finite: the
        candidate has then failed, which is not the same as a low score.
        """
        if self.grader is not None and not isinstance(self.grader, Choice):
            [output] = outputs
            if not isinstance(output, Generated):
                raise EngineError(
                    f"{self.name}: the engine answered a generation with {type(output).__name__}"
                )
            return graders.grade(self.grader, output.text, item.answers), output.text
        logprobs = [self._logprob(item, output) for output in outputs]
        if self.grader is None:
            [logprob] = logprobs
            return logprob, None
        chosen = item.choices[graders.most_likely(logprobs)]
        return float(chosen == item.answers[0]), chosen

    def _logprob(self, item: Item, output: Output) -> float:
        if not isinstance(output, Likelihood):
            raise EngineError(
                f"{self.name}: the engine answered a log-likelihood with {type(output).__name__}"
            )
        if not math.isfinite(output.logprob):
            raise EngineError(
                f"{self.name}: a log-likelihood must be finite, but is {output.logprob} on item {item.id!r}: "
                "the merged weights give no usable probabilities"
            )
        return output.logprob

    def fingerprint(self) -> str:
        """Hex digest of all that determines the scores, and of nothing else: paths may change."""
        grader = self.grader and [type(self.grader).__name__, dataclasses.asdict(self.grader)]
        content = {
            "version": _SCORING_VERSION,
            **{
                key: getattr(self, key)
                for key in ("name", "capability", "metric", "delimiter", "stop", "max_tokens")
            },
            "grader": grader,
            "items": [[item.id, item.prompt, item.answers, item.choices] for item in self.items],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_benchmark(path: Path) -> Benchmark:
    """Read a benchmark file and its items.

    Raises BenchmarkError naming file, line (of an item) and rule; see docs/benchmarks.md for the keys.
    """
    where = str(path)
    section = Section(read_yaml(path), where, _KEYS)
    name = section.name("name")
    capability = section.name("capability", name)
    if capability == "macro":
        raise BenchmarkError(f"{where}: capability must not be 'macro', which names the default utility")
    metric = section.choice("metric", METRICS, "accuracy")
    grader = _grader(section, metric)
    delimiter = section.spacing("delimiter") if "delimiter" in section else None
    limit = section.count("limit", None, least=1)

    builder = ItemBuilder(section, delimiter, grader, metric)
    items_path = path.parent / section.text("items")
    records = read_records(items_path)[:limit]
    items = tuple(builder.item(record, items_path) for record in records)
    return Benchmark(
        name=name,
        capability=capability,
        metric=metric,
        grader=grader,
        items=items,
        delimiter=delimiter,
        stop=section.texts("stop"),
        max_tokens=section.count("max_tokens", DEFAULT_MAX_TOKENS, least=1),
        source=path,
    )


def load_benchmarks(specs: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of all specs, each a benchmark file or a directory of *.yaml files (taken by name).

    Raises BenchmarkError for a spec that is neither, an empty directory, or a name used twice.
    """
    benchmarks: dict[str, Benchmark] = {}
    for path in [path for spec in specs for path in _benchmark_files(spec)]:
        benchmark = load_benchmark(path)
        if benchmark.name in benchmarks:
            first = benchmarks[benchmark.name].source
            raise BenchmarkError(
                f"benchmark names must be unique, but {benchmark.name!r} is in {first} and in {path}"
            )
        benchmarks[benchmark.name] = benchmark
    if not benchmarks:
        raise BenchmarkError(
            "a search needs at least one benchmark: give --bench FILE.yaml or a directory of them"
        )
    return list(benchmarks.values())


def _benchmark_files(spec: str) -> list[Path]:
    path = Path(spec)
    if not path.is_dir():
        if not path.exists():
            raise BenchmarkError(
                f"{spec}: a benchmark must be a YAML file or a directory of *.yaml, but there is none"
            )
        return [path]
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise BenchmarkError(f"{spec}: the directory holds no *.yaml benchmark file")
    return files


def _grader(section: Section, metric: str) -> Grader | None:
    """The grader, after checking that no key is given that this way of scoring would not use."""
    grader = None
    if metric == "accuracy":
        if "grader" not in section:
            known = ", ".join(graders.GRADERS)
            raise BenchmarkError(
                f"{section.where}: needs the key 'grader' ({known}), or metric: loglikelihood"
            )
        grader = graders.make_grader(section.values["grader"], section.where)
        if not isinstance(grader, Choice):
            return grader
    by = "grader choice" if grader else "metric loglikelihood"
    for key in ("stop", "max_tokens", *(() if grader else ("grader",))):
        if key in section:
            raise BenchmarkError(
                f"{section.where}: {by} scores log-likelihoods and generates nothing; remove {key!r}"
            )
    return grader
