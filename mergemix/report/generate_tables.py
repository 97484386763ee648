"""Answers of several mixtures, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

MAX_COLUMNS = 3  # of mixtures beside each other; more of them get a row each


def generate_table(result: Mapping[str, Any]) -> RenderableType:
    """A row per prompt and a column per mixture; where there are many mixtures, a row per prompt and mixture."""
    mixtures, outputs = result["mixtures"], result["outputs"]
    names = [mixture["name"] for mixture in mixtures]
    size = len(outputs) // len(names)
    prompts = [output["prompt"] for output in outputs[:size]]
    # Of each prompt, the answers in the order of the mixtures.
    answers = [[output["text"] for output in outputs[index::size]] for index in range(size)]
    table = Table(show_lines=True)
    if len(names) <= MAX_COLUMNS:
        _columns(table, ["prompt", *names])
        for prompt, texts in zip(prompts, answers, strict=True):
            table.add_row(*map(printable, (prompt, *texts)))
    else:
        _columns(table, ["prompt", "mixture", "answer"])
        for prompt, texts in zip(prompts, answers, strict=True):
            for place, (name, text) in enumerate(zip(names, texts, strict=True)):
                table.add_row(*map(printable, ("" if place else prompt, name, text)))
    return Group(table, Text("\n".join(_lines(result))))


def printable(text: str) -> Text:
    """Text without what a terminal would obey: a model may answer with escape sequences."""
    return Text("".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text))


def _columns(table: Table, headings: Iterable[str]) -> None:
    for heading in headings:
        table.add_column(printable(heading), overflow="fold", ratio=1)


def _lines(result: Mapping[str, Any]) -> Sequence[str]:
    proof = "proven" if result["proven"] else "NOT proven: every mixture was a fresh start"
    took = [
        f"  {mixture['name']}: swap {mixture['swap_seconds']:.2f} s, answers {mixture['generate_seconds']:.2f} s"
        for mixture in result["mixtures"]
    ]
    return [f"Engine {result['engine']} (swaps {proof}), {result['seconds']:.1f} s in all.", *took]
