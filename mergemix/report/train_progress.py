"""Progress of a training on a terminal: step, loss, tokens a second, time left."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from mergemix.train.observer import StepProgress

PLAIN_LINES = 20  # of a training whose output is no terminal


class TrainProgress:
    """The observer of people: one live line on a terminal, twenty lines a training elsewhere.

    Silent in all but the first of the processes that a launcher started.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._silent = os.environ.get("RANK", "0") != "0"
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, note="")

    def __enter__(self) -> TrainProgress:
        if self._console.is_terminal and not self._silent:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def stage(self, text: str) -> None:
        if self._console.is_terminal:
            self._bar.reset(self._task, description=text, total=None, note="")
        else:
            self._line(text)

    def corpus(self, domain: str, done: int, total: int) -> None:
        note = f"{domain}: {done / 1e6:.0f} of {total / 1e6:.0f} MB"
        self._bar.update(self._task, completed=done, total=total, note=note)

    def repeats(self, domain: str, epochs: float, tokens: int) -> None:
        self._line(f"  {domain}: {epochs:.2f} epochs of its {tokens:,} tokens")

    def step(self, progress: StepProgress) -> None:
        note = f"loss {progress.loss:.4g} | {progress.tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=progress.step, total=progress.steps, note=note)
        due = progress.step * PLAIN_LINES // progress.steps
        if not self._console.is_terminal and due > (progress.step - 1) * PLAIN_LINES // progress.steps:
            self._line(f"  step {progress.step} of {progress.steps}: {note.replace(' |', ',')}")

    def _line(self, text: str) -> None:
        if not self._silent:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
