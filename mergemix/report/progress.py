"""Progress on a terminal. Of a run: stage, candidate k of n, best so far, seconds per stage, time left."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

if TYPE_CHECKING:  # a merge shows its progress too, and needs nothing of a study
    from mergemix.evidence import Progress


class RunProgress:
    """The observer of people: one live line on a terminal, one plain line a candidate elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._recent: deque[float] = deque(maxlen=8)  # seconds a candidate; the last few foretell the rest
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, note="")

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        if self.console.is_terminal:
            self._bar.update(self._task, description=text)
        else:
            self._line(text)

    def note(self, text: str) -> None:
        self._line(text)

    def candidate(self, progress: Progress) -> None:
        record = progress.record
        if record.status == "failed":
            self._line(f"  {progress.done:>3}/{progress.total} {record.mixture} failed: {record.reason}")
            return
        self._recent.append(progress.seconds)
        left = statistics.median(self._recent) * (progress.total - progress.done)
        note = [
            f"swap {record.timings['swap_s']:.2f} s",
            f"generation {record.timings['generate_s']:.1f} s",
            f"about {_duration(left)} left",
        ]
        if progress.best is not None:
            note.insert(0, f"best {progress.best:.4g}")
        score = "" if progress.utility is None else f" = {progress.utility:.4g}"
        again = " again" if record.repeat else ""
        if record.estimate is not None:
            score = f" about {record.estimate.utility:.4g}, stopped after {record.items} items"
        line = f"  {progress.done:>3}/{progress.total} {record.mixture}{again}{score}"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=progress.done, total=progress.total, note=" | ".join(note))
        else:
            line += f"  [{' | '.join(note)}]"
        self._line(line)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def merge_progress(console: Console, nbytes: int) -> Iterator[Callable[[int], None]]:
    """A bar for a merge that writes `nbytes`; gives what is to be called with the bytes done since the last call."""
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merge", total=nbytes)
        yield lambda done: bar.advance(task, done)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
