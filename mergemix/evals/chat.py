"""Prompts as chats: messages through the checkpoint's own chat template, as token ids."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from mergemix.errors import BenchmarkError

Message = dict[str, str]
# What a template that prints today's date is told, so that a study asks the same on every day. Llama 3.1's own default.
_TODAY = datetime.datetime(2024, 7, 26)


class ChatTemplate:
    """The chat template of the checkpoint in directory `root`.

    Raises BenchmarkError when there is no tokenizer, or it has no chat template.
    """

    def __init__(self, root: Path) -> None:
        from transformers import AutoTokenizer

        self._root = root
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
        except Exception as error:  # damaged files end in anything at all
            raise BenchmarkError(
                f"chat: true needs a tokenizer, but none could be loaded from {root}: {error}"
            ) from error
        if not self._tokenizer.chat_template:
            raise BenchmarkError(
                f"chat: true needs a chat template, but the tokenizer in {root} has none: take a checkpoint that was "
                "trained for chat, or write the prompt as text"
            )

    def render(self, messages: list[Message], where: str) -> str:
        """The text that the model continues as the assistant. Raises BenchmarkError for messages that are refused."""
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=_TODAY.strftime
            )
        except Exception as error:  # templates refuse with jinja2's errors, and fail with any other
            roles = ", ".join(message["role"] for message in messages)
            raise BenchmarkError(
                f"{where}: the chat template of {self._root} refuses these messages ({roles}): {error}"
            ) from None
        return str(text)

    def ids(self, text: str) -> tuple[int, ...]:
        """Ids of rendered text: nothing is added, since a template writes BOS itself where the model wants one."""
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def continuation_ids(self, text: str, continuation: str) -> tuple[int, ...]:
        """Ids of `continuation` after the rendered `text`, as in the whole; alone where a token spans the boundary."""
        before, whole = self.ids(text), self.ids(text + continuation)
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self.ids(continuation)
