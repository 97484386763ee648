"""Commands about the machine."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from mergemix.cli.group import cli, common


@cli.command()
@common
def doctor(*, console: Console) -> tuple[dict[str, Any], Any]:
    """What this machine can run: engines, kernels, bandwidths, versions."""
    from mergemix.doctor import examine
    from mergemix.report.tables import doctor_table

    console.print("Importing engines and measuring bandwidths, half a minute ...")
    found = examine()
    return found, doctor_table(found)
