"""Table of `mergemix compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row, shares


def compare_table(result: Mapping[str, Any]) -> RenderableType:
    """How far two studies agree, beside what one study's own uncertainty gives."""
    table = Table(title="Two studies beside each other (95% intervals)", title_justify="left")
    table.add_column("")
    table.add_column("between them", justify="right")
    table.add_column("two draws of the first", justify="right")
    correlation = result["rank_correlation"]
    if (found := correlation["measured"]) is not None:
        title = f"rank correlation, {found['mixtures']} measured mixtures"
        add_row(table, title, _with_interval(found["spearman"], found["interval"]), "")
    rows = {"rank correlation of the surfaces": correlation["predicted"]}
    rows |= {f"  {name}": found for name, found in result["capabilities"].items()}
    for title, found in rows.items():
        add_row(table, title, _with_interval(found["spearman"], found["interval"]), f"{found['ceiling']:.3g}")
    distance = result["distance"]
    cells = _with_interval(distance["estimate"], distance["interval"]), f"{distance['ceiling']:.3g}"
    add_row(table, "share of tokens that the best mixtures differ by", *cells)
    for title, found in result["regret"].items():
        told = {"first_on_second": "the first's best on the second costs"}
        told["second_on_first"] = "the second's best on the first costs"
        add_row(table, told[title], _with_interval(found["estimate"], found["interval"]), "")
    lines = [
        f"Best of the first: {shares(result['optimum']['first'])}",
        f"Best of the second: {shares(result['optimum']['second'])}",
        *(
            [f"Left out, as only one study has them: {', '.join(result['dropped'])}."]
            if result["dropped"]
            else []
        ),
        f"Verdict: {result['verdict']}.",
        *(f"But {warning}." for warning in result["warnings"]),
    ]
    return Group(table, Text("\n".join(lines), overflow="fold"))


def _with_interval(value: float, limits: list[float]) -> str:
    return f"{value:.3g} ({limits[0]:.3g} to {limits[1]:.3g})"
