"""What the benchmarks of `mergemix merge` share: the gate, rows of finished runs, verdicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.children import ChildRun
from benchmarks.common import timing_of
from benchmarks.models import weight_files
from mergemix_kernels import reference

Rows = list[dict[str, Any]]

GATE_ELEMENTS = 1 << 22  # compared at a time
BF16_ROUNDOFF = 2.0**-8
RUN_COLUMNS = ["case", "provider", "median_s", "p20_s", "p80_s", "cpu_s", "peak_rss_mb", "gb_per_s"]
RATIO_COLUMNS = ["case", "provider", "median", "p20", "p80"]


def uneven_weights(names: Sequence[str]) -> dict[str, float]:
    """Different weights that sum to one."""
    total = len(names) * (len(names) + 1) // 2
    return {name: (k + 1) / total for k, name in enumerate(names)}


class OpenModel:
    """The tensors of a checkpoint directory, read piece by piece."""

    def __init__(self, directory: Path) -> None:
        files = [safe_open(path, "pt") for path in weight_files([directory])]
        self._slices = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        return set(self._slices)

    def shape(self, name: str) -> list[int]:
        return self._slices[name].get_shape()

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        return self._slices[name][begin:end]


def pieces(model: OpenModel, name: str) -> list[tuple[int, int]]:
    """(first row, end row) of pieces of about GATE_ELEMENTS that cover a tensor."""
    rows, *rest = model.shape(name)
    step = max(GATE_ELEMENTS // int(np.prod(rest, dtype=np.int64)), 1)
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def differing_tensors(
    merged: Path, experts: Sequence[Path], weights: Sequence[float], *, bound: float | None = None
) -> list[str]:
    """Names of the tensors of `merged` that are not what the fp32 reference makes of the same files.

    bound None: bit for bit. Otherwise, for implementations that compute in bf16: by at most `bound` times
    the sum of |weight * value|.
    """
    result, sources = OpenModel(merged), [OpenModel(expert) for expert in experts]
    wrong = sorted(sources[0].names() ^ result.names())
    for name in sorted(sources[0].names() & result.names()):
        for begin, end in pieces(sources[0], name):
            parts = [source.rows(name, begin, end) for source in sources]
            if not _agrees(result.rows(name, begin, end), parts, weights, bound):
                wrong.append(name)
                break
    return wrong


def _agrees(
    found: torch.Tensor, parts: Sequence[torch.Tensor], weights: Sequence[float], bound: float | None
) -> bool:
    expected = reference.weighted_sum(parts, weights)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if bound is None:
        return torch.equal(found.view(torch.int16), expected.view(torch.int16))
    magnitude = sum((part.float() * weight).abs() for part, weight in zip(parts, weights, strict=True))
    return bool(((found.float() - expected.float()).abs() <= bound * magnitude).all())


def run_row(case: str, provider: str, runs: Sequence[ChildRun], moved_bytes: int) -> dict[str, Any]:
    """One long-form row of repeated runs. moved_bytes: what the job has to read and write."""
    timing = timing_of([run.seconds for run in runs])
    row: dict[str, Any] = {"case": case, "provider": provider, "repeats": len(runs)}
    for quantile in ("median", "p20", "p80"):
        row[f"{quantile}_s"] = getattr(timing, f"{quantile}_s")
    row["cpu_s"] = float(np.median([run.cpu_s for run in runs]))
    row["peak_rss_mb"] = max(run.peak_rss_bytes for run in runs) / 1e6
    row["gb_per_s"] = moved_bytes / timing.median_s / 1e9
    return row


def ratio_row(
    case: str, provider: str, numerators: Sequence[float], denominators: Sequence[float]
) -> dict[str, Any]:
    """One row of ratios that were taken round by round."""
    timing = timing_of([a / b for a, b in zip(numerators, denominators, strict=True)])
    ratios = {"median": timing.median_s, "p20": timing.p20_s, "p80": timing.p80_s}
    return {"case": case, "provider": provider, "repeats": len(numerators), **ratios}


def verdict(what: str, measured: float | None, bar: float, *, at_least: bool) -> dict[str, Any]:
    """One thing that the project must show. measured None: it was not measured."""
    met = None if measured is None else bool(measured >= bar if at_least else measured <= bar)
    sign = ">=" if at_least else "<="
    return {"case": "verdict", "what": what, "measured": measured, "bar": f"{sign} {bar:g}", "met": met}


def verdict_lines(verdicts: Sequence[Mapping[str, Any]]) -> str:
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return "\n".join(
        f"{words[row['met']]:>12}  {row['what']}: "
        f"{'-' if row['measured'] is None else format(row['measured'], '.3g')} (bar {row['bar']})"
        for row in verdicts
    )


def roofline_lines(rows: Rows) -> str:
    lines = []
    for row in rows:
        threads = f", {row['threads']} threads" if "threads" in row else ""
        figures = [(key, row[key]) for key in ("gb_per_s", "gflop_per_s") if key in row]
        units = {"gb_per_s": "GB/s", "gflop_per_s": "GFLOP/s"}
        lines += [f"roofline: {row['provider']}{threads}: {value:.2f} {units[key]}" for key, value in figures]
    return "\n".join(lines)
