"""Progress of a run on a terminal: stage, candidate k of n, best so far, seconds per stage, time left."""

from __future__ import annotations

import statistics
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mergemix.mixture import Mixture


class RunProgress:
    """The observer of people: one live line on a terminal, one plain line a candidate elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._best: float | None = None
        self._recent: deque[float] = deque(maxlen=8)  # seconds a candidate; the last few foretell the rest
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, note="")

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        if self.console.is_terminal:
            self._progress.update(self._task, description=text)
        else:
            self.console.print(text, highlight=False)

    def candidate(
        self, done: int, total: int, mixture: Mixture, utility: float | None, timings: dict[str, float]
    ) -> None:
        self._recent.append(sum(timings.values()))
        if utility is not None and (self._best is None or utility > self._best):
            self._best = utility
        left = statistics.median(self._recent) * max(total - done, 0)
        parts = [
            f"swap {timings.get('swap_s', 0.0):.2f} s",
            f"generation {timings.get('generate_s', 0.0):.1f} s",
            f"about {_duration(left)} left",
        ]
        if utility is not None:
            parts.insert(0, f"best {self._best:.4g}")
        score = "" if utility is None else f" = {utility:.4g}"
        if self.console.is_terminal:
            self._progress.update(self._task, completed=done, total=total, note=" | ".join(parts))
        line = f"  {done:>3}/{total} {mixture}{score}"
        self.console.print(
            line if self.console.is_terminal else f"{line}  [{' | '.join(parts)}]", markup=False
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
