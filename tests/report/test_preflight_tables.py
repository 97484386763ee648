"""The preflight's tables, of many experts too."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from mergemix.preflight.family import preflight_family
from mergemix.report.preflight_tables import preflight_table
from tests.merge.families import write_family


def test_no_column_is_cut_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """Twelve experts, whose cosines alone are wider than that; a name in brackets is no markup."""
    names = ["[bold]", *(f"domain-{number}" for number in range(11))]
    generator = torch.Generator().manual_seed(0)
    tensors = [{"layers.0.w": torch.randn(8, 8, generator=generator)} for _ in range(13)]
    result = preflight_family(write_family(tmp_path, tensors[0], dict(zip(names, tensors[1:], strict=True))))
    console = Console(width=80, file=(tmp_path / "out").open("w"))
    with console.capture() as captured:
        console.print(preflight_table({**result, "not_measured": {}}))
    shown = captured.get()
    assert "…" not in shown
    for name in names:
        assert f"cos {name}" in shown
        assert f"{result['cosine'][name]['domain-10']:.3f}" in shown
    assert "verdict: do not trust" in shown
