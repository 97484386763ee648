"""One lm-eval task as a benchmark: its documents are the items."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

from lm_eval import __version__
from lm_eval.api.instance import Instance

from mergemix.errors import BenchmarkError
from mergemix.evals.lm_eval_tasks.adapter import EngineLM
from mergemix.evals.lm_eval_tasks.metrics import aggregate, item_metric, weighed
from mergemix.evals.lm_eval_tasks.spec import LmEvalSpec
from mergemix.evals.suite import Score
from mergemix.serve.engine import Generate, Likelihood, Output, Request

Results = dict[str, dict[str, Any]]  # metrics of a document by filter
# Part of every fingerprint: raise it when a change of this code gives the same answers other scores.
_SCORING_VERSION = 1
# Where a task lies on this machine says nothing about its scores; its documents are in the fingerprint themselves.
_PLACES = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "tag")


class LmEvalBenchmark:
    """A task whose requests are built.

    A Score's text is the answer, where a document has one answer in words; else JSON: for each of its instances the
    texts, or the log-likelihood and whether it is greedy of each continuation. `report` needs all of them.
    """

    def __init__(self, task: Any, spec: LmEvalSpec, lm: EngineLM) -> None:
        """Tokenise the task's instances. Raises BenchmarkError when the spec or the task cannot be used."""
        self.name = spec.name or task.task_name
        self.capability = spec.capability or spec.task
        self.source = spec.source
        self._task = task
        self._lm = lm
        self._where = f"lm_eval:{task.task_name}"
        self._docs = _by_document(task.instances)
        self.item_ids = tuple(str(doc[0].doc_id) for doc in self._docs)
        self._asked = [[_asked(lm, instance) for instance in doc] for doc in self._docs]
        for doc, asked in zip(self._docs, self._asked, strict=True):
            if not any(requests for repeats in asked for requests in repeats):
                raise BenchmarkError(
                    f"{self._where}: document {doc[0].doc_id} is empty, so there is nothing to ask"
                )
        # Of each document, the last filtered responses and what they were worth: `report` comes after `score`.
        self._known: dict[int, tuple[dict[str, list[Any]], Results]] = {}
        self._item = item_metric(task, spec)
        if self._item.divisor is not None:
            self._item = weighed(self._item, self._probe(), self._where)

    @property
    def metric(self) -> str:
        return self._item.name

    @property
    def higher_is_better(self) -> bool:
        return self._item.higher_is_better

    def requests(self, index: int) -> list[Request]:
        """All instances' requests. A greedy answer is asked for once, however often the task repeats it."""
        return [request for repeats in self._asked[index] for requests in repeats for request in requests]

    def score(self, index: int, outputs: Sequence[Output]) -> Score:
        """The document's score, as lm-eval's filters and `process_results` give it.

        Raises EngineError for outputs that are no answers, and whatever the task's own code raises.
        """
        given = iter(outputs)
        responses = []
        for instance, repeats in zip(self._docs[index], self._asked[index], strict=True):
            answers = [
                self._lm.response_of(instance, [next(given) for _ in requests]) for requests in repeats
            ]
            responses.append(answers * (_repeats(instance) // len(answers)))
        [filtered] = self._filtered([index], [responses])
        return Score(self._item.value(self._results(index, filtered)), self._text(index, responses))

    def report(self, scores: Sequence[Score]) -> dict[str, float]:
        """What the `lm_eval` command reports: "metric,filter" for each; {} when a document has no answer."""
        if any(score.value is None or score.text is None for score in scores):
            return {}
        numbers = range(len(scores))
        responses = [self._responses(index, scores[index].text or "") for index in numbers]
        filtered = self._filtered(numbers, responses)
        return aggregate(self._task, [self._results(index, filtered[index]) for index in numbers])

    def fingerprint(self) -> str:
        config = self._task.dump_config()
        content = {
            "version": _SCORING_VERSION,
            "lm_eval": __version__,
            "name": self.name,
            "capability": self.capability,
            "metric": [self._item.metric, self._item.filter],
            "task": {key: value for key, value in config.items() if key not in _PLACES},
            "task version": self._task.VERSION,
            "items": [
                [doc[0].doc, [repr(request) for request in self.requests(index)]]
                for index, doc in enumerate(self._docs)
            ],
        }
        text = json.dumps(content, sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()

    def _filtered(
        self, indices: Sequence[int], responses: Sequence[list[list[Any]]]
    ) -> list[dict[str, list[Any]]]:
        """Responses of the documents after each filter, by its name: a list with one entry per instance."""
        copies = [
            [_answered(instance, each) for instance, each in zip(self._docs[index], given, strict=True)]
            for index, given in zip(indices, responses, strict=True)
        ]
        before = self._task._instances
        self._task._instances = [instance for doc in copies for instance in doc]
        try:
            self._task.apply_filters()
        finally:
            self._task._instances = before
        return [
            {name: [instance.filtered_resps[name] for instance in doc] for name in doc[0].filtered_resps}
            for doc in copies
        ]

    def _results(self, index: int, filtered: dict[str, list[Any]]) -> Results:
        known = self._known.get(index)
        if known is None or known[0] != filtered:
            doc = self._docs[index][0].doc
            results = {name: self._task.process_results(doc, each) for name, each in filtered.items()}
            self._known[index] = known = filtered, results
        return known[1]

    def _probe(self) -> list[Results]:
        """Every document's metrics had each log-likelihood been -1: weights are the same whatever was answered."""
        found = []
        for doc in self._docs:
            if doc[0].request_type == "generate_until":
                raise BenchmarkError(f"{self._where}: {self._item.metric} needs log-likelihoods, not answers")
        try:
            for index, doc in enumerate(self._docs):
                likelihood = Likelihood(-1.0, 1, False)
                single = [self._lm.response_of(each, [likelihood]) for each in doc]
                responses = [[response] * _repeats(each) for response, each in zip(single, doc, strict=True)]
                [filtered] = self._filtered([index], [responses])
                results = {
                    name: self._task.process_results(doc[0].doc, each) for name, each in filtered.items()
                }
                found.append(results)
        except Exception as error:  # a task's own code
            raise BenchmarkError(
                f"{self._where}: the task cannot score a document: {type(error).__name__}: {error}"
            ) from error
        return found

    def _in_words(self, index: int) -> bool:
        """Whether the document has a single answer, which then stands for itself."""
        (first, *others) = self._docs[index]
        return first.request_type == "generate_until" and not others and _repeats(first) == 1

    def _text(self, index: int, responses: list[list[Any]]) -> str:
        if self._in_words(index):
            return str(responses[0][0])
        named = [
            [[instance.args[1], *each] for each in answers]
            if instance.request_type == "loglikelihood"
            else answers
            for instance, answers in zip(self._docs[index], responses, strict=True)
        ]
        return json.dumps(named, ensure_ascii=False)

    def _responses(self, index: int, text: str) -> list[list[Any]]:
        if self._in_words(index):
            return [[text]]
        return [
            [tuple(each[1:]) for each in answers] if instance.request_type == "loglikelihood" else answers
            for instance, answers in zip(self._docs[index], json.loads(text), strict=True)
        ]


def _by_document(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Instances of each document in lm-eval's order, documents by number."""
    docs: dict[int, list[Instance]] = {}
    for instance in instances:
        docs.setdefault(instance.doc_id, []).append(instance)
    return [sorted(docs[number], key=lambda instance: instance.idx) for number in sorted(docs)]


def _asked(lm: EngineLM, instance: Instance) -> list[tuple[Request, ...]]:
    """What is asked for each repeat of the instance; for one only, where every answer would be the same."""
    (requests,) = lm.requests_of([instance])
    if any(isinstance(request, Generate) and request.temperature > 0 for request in requests):
        return lm.requests_of([instance] * _repeats(instance))
    return [requests]


def _repeats(instance: Instance) -> int:
    return int(instance.repeats or 1)


def _answered(instance: Instance, responses: list[Any]) -> Instance:
    return Instance(
        instance.request_type,
        instance.doc,
        instance.arguments,
        instance.idx,
        instance.metadata,
        resps=list(responses),
    )


def _plain(value: Any) -> Any:
    """Something that JSON cannot write, as text that is the same in every process."""
    if callable(value):
        try:
            return inspect.getsource(value)
        except (TypeError, OSError):
            return getattr(value, "__qualname__", type(value).__name__)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text
