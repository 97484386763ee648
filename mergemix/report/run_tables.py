"""The answer of `mergemix run` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.solve_tables import price_table
from mergemix.report.tables import add_row, shares

MAX_TIES_SHOWN = 8
MAX_VERIFIED_SHOWN = 12  # the last ones


def run_table(summary: Mapping[str, Any]) -> RenderableType:
    """The answer: best mixture beside uniform and every single expert, noise floor, ties, costs."""
    best = summary["best"]
    holdout: Mapping[str, float | None] = summary.get("holdout", {}).get("utility", {})
    table = Table(title="Utility (higher is better)", title_justify="left")
    table.add_column("mixture")
    table.add_column("utility", justify="right")
    table.add_column("best - this", justify="right")
    if holdout:
        table.add_column("held-out", justify="right")
    rows = [("best found", best["utility"]), *summary["baselines"].items()]
    for name, value in rows:
        gap = "" if value is None or name == "best found" else f"{best['utility'] - value:+.4g}"
        cells = [name, _number(value), gap]
        if holdout:
            cells.append(_number(holdout.get("best" if name == "best found" else name)))
        add_row(table, *cells, style="bold" if name == "best found" else None)
    decision = summary["decision"]
    lines = [
        f"Best mixture: {shares(best['mixture'])}",
        f"  utility {best['utility']:.4g}, 95% interval over items {_interval(best['interval'])}; "
        f"noise floor {_number(summary['noise_floor'])} (best and uniform evaluated twice)",
        *_groups(best),
        *_shortfalls(best),
        *_predicted(decision),
        *_warnings(summary),
        *_troubles(summary),
        *_lead(summary),
        *_ties(summary["indistinguishable"]),
        *_costs(summary),
    ]
    parts: list[RenderableType] = [table, Text("\n".join(lines), overflow="fold")]
    if summary["verified"]:
        parts.append(verified_table(summary["verified"]))
    if decision["prices"]:
        parts.append(price_table(decision["prices"]))
    return Group(*parts)


def verified_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What a model predicted of the mixtures that it proposed, and what was measured."""
    table = Table(title="Predicted and measured", title_justify="left")
    table.add_column("mixture", overflow="fold")
    for column in ("predicted", "measured", "difference"):
        table.add_column(column, justify="right")
    for row in rows[-MAX_VERIFIED_SHOWN:]:
        predicted = f"{row['predicted']:.4g} ± {row['deviation']:.2g}"
        observed = f"{row['observed']:.4g}{' (stopped early)' if row['partial'] else ''}"
        add_row(
            table, shares(row["mixture"]), predicted, observed, f"{row['observed'] - row['predicted']:+.2g}"
        )
    return table


def _shortfalls(best: Mapping[str, Any]) -> list[str]:
    penalty = best["penalty"]
    return [
        *([f"  chosen less {penalty:.3g} for straying from the prior"] if penalty else []),
        *(
            f"  below its floor by {amount:.3g}: {floor}; no measured mixture meets all floors"
            for floor, amount in best["shortfalls"].items()
        ),
    ]


def _predicted(decision: Mapping[str, Any]) -> list[str]:
    """The best mixture of the models, and that without constraints where it is another one."""
    lines = []
    for title, found in (
        ("Best predicted", decision["predicted"]), ("Without constraints", decision["unconstrained"])
    ):  # fmt: skip
        if found is not None:
            lines.append(
                f"{title}: {shares(found['mixture'])}; utility {_number(found['utility'])}, a measurement is within "
                f"{_interval(found['interval'])} with 95%"
            )
    return [*lines, *(f"  {warning}" for warning in decision["warnings"])]


def demo_table(summary: Mapping[str, Any], out: Path) -> RenderableType:
    """The run's answer, what held-out items say of it, and where to look next."""
    study = out / "study"
    lines = [
        "",
        *_gains(summary["holdout"]),
        "",
        "Where to look next:",
        f"  {study / 'mixture.json'}: this answer",
        f"  {study / 'study.sqlite'}: all evidence",
        f"  {out / 'models'}, {out / 'benchmarks'}: the experts, and what they were asked",
        f"  mergemix items --study {study} --candidate 1 --below -2: where a candidate lost most",
        f"  mergemix run --config {out / 'study.yaml'} --engine {summary['engine']} --budget 60: more of this search",
    ]
    return Group(run_table(summary), Text("\n".join(lines)))


def _gains(holdout: Mapping[str, Any]) -> list[str]:
    lines = [f"On {holdout['items']} items that the search never saw, the mixture found is"]
    for name, gain in holdout["gain"].items():
        low, high = gain["interval"]
        verdict = "not to be told from"
        if low is not None and high is not None:
            verdict = "better than" if low > 0 else "worse than" if high < 0 else verdict
        lines.append(
            f"  {verdict} {name}: {gain['estimate']:+.4g}, 95% interval {_interval(gain['interval'])}"
        )
    return lines


