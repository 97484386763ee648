"""Tables for people, from the same dictionaries that programs get as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.units import size_text

MAX_TIES_SHOWN = 8


def shares(mixture: Mapping[str, float]) -> str:
    """ "math 45.0%, code 55.0%", largest first, zero shares left out; "base" when all are zero."""
    present = sorted(
        ((weight, name) for name, weight in mixture.items() if weight), key=lambda pair: -pair[0]
    )
    return ", ".join(f"{name} {weight:.1%}" for weight, name in present) or "base"


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
    lines = [
        f"Best mixture: {shares(best['mixture'])}",
        f"  utility {best['utility']:.4g}, 95% interval over items {_interval(best['interval'])}; "
        f"noise floor {_number(summary['noise_floor'])} (best and uniform evaluated twice)",
        *_groups(best),
        *_warnings(summary),
        *_troubles(summary),
        *_lead(summary),
        *_ties(summary["indistinguishable"]),
        *_costs(summary),
    ]
    return Group(table, Text("\n".join(lines), overflow="fold"))


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


def _interval(limits: Sequence[float | None]) -> str:
    return "not known" if None in limits else f"[{', '.join(_number(limit) for limit in limits)}]"


def _number(value: float | None) -> str:
    """Four digits; what is left of a difference of equal numbers is 0."""
    return "-" if value is None else f"{value if abs(value) > 1e-12 else 0:.4g}"
