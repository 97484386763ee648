"""Tables for people, from the same dictionaries that programs get as JSON: items, doctor, and what tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.units import size_text


def shares(mixture: Mapping[str, float]) -> str:
    """ "math 45.0%, code 55.0%", largest first, zero shares left out; "base" when all are zero."""
    present = sorted(
        ((weight, name) for name, weight in mixture.items() if weight), key=lambda pair: -pair[0]
    )
    return ", ".join(f"{name} {weight:.1%}" for weight, name in present) or "base"


def items_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per item and candidate; where a row has another `beside` it, that follows."""
    table = Table()
    for column in ("candidate", "mixture", "benchmark", "item"):
        table.add_column(column)
    table.add_column("score", justify="right")
    table.add_column("answer", overflow="fold", max_width=60)
    for row in rows:
        for shown in (row, row["beside"]) if "beside" in row else (row,):
            score, error = shown["score"], shown["error"]
            answer = f"error: {error}" if error is not None else shown["text"] or ""
            add_row(
                table,
                str(shown["candidate"]),
                shares(shown["mixture"]),
                shown["benchmark"],
                shown["item"],
                "-" if score is None else f"{score:.4g}",
                answer,
            )
    return table


def design_table(result: Mapping[str, Any]) -> RenderableType:
    table = Table(title=f"{len(result['mixtures'])} mixtures ({result['kind']})", title_justify="left")
    names = list(result["mixtures"][0])
    for name in names:
        table.add_column(name, justify="right")
    for mixture in result["mixtures"]:
        add_row(table, *(f"{mixture[name]:.2%}" for name in names))
    return table


def doctor_table(found: Mapping[str, Any]) -> RenderableType:
    table = Table(show_header=False, box=None)
    machine = found["machine"]
    add_row(
        table, "machine", f"{machine['cpu']}, {machine['cores']} cores, {size_text(machine['memory_bytes'])}"
    )
    add_row(table, "system", f"{machine['system']}, Python {machine['python']}")
    gpus = [
        f"{gpu['name']} ({size_text(gpu['memory_bytes'])}, sm {gpu['capability']})" for gpu in found["gpus"]
    ]
    add_row(table, "GPUs", ", ".join(gpus) or "none")
    for name, engine in found["engines"].items():
        state = f"works ({engine['device']}, {engine['version']})" if engine["works"] else engine["reason"]
        add_row(table, f"engine {name}", state)
    exact = found["kernels"]["cpu"]["exact"]
    add_row(table, "CPU kernel", "exact" if exact else "NOT EXACT: do not use")
    speed = {name: f"{size_text(rate)}/s" for name, rate in found["bandwidths"].items()}
    add_row(
        table, "CPU bandwidth", f"merges {speed['kernel']} beside a memory copy of {speed['memory_copy']}"
    )
    disk = found["disk"]
    add_row(
        table,
        "temporary disk",
        f"{disk['directory']}: reads {speed['disk_read']}, writes {speed['disk_write']}, "
        f"{size_text(disk['free_bytes'])} free",
    )
    add_row(table, "versions", ", ".join(f"{n} {v}" for n, v in found["versions"].items() if v))
    return table


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Cells are text: a name with brackets is no markup."""
    table.add_row(*map(Text, cells), style=style)
