"""The items of a benchmark, rendered: prompts with their few-shot examples, reference answers, choices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.errors import BenchmarkError
from mergemix.evals import graders
from mergemix.evals.files import Record, Section, read_records
from mergemix.evals.graders import Choice, Grader
from mergemix.evals.template import Template


@dataclass(frozen=True)
class Item:
    """One question, rendered.

    prompt: few-shot examples included. answers: the accepted reference answers, at least one.
    choices: for the choice grader, what is chosen from; the one right choice is answers[0].
    """

    id: str
    fields: dict[str, Any]
    prompt: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


def delimiter_after(prompt: str, delimiter: str | None) -> str:
    """What stands between a prompt and its answer: as given, else a space unless the prompt ends in one."""
    if delimiter is not None:
        return delimiter
    return "" if prompt[-1:].isspace() else " "


class ItemBuilder:
    """Turns records into items: templates, reference answers and choices, few-shot examples.

    Raises BenchmarkError, when built, for templates or few-shot examples that cannot be used.
    """

    def __init__(self, section: Section, delimiter: str | None, grader: Grader | None, metric: str) -> None:
        self.grader = grader
        self.metric = metric
        self.prompt = Template(section.text("prompt"), "prompt", section.where)
        self.answer = Template(section.text("answer", "{{ answer }}"), "answer", section.where)
        self.examples: dict[tuple[str, tuple[str, ...]], str] = {}  # (prompt, answers) -> file and line
        self.prefix = ""
        if "few_shot" in section:
            self._add_examples(section, delimiter)

    def _add_examples(self, section: Section, delimiter: str | None) -> None:
        few_shot = Section(
            section.values["few_shot"], f"{section.where}: few_shot", ("count", "items", "separator")
        )
        count = few_shot.count("count", least=0)
        separator = few_shot.spacing("separator", "\n\n")
        path = Path(section.where).parent / few_shot.text("items")
        records = read_records(path)
        if len(records) < count:
            raise BenchmarkError(
                f"{few_shot.where}: count is {count}, but {path} holds {len(records)} examples"
            )
        for record in records[:count]:
            example = self.item(record, path)
            self.examples[example.prompt, example.answers] = f"{path}:{record.line}"
        self.prefix = "".join(
            f"{prompt}{delimiter_after(prompt, delimiter)}{answers[0]}{separator}"
            for prompt, answers in self.examples
        )

    def item(self, record: Record, path: Path) -> Item:
        """Raises BenchmarkError naming file and line, also when the item is one of the few-shot examples."""
        where = f"{path}:{record.line}"
        prompt = self.prompt.render(record.fields, where)
        choices = _choices(record, where) if isinstance(self.grader, Choice) else ()
        answers = self._answers(record, choices, where)
        example = self.examples.get((prompt, answers))
        if example is not None:
            raise BenchmarkError(
                f"{where}: item {record.id!r} is also a few-shot example ({example}), which gives it away"
            )
        if not prompt:
            raise BenchmarkError(f"{where}: the prompt is empty")
        return Item(record.id, record.fields, self.prefix + prompt, answers, choices)

    def _answers(self, record: Record, choices: tuple[str, ...], where: str) -> tuple[str, ...]:
        value = self.answer.field_value(record.fields)
        if choices:
            return (choices[_index(value, self.answer.render(record.fields, where), choices, where)],)
        if isinstance(value, list):
            answers = tuple(_text(entry, "an accepted answer", where) for entry in value)
            if self.metric == "loglikelihood" and len(answers) > 1:
                raise BenchmarkError(
                    f"{where}: metric loglikelihood needs one reference answer, but there are {len(answers)}"
                )
        else:
            answers = (self.answer.render(record.fields, where),)
        if not answers or not all(answer.strip() for answer in answers):
            raise BenchmarkError(
                f"{where}: a reference answer must not be empty, but is {value if answers else []!r}"
            )
        for answer in answers:
            if isinstance(self.grader, graders.Numeric) and graders.last_number(answer) is None:
                raise BenchmarkError(
                    f"{where}: grader numeric needs a number as reference answer, but it is {answer!r}"
                )
        return answers


def _text(value: object, what: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BenchmarkError(f"{where}: {what} must be text or a number, but is {value!r}")
    return str(value)


def _choices(record: Record, where: str) -> tuple[str, ...]:
    listed = record.fields.get("choices")
    if not isinstance(listed, list) or len(listed) < 2:
        raise BenchmarkError(
            f"{where}: grader choice needs the field 'choices', a list of at least 2, but it is {listed!r}"
        )
    choices = tuple(_text(choice, "a choice", where) for choice in listed)
    if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
        raise BenchmarkError(f"{where}: choices must differ and not be empty, but are {listed!r}")
    return choices


def _index(value: object, text: str, choices: tuple[str, ...], where: str) -> int:
    """Index of the right choice: one of the choices as text, or its position as a number, from 0."""
    named = choices.index(text) if text in choices else None
    is_number = isinstance(value, int) and not isinstance(value, bool)
    position = int(text) if (is_number or named is None) and text.isdecimal() else None
    if named is not None and position is not None and position < len(choices) and named != position:
        raise BenchmarkError(
            f"{where}: the answer {value!r} is a choice and the position of another; "
            "write it as text to mean the choice"
        )
    index = named if named is not None else position
    if index is None or index >= len(choices):
        raise BenchmarkError(
            f"{where}: the answer must be one of the choices or a position from 0 to {len(choices) - 1}, "
            f"but is {text!r}"
        )
    return index
