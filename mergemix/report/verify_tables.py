"""Tables of `mergemix verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row, shares

UNKNOWN = "-"


def verify_table(result: Mapping[str, Any]) -> RenderableType:
    """Agreement overall and per capability, each mixture's scores side by side, and the verdict."""
    sources = " and ".join(result["intervals_over"])
    title = f"Merged proxies and {result['references']} trained mixtures (95% intervals over {sources})"
    # Pairs: a capability may be called overall, too.
    named = [("overall", result["overall"]), *result["capabilities"].items()]
    ranks = _table(title, ("Spearman", "ceiling", "corrected"), named, _ranks)
    costs = _table(None, ("Kendall", "top", "regret", "offset"), named, _costs)
    lines = [
        "ceiling: what a perfect proxy would reach, given how training with other seeds differs; corrected: Spearman "
        "divided by it.",
        f"top: share in common of the best {result['overall']['top']['size']}, by chance "
        f"{result['overall']['top']['chance']:.0%}; regret: what the proxy's first choice scores below the best, and "
        "of what is at stake; offset: proxy - trained, and its spread.",
        *_doubts(result),
        f"Verdict: {result['trust']}. {result['verdict']}",
        *(f"But {warning}." for warning in result["warnings"]),
    ]
    return Group(
        ranks, costs, calibration_table(result["calibration"]), Text("\n".join(lines), overflow="fold")
    )


def calibration_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Utility of each mixture, by its proxy and by its training runs; the best trained first."""
    table = Table(title="Utility of each mixture", title_justify="left")
    table.add_column("mixture", overflow="fold")
    for column in ("proxy", "trained", "runs"):
        table.add_column(column, justify="right")

    def trained(point: Mapping[str, Any]) -> float:
        runs = point["trained"]["overall"]
        return sum(runs) / len(runs)

    for point in sorted(points, key=trained, reverse=True):
        runs = " ".join(f"{each:.4g}" for each in point["trained"]["overall"])
        add_row(
            table, shares(point["mixture"]), f"{point['proxy']['overall']:.4g}", f"{trained(point):.4g}", runs
        )
    return table


def _table(
    title: str | None,
    columns: Sequence[str],
    named: Sequence[tuple[str, Mapping[str, Any]]],
    cells: Callable[[Mapping[str, Any]], Sequence[str]],
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for place, (name, found) in enumerate(named):
        add_row(table, name, *cells(found), style=None if place else "bold")
    return table


def _ranks(found: Mapping[str, Any]) -> list[str]:
    ceiling, corrected = found["ceiling"], found["corrected"]
    return [
        _with_interval(found["spearman"], found["interval"]),
        UNKNOWN if ceiling is None else _with_interval(ceiling["ceiling"], ceiling["interval"]),
        UNKNOWN if corrected is None else _with_interval(corrected["spearman"], corrected["interval"]),
    ]


def _costs(found: Mapping[str, Any]) -> list[str]:
    relative = found["relative_regret"]
    return [
        _with_interval(found["kendall"], found["kendall_interval"]),
        f"{found['top']['overlap']:.0%}",
        f"{found['regret']:.3g}" + ("" if relative is None else f" ({relative:.0%})"),
        f"{found['offset']['mean']:+.2g} ± {found['offset']['spread']:.2g}",
    ]


def _doubts(result: Mapping[str, Any]) -> list[str]:
    """Capabilities about which nothing can be concluded, where the whole allows it."""
    found = {
        name: each["inconclusive"] for name, each in result["capabilities"].items() if each["inconclusive"]
    }
    return [f"  {name}: {why}." for name, why in found.items()] if result["overall"]["conclusive"] else []


def _with_interval(value: float | None, limits: Sequence[float] | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.2f}" if limits is None else f"{value:.2f} ({limits[0]:.2f}..{limits[1]:.2f})"
