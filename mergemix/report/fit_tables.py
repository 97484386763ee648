"""Tables of `mergemix fit` for people: how well each score can be predicted, and the mixture predicted to be best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row


def fit_table(result: Mapping[str, Any]) -> RenderableType:
    """Rank correlations by target, the predicted optimum with intervals, and what was done about the data."""
    lines = [
        f"{result['points']} mixtures of {len(result['domains'])} domains, {result['folds']} folds"
        + (f"; tested on {result['test_points']} others" if result["test_points"] else ""),
    ]
    closing = [*(f"Note: {note}" for note in result["notes"])]
    closing += [f"Warning: {warning}" for warning in result["warnings"]]
    return Group(
        Text("\n".join(lines)),
        _targets(result),
        _optimum(result),
        *([Text("\n".join(closing))] if closing else []),
    )


def _targets(result: Mapping[str, Any]) -> Table:
    tested = result["test_points"] is not None
    table = Table(title="Spearman, predicted against measured")
    table.add_column("target", overflow="fold")
    table.add_column("surrogate", overflow="fold")
    headers = ["left out", *(["test", f"in {result['confidence']:.0%} interval"] if tested else [])]
    candidates = list(
        dict.fromkeys(name for each in result["targets"].values() for name in each["candidates"])
    )
    for header in (*headers, *(f"{name} left out" for name in candidates)):
        table.add_column(header, justify="right")
    for name, each in result["targets"].items():
        cells = [name, _surrogate(each), _rank(each["cv"]["spearman"])]
        if tested:
            cells += [_rank(each["test"]["spearman"]), f"{each['test']['coverage90']:.0%}"]
        add_row(table, *cells, *(_rank(each["candidates"].get(other)) for other in candidates))
    return table


def _surrogate(target: Mapping[str, Any]) -> str:
    used = {name: weight for name, weight in target.get("weights", {}).items() if weight > 0}
    parts = " + ".join(f"{weight:.2f} {name}" for name, weight in used.items())
    return f"{target['surrogate']} ({parts})" if parts else target["surrogate"]


def _optimum(result: Mapping[str, Any]) -> RenderableType:
    optimum = result["optimum"]
    best = "lowest" if result["minimize"] else "highest"
    shares = Table(title=f"Predicted to have the {best} {optimum['target']}")
    shares.add_column("domain", overflow="fold")
    shares.add_column("share", justify="right")
    shares.add_column("best measured", justify="right")
    for name, share in optimum["mixture"].items():
        add_row(shares, name, f"{share:.4f}", f"{optimum['best_measured']['mixture'][name]:.4f}")
    predictions = Table()
    predictions.add_column("target", overflow="fold")
    predictions.add_column("predicted", justify="right")
    predictions.add_column(f"{result['confidence']:.0%} interval", justify="right")
    for name, each in optimum["predictions"].items():
        low, high = each["interval"]
        add_row(predictions, name, f"{each['mean']:.5g}", f"{low:.5g} to {high:.5g}")
    measured = f"Best measured {optimum['target']}: {optimum['best_measured']['score']:.5g}"
    return Group(shares, predictions, Text(measured))


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
