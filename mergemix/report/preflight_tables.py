"""Tables of the preflight, from the dictionary that programs get as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row

STYLES = {"fine": "green", "doubtful": "yellow", "do not trust": "bold red"}


def preflight_table(result: Mapping[str, Any]) -> RenderableType:
    """The checks, worst first; then what was measured, expert by expert and layer by layer; the verdict last."""
    parts: list[RenderableType] = [checks_table(result["checks"]), _experts(result)]
    parts += [_layers(result)]
    if "curvature" in result:
        title = "curvature: a row's Hessian along a column's gradient, over along its own"
        parts += [_matrix(title, result["curvature"]["gamma"])]
    if "routing" in result:
        parts += [_routing(result["routing"])]
    for name, paths in result.get("paths", {}).items():
        parts += [_ends(name, paths)]
    parts += [Text(f"not measured: {name}: {why}") for name, why in result.get("not_measured", {}).items()]
    verdict = result["verdict"]
    return Group(*parts, Text(f"verdict: {verdict}", style=STYLES[verdict]))


def checks_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    for column in ("check", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("why", overflow="fold")
    order = list(STYLES)
    for check in sorted(checks, key=lambda check: -order.index(check["verdict"])):
        table.add_row(
            Text(check["name"]), Text(check["verdict"], style=STYLES[check["verdict"]]), Text(check["why"])
        )
    return table


def _experts(result: Mapping[str, Any]) -> Table:
    """Norms, shares and cosines of the experts."""
    names = list(result["norms"])
    table = Table(title=f"task vectors, relative to the {result['reference']}", title_justify="left")
    table.add_column("expert")
    columns = {"norm": result["norms"], "moved": result["moved"], "alignment": result["alignment"] or {}}
    for column in (*columns, *(f"cos {name}" for name in names)):
        table.add_column(column, justify="right")
    for name in names:
        norm, moved, alignment = (values.get(name) for values in columns.values())
        add_row(
            table,
            name,
            _number(norm),
            "-" if moved is None else f"{moved:.1%}",
            _number(alignment),
            *(_number(result["cosine"][name][other]) for other in names),
        )
    return table


def _layers(result: Mapping[str, Any]) -> Table:
    names = list(result["norms"])
    table = Table(title="norms by layer", title_justify="left")
    table.add_column("layer")
    for column in ("parameters", *names):
        table.add_column(column, justify="right")
    for layer in result["layers"]:
        add_row(
            table,
            layer["layer"],
            f"{layer['parameters']:,}",
            *(_number(layer["norms"][name]) for name in names),
        )
    return table


def _matrix(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        add_row(table, name, *(_number(row[other]) for other in rows))
    return table


def _routing(routing: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"routing: tokens' experts in common with the {routing['reference']} (by chance {routing['chance']:.0%})",
        title_justify="left",
    )
    table.add_column("model")
    table.add_column("mean", justify="right")
    table.add_column("least", justify="right")
    for name, mean in routing["agreement"].items():
        add_row(table, name, f"{mean:.1%}", f"{min(routing['by_router'][name].values()):.1%}")
    return table


def _ends(name: str, paths: Mapping[str, Any]) -> Table:
    """What the base, each expert and their merge score, and the largest barrier on the way to the merge."""
    table = Table(title=f"{name}, {paths['unit']}", title_justify="left")
    table.add_column("model")
    ends = paths["ends"]
    asked = list(next(iter(ends.values())))
    for column in (*asked, "largest barrier"):
        table.add_column(column, justify="right")
    for end, scores in ends.items():
        found = [b["barrier"] for b in paths["barriers"] if b["from"] == end]
        add_row(table, end, *(_number(scores[each]) for each in asked), _number(max(found, default=None)))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
