"""Tables of `mergemix solve`: measured beside predicted, what constraints cost, what cannot be beaten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row, shares

MAX_TIES_SHOWN = 8
MAX_PARETO_SHOWN = 12


def solve_table(result: Mapping[str, Any]) -> RenderableType:
    """The answer of `solve`."""
    lines = [
        f"Utility {result['utility']!r}, scores {result['normalize']}, from {result['candidates']} measured mixtures.",
        *([f"Without {', '.join(result['dropped'])}."] if result["dropped"] else []),
        *([f"Constraints: {'; '.join(result['constraints'])}."] if result["constraints"] else []),
    ]
    parts = [Text("\n".join(lines), overflow="fold"), decision_table(result)]
    if result["prices"]:
        parts.append(price_table(result["prices"]))
    parts += [Text("\n".join(_ties(result)), overflow="fold"), pareto_table(result["pareto"])]
    parts += [Text(f"Note: {warning}", overflow="fold") for warning in result["warnings"]]
    return Group(*parts)


def decision_table(result: Mapping[str, Any]) -> RenderableType:
    """The best measured, the best predicted and the unconstrained mixture: shares, utility, every capability."""
    columns = {
        "best measured": result.get("observed"),
        "best predicted": result["predicted"],
        "without constraints": result["unconstrained"],
    }
    shown = {title: column for title, column in columns.items() if column is not None}
    table = Table(title="Best mixtures (95% intervals)", title_justify="left")
    table.add_column("")
    for title in shown:
        table.add_column(title, justify="right")
    domains = [
        name for name in result["predicted"]["mixture"] if any(c["mixture"].get(name) for c in shown.values())
    ]
    for name in domains:
        add_row(table, name, *(f"{column['mixture'].get(name, 0.0):.1%}" for column in shown.values()))
    table.add_section()
    cells = (_with_interval(column["utility"], column["interval"]) for column in shown.values())
    add_row(table, "utility", *cells, style="bold")
    for name in result["predicted"]["capabilities"]:
        add_row(table, name, *(_capability(column["capabilities"].get(name)) for column in shown.values()))
    missed = {name for column in shown.values() for name in column.get("shortfalls", ())}
    for name in sorted(missed):
        cells = (_missed(column.get("shortfalls", {}).get(name)) for column in shown.values())
        add_row(table, f"below {name}", *cells, style="red")
    kinds = ", ".join(f"{name}: {kind}" for name, kind in result["surrogates"].items())
    told = (
        "A prediction has the interval of a measurement, and is one until it is merged and measured. "
        f"Models of {result['points']} mixtures ({kinds})."
    )
    return Group(table, Text(told, overflow="fold"))


def price_table(prices: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What each active constraint costs in predicted utility, and the best mixture without it."""
    table = Table(title="What constraints cost, each alone", title_justify="left")
    table.add_column("constraint")
    table.add_column("utility lost", justify="right")
    table.add_column("best mixture without it", overflow="fold")
    for price in prices:
        add_row(table, price["constraint"], _number(price["price"]), shares(price["mixture"]))
    return table


def pareto_table(pareto: Mapping[str, Sequence[Mapping[str, Any]]]) -> RenderableType:
    """Mixtures that no other beats in all capabilities."""
    table = Table(title="Not beaten in all capabilities", title_justify="left")
    table.add_column("")
    table.add_column("mixture", overflow="fold")
    names = [name for points in pareto.values() for point in points[:1] for name in point["capabilities"]]
    for name in dict.fromkeys(names):
        table.add_column(name, justify="right")
    more = []
    for kind, title in (("observed", "measured"), ("predicted", "predicted")):
        points = pareto[kind]
        for point in points[:MAX_PARETO_SHOWN]:
            scores = (_number(score) for score in point["capabilities"].values())
            add_row(table, title, shares(point["mixture"]), *scores)
        if len(points) > MAX_PARETO_SHOWN:
            more.append(f"and {len(points) - MAX_PARETO_SHOWN} more {title} ones, see --json")
    return Group(table, *(Text(line) for line in more))


def _ties(result: Mapping[str, Any]) -> list[str]:
    if result["observed"] is None:
        return []
    ties = result["indistinguishable"]
    if not ties:
        return ["No other measured mixture that is allowed is within its error bars."]
    lines = [f"{len(ties)} other measured mixtures cannot be told from the best (paired over items):"]
    lines += [f"    {shares(mixture)}" for mixture in ties[:MAX_TIES_SHOWN]]
    more = len(ties) - MAX_TIES_SHOWN
    return [*lines, f"    and {more} more, see --json"] if more > 0 else lines


def _capability(value: float | Mapping[str, Any] | None) -> str:
    """A measured score, or a predicted one with its interval."""
    if value is None or isinstance(value, int | float):
        return _number(value)
    return _with_interval(value["score"], value["interval"])


def _with_interval(value: float | None, limits: Sequence[float | None]) -> str:
    low, high = limits
    known = "not known" if low is None or high is None else f"{_number(low)} to {_number(high)}"
    return f"{_number(value)} ({known})"


def _missed(amount: float | None) -> str:
    return "met" if amount is None else f"by {_number(amount)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value if abs(value) > 1e-12 else 0:.4g}"
