"""The results as a page: every study's table beside the paper's figures, and what was missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.miniature.corpora import CAPABILITIES

# arXiv 2601.17858, as its tables 1, 2, 3 and 6 have them.
PAPER_RANKS = {
    "overall": 0.92,
    "math": 0.84,
    "code": 0.80,
    "knowledge": 0.98,
    "language": 0.72,
    "reasoning": 0.89,
}
PAPER_QUALITY = {"uniform": 54.2, "RegMix": 58.1, "MergeMix": 58.4}
PAPER_HIERARCHY = {"<MergeMix, uniform>": 57.6, "<MergeMix, MergeMix>": 58.2}
BAR_OVERALL, BAR_CAPABILITY = 0.9, 0.8


def page(results: Mapping[str, Any]) -> str:
    """Markdown."""
    parts = [_head(results), _dual(results["dual"]), *(_ranks(each) for each in results["ranks"])]
    parts.append(_more_seeds(results["more seeds"]))
    parts += [_quality(results["quality"]), _cost(results["ledger"]), _scale(results["scale"])]
    parts += [_dynamic(results["dynamic"]), _hierarchy(results["hierarchy"])]
    parts += [_landscape(results["landscape"]), _matrices(results["matrices"]), _misses(results)]
    return "\n\n".join(parts) + "\n"


def misses(results: Mapping[str, Any]) -> list[str]:
    """Which of the bars were missed, one line each."""
    found = []
    for study in results["ranks"]:
        bars = {"overall": (study["overall"], BAR_OVERALL)}
        bars |= {name: (each, BAR_CAPABILITY) for name, each in study["capabilities"].items()}
        for name, (each, bar) in bars.items():
            if each["spearman"] is None or each["spearman"] < bar:
                found.append(
                    f"rank consistency, {study['shape']}, {name}: {_number(each['spearman'])}, bar {bar:g}"
                )
    rows = results["quality"]["rows"]
    for other in ("uniform", "RegMix"):
        if rows["MergeMix"]["utility"] <= rows[other]["utility"]:
            found.append(f"final quality: MergeMix is not above {other}")
    scaled = results["scale"]["rows"]
    if scaled["MergeMix (small)"]["utility"] <= scaled["uniform"]["utility"]:
        found.append("cross-scale: the small model's mixture is not above uniform")
    return found


def _head(results: Mapping[str, Any]) -> str:
    taken = results["conditions"]
    command = "make reproduce" + ("" if results["scale_name"] == "cpu" else f" SCALE={results['scale_name']}")
    spent = sum(each["seconds"] for each in results["ledger"].values())
    return (
        f"# The paper in miniature\n\n`{command}`: {spent / 60:.0f} minutes of training and searches, scoring trained "
        f"models not counted, on {taken['cores']} cores ({taken['cpu']}), commit {str(taken['commit'])[:12]}, Python "
        f"{taken['python']}.\n\n"
        "Domains: made tasks (math, and code that adds numbers, too), made facts, the standard library's source "
        "(python), and spam, which nothing asks for. Every number of the protocol is in `miniature/protocol.py` "
        "beside the benchmarks, fixed before any held-out mixture was trained. Every model but the bases is the mean "
        "of its weights after each of its last steps, as the paper averages checkpoints. The paper has models "
        "10,000 times as large on real benchmarks: its figures stand beside ours for the shape of the result, not "
        "its size."
    )


def _dual(found: Mapping[str, Any]) -> str:
    rows = [
        [name, _number(each["spearman"]), _range(each["interval"]), _number(each["kendall"]),
         _number(each["offset"]["mean"], 3), _number(each["offset"]["spread"], 3)]
        for name, each in found["capabilities"].items()
    ]  # fmt: skip
    return (
        f"## 1. Nine mixtures of {found['pair'][0]} and {found['pair'][1]}, merged and trained (figures 2, 3)\n\n"
        "The paper: merged curves follow the trained ones with a constant offset.\n\n"
        + _table(["capability", "Spearman", "95%", "Kendall", "offset (nats)", "its spread"], rows)
        + "\n\n![curves and ranks](dual.png)"
    )


def _more_seeds(found: Mapping[str, Any]) -> str:
    return (
        _ranks(found, "2b.")
        + "\n\nThese seeds were added when the result with two was known, for the account of what was missed: they "
        "tell the proxy's error from the references' own. The table with two seeds is the one that was fixed before."
    )


def _ranks(found: Mapping[str, Any], number: str = "2.") -> str:
    def row(name: str, each: Mapping[str, Any], bar: float) -> list[str]:
        ceiling, corrected = each.get("ceiling") or {}, each.get("corrected") or {}
        return [
            name, _number(each["spearman"]), _range(each["interval"]), _number(each["kendall"]),
            _number(ceiling.get("ceiling")), _number(corrected.get("spearman")), f"{bar:g}",
            _number(PAPER_RANKS.get(name)),
        ]  # fmt: skip

    rows = [row("overall", found["overall"], BAR_OVERALL)]
    rows += [row(name, each, BAR_CAPABILITY) for name, each in found["capabilities"].items()]
    seeds = found["overall"]["seeds"]
    return (
        f"## {number} Rank consistency, {found['shape']} base: {found['references']} held-out mixtures, {seeds} seeds "
        "each (table 2)\n\n"
        + _table(["", "Spearman", "95%", "Kendall", "ceiling", "corrected", "bar", "paper"], rows)
        + "\n\nCeiling: what the references' own seeds allow. The paper has 12 mixtures and other capabilities "
        "(knowledge 0.98, language 0.72, reasoning 0.89)."
        + ("\n\n![merged and trained](ranks.png)" if found["shape"] == "dense" and number == "2." else "")
    )


def _quality(found: Mapping[str, Any]) -> str:
    return (
        "## 3. Final quality on test items (table 1)\n\n"
        "Nats an item; utility: 0 is the base, 1 the best that an expert reaches, mean over capabilities.\n\n"
        + _scores(found["rows"], PAPER_QUALITY)
        + f"\n\nThe grid has {found['grid']['models']} models, each trained to the end.\n\n"
        + _mixtures(found["mixtures"])
    )


def _cost(ledger: Mapping[str, Mapping[str, float]]) -> str:
    experts = ledger["experts dense"]["tokens"]
    rows = [
        [name, f"{each['models']:.0f}", f"{each['tokens'] / 1e6:.2f}",
         f"{each['tokens'] / experts:.1f}" if each["tokens"] else "", f"{each['seconds']:.0f}"]
        for name, each in ledger.items()
    ]  # fmt: skip
    return (
        "## 4. Cost (table 6)\n\n"
        "The paper, relative: manual search and RegMix 100, CLIMB 9.8, scaling laws 7.5, MergeMix 1.\n\n"
        + _table(["what", "models", "M tokens", "relative to the experts", "seconds"], rows)
    )


def _scale(found: Mapping[str, Any]) -> str:
    return (
        "## 5. Across scales: found on the small model, trained at four times its size (figure 6a)\n\n"
        "The paper: the mixture found at 8B wins at 16B, too.\n\n" + _scores(found["rows"])
    )


def _dynamic(found: Mapping[str, Any]) -> str:
    return (
        "## 6. Dynamic against static (figure 6b)\n\n"
        "The paper: searching again at half of the training changes almost nothing.\n\n"
        + _scores(found["rows"])
        + f"\n\nThe mixture moved by {found['moved']:.2f} (half the L1 distance).\n\n"
        + _mixtures(found["mixtures"])
    )


def _hierarchy(found: Mapping[str, Any]) -> str:
    return (
        "## 7. Hierarchy (table 3)\n\n"
        + _scores(found["rows"], PAPER_HIERARCHY)
        + "\n\n"
        + _mixtures(found["mixtures"])
    )


def _landscape(found: Mapping[str, Any]) -> str:
    rows = [[name, _shares(peak)] for name, peak in found["peaks"].items()]
    return (
        f"## 8. Capabilities over {', '.join(found['triangle'])} (figure 8)\n\n"
        "The paper: code peaks near its pure domain, math at a mixture.\n\n"
        + _table(["capability", "highest at"], rows)
        + "\n\n![landscape](landscape.png)"
    )


def _matrices(found: Mapping[str, Any]) -> str:
    gamma = found["gamma"]
    off = [value for i, line in enumerate(gamma) for j, value in enumerate(line) if i != j]
    parts = [f"off the diagonal gamma is {min(off):.2f} to {max(off):.2f} (1 on it)"]
    for name, values in found["cosines"].items():
        cosines = [value for i, line in enumerate(values) for j, value in enumerate(line) if i < j]
        parts.append(f"cosines of task vectors, {name}, {min(cosines):.2f} to {max(cosines):.2f}")
    return (
        "## 9. Curvature and cosines (figure 7)\n\n"
        f"Here {'; '.join(parts)}. The paper: gamma is diagonally dominant, cosines near zero. A part of every "
        "expert's tokens is the same general data, which is a common part of all task vectors."
        "\n\n![matrices](matrices.png)"
    )


def _misses(results: Mapping[str, Any]) -> str:
    found = misses(results)
    return "## Missed\n\n" + ("\n".join(f"- {line}" for line in found) if found else "No bar was missed.")


def _scores(rows: Mapping[str, Mapping[str, float]], paper: Mapping[str, float] | None = None) -> str:
    head = ["", *CAPABILITIES, "utility", "+- seeds", *(["paper (average)"] if paper else [])]
    lines = [
        [name, *(_number(each[c]) for c in CAPABILITIES), _number(each["utility"], 3), _number(each["half_range"], 3),
         *([_number(_of_paper(paper, name), 1)] if paper else [])]
        for name, each in rows.items()
    ]  # fmt: skip
    return _table(head, lines)


def _of_paper(paper: Mapping[str, float], name: str) -> float | None:
    return next((value for start, value in paper.items() if name.startswith(start)), None)


def _mixtures(mixtures: Mapping[str, Mapping[str, float]]) -> str:
    return "\n".join(f"- {name}: {_shares(shares)}" for name, shares in mixtures.items())


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{domain} {share:.2f}" for domain, share in shares.items() if share >= 0.005)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def lines() -> Iterator[str]:
        for row in (head, ["---"] * len(head), *rows):
            yield "| " + " | ".join(row) + " |"

    return "\n".join(lines())


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
