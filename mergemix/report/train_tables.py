"""What was trained, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row


def train_table(records: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """A line per model, and one per model and domain below."""
    models = Table()
    models.add_column("model")
    for column in ("tokens", "steps", "first loss", "last loss", "tokens/s", "seconds"):
        models.add_column(column, justify="right")
    domains = Table()
    for column in ("model", "domain"):
        domains.add_column(column)
    for column in ("share", "tokens", "of them general", "epochs"):
        domains.add_column(column, justify="right")
    for name, record in records.items():
        add_row(
            models,
            name,
            f"{record['tokens']:,}",
            f"{record['steps']:,}",
            f"{record['first_loss']:.4g}",
            f"{record['last_loss']:.4g}",
            f"{record['tokens_per_s']:,.0f}",
            f"{record['seconds']:.1f}",
        )
        for domain, part in record["domains"].items():
            add_row(
                domains,
                name,
                domain,
                f"{part['share']:.2%}",
                f"{part['tokens']:,}",
                f"{part['general_tokens']:,}",
                f"{part['epochs']:.2f}",
            )
    return Group(models, domains, Text("\n".join(line for line in map(_note, records.values()) if line)))


def _note(record: Mapping[str, Any]) -> str:
    """What is to be said besides of one training."""
    notes = []
    if record["tokens_asked_for"] not in (None, record["tokens"]):
        notes.append(
            f"{record['tokens_asked_for']:,} tokens were asked for, and rounded up to {record['steps']} whole steps"
        )
    if record["resumed_at"]:
        notes.append(f"resumed at step {', '.join(map(str, record['resumed_at']))}")
    if record["reused"]:
        notes.append("was finished before")
    return f"{record['out']}: {'; '.join(notes)}" if notes else record["out"]