def _groups(best: Mapping[str, Any]) -> list[str]:
    """The weights of each layer group of the best mixture."""
    lines = []
    for group in best.get("groups", ()):
        first, *rest = group["tensors"]
        named = f"{first} to {rest[-1]}" if len(rest) > 1 else " ".join(group["tensors"])
        lines.append(f"  {named}: {shares(group['weights'])}")
    return lines


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    base = summary["baselines"].get("base")
    plain = summary.get("best_without_groups")
    told = (
        [
            "Weights by layer make a model, not shares of data; the best shares for the whole model are "
            f"{shares(plain['mixture'])}, utility {plain['utility']:.4g}."
        ]
        if plain
        else []
    )
    lines = [f"  failed: {shares(each['mixture'])}: {each['reason']}" for each in summary["failures"]]
    lines += [
        f"Preflight, {check['verdict']}: {check['why']}."
        for check in summary["preflight"]["checks"]
        if check["verdict"] != "fine"
    ]
    if base is not None and base > summary["best"]["utility"]:
        lines.append(
            "The base scores higher than every mixture: the experts harm what these benchmarks measure."
        )
    if "holdout" not in summary:
        lines.append(
            "The best of many is also lucky: score it on items that the search has not seen (--holdout)."
        )
    return [*told, *lines]


def _lead(summary: Mapping[str, Any]) -> list[str]:
    """What is left, on items that the search never saw, of the lead over uniform."""
    lead = summary.get("holdout", {}).get("lead", {})
    if lead.get("gap") is None:
        return []
    return [
        f"Ahead of uniform by {_number(lead['search'])} on the items it was chosen by and by "
        f"{_number(lead['holdout'])} on held-out ones: a gap of {_number(lead['gap'])}."
    ]


def _troubles(summary: Mapping[str, Any]) -> list[str]:
    """Items that could not be scored or did not fit, and benchmarks that say nothing about mixtures."""
    lines = []
    for name, count in summary["item_troubles"].items():
        parts = {
            "could not be scored": count["errors"],
            "had prompts cut to fit the model": count["cut"],
            "had answers ended by their limit of tokens": count["unfinished"],
        }
        told = ", ".join(f"{number} {what}" for what, number in parts.items() if number)
        lines.append(f"  {name}: of {count['items']} answers {told}.")
    for name, reason in summary["uninformative"].items():
        lines.append(f"  {name} carries no information: {reason}.")
    return lines


def _ties(mixtures: Sequence[Mapping[str, Any]]) -> list[str]:
    if not mixtures:
        return ["No other candidate is within its error bars."]
    shown = [f"    {_shares_and_groups(mixture)}" for mixture in mixtures[:MAX_TIES_SHOWN]]
    more = len(mixtures) - len(shown)
    return [
        f"{len(mixtures)} other candidates cannot be told from it (paired over items):",
        *shown,
        *([f"    and {more} more, see --json"] if more else []),
    ]


def _shares_and_groups(mixture: Mapping[str, Any]) -> str:
    if "groups" not in mixture:
        return shares(mixture)
    return f"{shares(mixture['mixture'])}, with {len(mixture['groups'])} layer groups"


def _costs(summary: Mapping[str, Any]) -> list[str]:
    swaps = summary["swaps"]
    reasons = "; ".join(summary["stopped"].values())
    return [
        f"{summary['candidates']} candidates ({summary['failed']} failed, {summary['stopped_early']} stopped early), "
        f"{summary['item_evaluations']} item evaluations; ended: {reasons}.",
        f"Engine {summary['engine']}: {swaps['count']} swaps ({_proof(swaps)}), "
        f"median swap {swaps['median_s']:.3f} s, generation {summary['generation_median_s']:.2f} s, "
        f"everything beyond generation {summary['overhead_median_s']:.3f} s a candidate.",
    ]


def _proof(swaps: Mapping[str, Any]) -> str:
    """How far the scores are known to be of the right weights."""
    kinds = {
        "a fresh start": swaps["fresh_starts"],
        "swapped without verification": swaps["unproven"] - swaps["fresh_starts"],
    }
    parts = [(count, kind) for kind, count in kinds.items() if count]
    if not parts:
        return "proven"
    if parts[0][0] == swaps["count"]:
        return f"NOT proven: every candidate was {parts[0][1]}"
    return f"NOT all proven: {' and '.join(f'{count} {kind}' for count, kind in parts)}"


def _interval(limits: Sequence[float | None]) -> str:
    return "not known" if None in limits else f"[{', '.join(_number(limit) for limit in limits)}]"


def _number(value: float | None) -> str:
    """Four digits; what is left of a difference of equal numbers is 0."""
    return "-" if value is None else f"{value if abs(value) > 1e-12 else 0:.4g}"
