"""The items of a benchmark, rendered: prompts with their few-shot examples, reference answers, choices, unit tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.errors import BenchmarkError
from mergemix.evals import graders
from mergemix.evals.chat import ChatTemplate
from mergemix.evals.choices import LETTERS, as_text, lettered, read_choices, right_choice
from mergemix.evals.code import UnitTests, UnitTestTemplates
from mergemix.evals.files import Record, Section, read_records
from mergemix.evals.graders import Choice, Code, Grader
from mergemix.evals.prompts import ChatPrompts, Prompts, TextPrompts
from mergemix.evals.template import Template
from mergemix.serve.engine import Text


@dataclass(frozen=True)
class Item:
    """One question, rendered.

    prompt: few-shot examples included; token ids of a chat. answers: the accepted reference answers; none for code.
    choices: what is chosen from, the one right choice is answers[0]. continuations: what is scored after the prompt,
    each choice or the reference text. num_bytes: of the reference text that is scored, in UTF-8. tests: for code.
    """

    id: str
    prompt: Text
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    continuations: tuple[Text, ...] = ()
    num_bytes: int = 0
    tests: UnitTests | None = None


@dataclass(frozen=True)
class _Question:
    """An item or example without what is put around it. shown: the answer as an example gives it."""

    prompt: str
    system: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    shown: str


class ItemBuilder:
    """Turns records into items: templates, reference answers and choices, few-shot examples.

    grader: None where the likelihood of reference text is scored. chat: None for prompts that are text.
    Raises BenchmarkError, when built, for templates, examples or keys that cannot be used.
    """

    def __init__(self, section: Section, grader: Grader | None, chat: ChatTemplate | None) -> None:
        self.section = section
        self.grader = grader
        self.by_letter = isinstance(grader, Choice) and grader.by == "generation"
        where = section.where
        _check_keys(section, grader, self.by_letter)
        needs_prompt = grader is not None or "prompt" in section
        self.prompt = Template(section.text("prompt"), "prompt", where) if needs_prompt else None
        if self.by_letter and self.prompt and not {"options", "choices"} & self.prompt.fields:
            raise BenchmarkError(
                f"{where}: grader choice by generation shows the choices by letter: write {{{{ options }}}} in the "
                "prompt where they shall stand"
            )
        self.system = Template(section.text("system"), "system", where) if "system" in section else None
        self.answer = Template(section.text("answer", "{{ answer }}"), "answer", where)
        self.tests = UnitTestTemplates(grader, where) if isinstance(grader, Code) else None
        self.examples: dict[tuple[str, tuple[str, ...]], str] = {}  # (prompt, answers) -> file and line
        self.prompts = self._prompts(chat)

    def _prompts(self, chat: ChatTemplate | None) -> Prompts:
        """The way of asking, with the few-shot examples."""
        delimiter = self.section.spacing("delimiter") if "delimiter" in self.section else None
        if "few_shot" not in self.section:
            return ChatPrompts(chat, delimiter or "") if chat else TextPrompts(delimiter, "")
        few_shot = Section(
            self.section.values["few_shot"],
            f"{self.section.where}: few_shot",
            ("count", "items", "separator"),
        )
        if chat and "separator" in few_shot:
            raise BenchmarkError(
                f"{few_shot.where}: the examples of a chat are turns, with nothing between them; remove 'separator'"
            )
        separator = few_shot.spacing("separator", "\n\n")
        prompts: Prompts = ChatPrompts(chat, delimiter or "") if chat else TextPrompts(delimiter, separator)
        count = few_shot.count("count", least=0)
        path = Path(self.section.where).parent / few_shot.text("items")
        records = read_records(path)
        if len(records) < count:
            raise BenchmarkError(
                f"{few_shot.where}: count is {count}, but {path} holds {len(records)} examples"
            )
        for record in records[:count]:
            where = f"{path}:{record.line}"
            example = self._question(record.fields, where, is_example=True)
            prompts.add_example(example.prompt, example.shown)
            self.examples[example.prompt, example.answers] = where
        return prompts

    def item(self, record: Record, path: Path) -> Item:
        """Raises BenchmarkError naming file and line, also when the item is one of the few-shot examples."""
        where = f"{path}:{record.line}"
        question = self._question(record.fields, where)
        example = self.examples.get((question.prompt, question.answers))
        if example is not None:
            raise BenchmarkError(
                f"{where}: item {record.id!r} is also a few-shot example ({example}), which gives it away"
            )
        scored = question.choices if isinstance(self.grader, Choice) and not self.by_letter else ()
        if self.grader is None:
            scored = question.answers
        asked = self.prompts.ask(question.prompt, question.system, scored, where)
        return Item(
            record.id,
            asked.prompt,
            question.answers,
            question.choices,
            asked.continuations,
            num_bytes=asked.num_bytes[0] if self.grader is None else 0,
            tests=self.tests.render(record.fields, where) if self.tests else None,
        )

    def _question(self, fields: Mapping[str, Any], where: str, is_example: bool = False) -> _Question:
        choices = (
            read_choices(fields, where, by_letter=self.by_letter) if isinstance(self.grader, Choice) else ()
        )
        shown_fields = fields
        if self.by_letter:
            if "options" in fields:
                raise BenchmarkError(
                    f"{where}: the field 'options' hides the lettered choices; call it otherwise"
                )
            shown_fields = {**fields, "options": lettered(choices)}
        prompt = self.prompt.render(shown_fields, where) if self.prompt else ""
        if self.prompt and not prompt:
            raise BenchmarkError(f"{where}: the prompt is empty")
        system = self.system.render(fields, where) if self.system else None
        if self.tests:  # a reference solution is needed only to be shown
            shown = self.answer.render(fields, where) if is_example else ""
            return _Question(prompt, system, (), (), shown)
        answers = self._answers(fields, choices, where)
        shown = LETTERS[choices.index(answers[0])] if self.by_letter else answers[0]
        return _Question(prompt, system, answers, choices, shown)

    def _answers(self, fields: Mapping[str, Any], choices: tuple[str, ...], where: str) -> tuple[str, ...]:
        value = self.answer.field_value(fields)
        if choices:
            return (choices[right_choice(value, self.answer.render(fields, where), choices, where)],)
        if isinstance(value, list):
            answers = tuple(as_text(entry, "an accepted answer", where) for entry in value)
            if self.grader is None and len(answers) > 1:
                metric = self.section.values["metric"]
                raise BenchmarkError(
                    f"{where}: metric {metric} needs one reference answer, but there are {len(answers)}"
                )
        else:
            answers = (self.answer.render(fields, where),)
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


def _check_keys(section: Section, grader: Grader | None, by_letter: bool) -> None:
    """Raises BenchmarkError for a key that this way of asking would not use."""
    is_chat = section.flag("chat")
    generates = grader is not None and (by_letter or not isinstance(grader, Choice))
    unused = []
    if "prompt" not in section and grader is None:
        unused = [(key, "there is no prompt;") for key in ("chat", "system", "few_shot", "delimiter")]
    elif not is_chat:
        unused = [("system", "only a chat has a system message; add chat: true or")]
    elif generates:
        unused = [("delimiter", "the examples of a chat are turns, with nothing between prompt and answer;")]
    if isinstance(grader, Code) and "few_shot" not in section:
        unused.append(("answer", "grader code compares with no reference answer;"))
    for key, reason in unused:
        if key in section:
            raise BenchmarkError(f"{section.where}: {reason} remove {key!r}")
