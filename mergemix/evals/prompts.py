"""How a question and its few-shot examples are put to a model: as one text, or as the turns of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mergemix.evals.chat import ChatTemplate, Message
from mergemix.serve.engine import Text


class Prompts(Protocol):
    """Examples are added first; then come prompts, each with all examples before it."""

    def add_example(self, prompt: str, answer: str) -> None: ...

    def ask(self, prompt: str, system: str | None, answers: Sequence[str], where: str) -> Asked:
        """A prompt and the `answers` whose likelihood after it is wanted. Raises BenchmarkError as a template does."""


@dataclass(frozen=True)
class Asked:
    """prompt and continuations, as an engine takes them. num_bytes: of each continuation's text in UTF-8."""

    prompt: Text
    continuations: tuple[Text, ...]
    num_bytes: tuple[int, ...]


@dataclass
class TextPrompts:
    """Examples as text before the prompt, each followed by `separator`.

    delimiter: between a prompt and its answer; None is one space, or nothing after white space or nothing at all.
    """

    delimiter: str | None
    separator: str
    prefix: str = ""

    def add_example(self, prompt: str, answer: str) -> None:
        self.prefix += prompt + self._after(prompt) + answer + self.separator

    def ask(self, prompt: str, system: str | None, answers: Sequence[str], where: str) -> Asked:
        prompt = self.prefix + prompt
        continuations = tuple(self._after(prompt) + answer for answer in answers)
        # An engine scores the white space that ends a prompt with what follows it.
        moved = prompt[len(prompt.rstrip()) :]
        return Asked(prompt, continuations, tuple(len((moved + text).encode()) for text in continuations))

    def _after(self, prompt: str) -> str:
        if self.delimiter is not None:
            return self.delimiter
        return "" if not prompt or prompt[-1].isspace() else " "


@dataclass
class ChatPrompts:
    """Examples as turns of user and assistant before the prompt, which is the user's last turn."""

    template: ChatTemplate
    delimiter: str
    turns: list[Message] = field(default_factory=list)

    def add_example(self, prompt: str, answer: str) -> None:
        self.turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    def ask(self, prompt: str, system: str | None, answers: Sequence[str], where: str) -> Asked:
        first = [] if system is None else [{"role": "system", "content": system}]
        text = self.template.render([*first, *self.turns, {"role": "user", "content": prompt}], where)
        continuations = [self.delimiter + answer for answer in answers]
        return Asked(
            self.template.ids(text),
            tuple(self.template.continuation_ids(text, continuation) for continuation in continuations),
            tuple(len(continuation.encode()) for continuation in continuations),
        )
