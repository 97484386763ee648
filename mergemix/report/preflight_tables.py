"""Tables of the preflight, from the dictionary that programs get as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row

WIDTH = 80  # columns of a terminal at least
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


def _experts(result: Mapping[str, Any]) -> RenderableType:
    """Norms, shares and cosines of the experts."""
    names = list(result["norms"])
    moved, alignment = result["moved"], result["alignment"] or {}
    columns = {
        "norm": [_number(result["norms"][name]) for name in names],
        "moved": ["-" if moved[name] is None else f"{moved[name]:.1%}" for name in names],
        "alignment": [_number(alignment.get(name)) for name in names],
        **{f"cos {other}": [_number(result["cosine"][name][other]) for name in names] for other in names},
    }
    return _wide(f"task vectors, relative to the {result['reference']}", "expert", names, columns)


def _layers(result: Mapping[str, Any]) -> RenderableType:
    layers = result["layers"]
    columns = {
        "parameters": [f"{layer['parameters']:,}" for layer in layers],
        **{name: [_number(layer["norms"][name]) for layer in layers] for name in result["norms"]},
    }
    return _wide("norms by layer", "layer", [layer["layer"] for layer in layers], columns)


def _matrix(title: str, rows: Mapping[str, Mapping[str, float]]) -> RenderableType:
    columns = {other: [_number(row[other]) for row in rows.values()] for other in rows}
    return _wide(title, "", list(rows), columns)


def _wide(
    title: str, label: str, rows: Sequence[str], columns: Mapping[str, Sequence[str]]
) -> RenderableType:
    """One table of `columns`; several below each other where they are too wide for a terminal: none is cut."""

    def width(header: str, cells: Sequence[str]) -> int:
        return max(map(cell_len, (header, *cells))) + 3  # padding and a border

    parts: list[list[str]] = [[]]
    used = width(label, rows) + 1
    room = WIDTH - used
    for header, cells in columns.items():
        needed = width(header, cells)
        if needed > room and parts[-1]:
            parts.append([])
            room = WIDTH - used
        parts[-1].append(header)
        room -= needed
    tables: list[RenderableType] = []
    for headers in parts:
        table = Table(title=title if not tables else None, title_justify="left")
        table.add_column(Text(label))
        for header in headers:
            table.add_column(Text(header), justify="right")
        for place, row in enumerate(rows):
            add_row(table, row, *(columns[header][place] for header in headers))
        tables.append(table)
    return Group(*tables)


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


def _ends(name: str, paths: Mapping[str, Any]) -> RenderableType:
    """What the base, each expert and their merge score, and the largest barrier on the way to the merge."""
    ends = paths["ends"]
    columns = {
        asked: [_number(scores[asked]) for scores in ends.values()] for asked in next(iter(ends.values()))
    }
    found = [[b["barrier"] for b in paths["barriers"] if b["from"] == end] for end in ends]
    largest = {"largest barrier": [_number(max(each, default=None)) for each in found]}
    return _wide(f"{name}, {paths['unit']}", "model", list(ends), columns | largest)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
