"""Tables of merging for people: what was merged, averaged, or would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mergemix.report.tables import add_row
from mergemix.units import size_text

STAGES = {
    "start": "loading the kernel",
    "disk_read": "reading the disk",
    "hub_read": "reading the Hub",
    "kernel": "the kernel",
    "low_rank_kernel": "the low-rank kernel",
    "disk_write": "writing the disk",
    "processor": "the processor's cores",
}
PLACES = {"device": "in device memory", "host": "in shared host memory", "disk": "in their files"}


def merge_table(result: Mapping[str, Any]) -> RenderableType:
    """Where the merge is, of what, and what it took; with many outputs a line for each before."""
    totals = Table(show_header=False, box=None)
    add_row(totals, "written", result["out"])
    if "outputs" not in result:
        if result["given"] != result["mixture"]:
            add_row(totals, "weights given", _weights(result["given"]))
        add_row(totals, "weights used", _weights(result["mixture"]))
        return _with_costs(totals, result)
    outputs = Table()
    for column in ("mixture", "weights used", "directory"):
        outputs.add_column(column, overflow="fold")
    for output in result["outputs"]:
        add_row(outputs, output["name"], _weights(output["mixture"]), output["out"])
    return Group(outputs, _with_costs(totals, result))


def average_table(result: Mapping[str, Any]) -> RenderableType:
    """What was averaged, with weights and scores, and what was left out."""
    scored = result["checkpoints"][0]["score"] is not None
    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("weight", justify="right")
    if scored:
        table.add_column("score", justify="right")
    for each in (*result["checkpoints"], *result["left_out"]):
        cells = [each["name"], f"{each['weight']:.4g}" if "weight" in each else "left out"]
        add_row(table, *cells, *([f"{each['score']:.6g}"] if scored else []))
    lines = []
    if result["ties"]:
        lines.append(f"Equal scores at the cut: {', '.join(result['ties'])}; those given first were taken.")
    totals = Table(show_header=False, box=None)
    add_row(totals, "written", result["out"])
    return Group(table, *map(Text, lines), _with_costs(totals, result))


def _with_costs(table: Table, result: Mapping[str, Any]) -> Table:
    moved = result["bytes_read"] + result["bytes_written"]
    seconds = result["seconds"]
    add_row(table, "tensors", str(result["tensors"]))
    add_row(
        table, "read, written", f"{size_text(result['bytes_read'])}, {size_text(result['bytes_written'])}"
    )
    add_row(table, "time", f"{seconds:.2f} s ({size_text(moved / max(seconds, 1e-9))}/s)")
    add_row(table, "peak memory", size_text(result["peak_rss_bytes"]))
    return table


def plan_table(result: Mapping[str, Any]) -> RenderableType:
    """What a merge would take, beside what there is, and whether it fits."""
    table = Table(show_header=False, box=None)
    outputs = len(result.get("outputs", "1"))
    add_row(table, "out", f"{result['out']}{f' ({outputs} checkpoints)' if 'outputs' in result else ''}")
    for each in result["reads"]:
        add_row(table, f"read {each['name']}", f"{size_text(each['bytes'])} of {each['source']}")
    add_row(table, "read in all", f"{size_text(result['bytes_read'])}{_cached(result['bandwidths'])}")
    add_row(table, "write", f"{size_text(result['bytes_written'])}, {result['tensors']} tensors each")
    memory, disk = result["host_memory"], result["disk"]
    add_row(
        table,
        "host memory",
        f"{_size(memory['peak_bytes'])}: buffers {_size(memory['buffers_bytes'])}, process "
        f"{_size(memory['process_bytes'])}; {_size(memory['free_bytes'])} free",
    )
    add_row(table, "device memory", f"{size_text(result['device_memory_bytes'])} (the processor merges)")
    add_row(table, "disk", f"{_size(disk['needed_bytes'])} needed, {_size(disk['free_bytes'])} free")
    add_row(table, "time", _time(result))
    for name, seconds in result["stages"].items():
        rate = result["bandwidths"].get(f"{name}_bytes_per_s")
        speed = f" at {size_text(rate)}/s" if rate is not None else ""
        add_row(
            table,
            f"  {STAGES[name]}",
            "could not be measured" if seconds is None else f"{seconds:.2f} s{speed}",
        )
    swap = result["swap"]
    add_row(
        table,
        "a swap in `run`",
        f"reads up to {size_text(swap['bytes_read'])} of experts, writes {size_text(swap['bytes_written'])} of "
        f"parameters; on a CPU the engine holds up to {size_text(swap['cpu_parameter_bytes'])} of these, raw beside "
        "prepacked",
    )
    kept = ", ".join(
        f"{size_text(nbytes)} {PLACES[tier]}" for tier, nbytes in swap["tiers"].items() if nbytes
    )
    add_row(table, "  experts' weights between swaps", kept or "none")
    verdict = "fits" if result["fits"] else "does NOT fit"
    return Group(table, Text("\n".join([f"The merge {verdict}.", *(f"  {r}" for r in result["reasons"])])))


def _time(result: Mapping[str, Any]) -> str:
    if result["seconds"] is None:
        return "unknown"
    return f"about {result['seconds']:.2f} s, bound by {STAGES[result['bound_by']]}"


def _cached(bandwidths: Mapping[str, Any]) -> str:
    share = bandwidths["cached_share"]
    return "" if share is None else f", {share:.0%} of it in the page cache now"


def _size(nbytes: float | None) -> str:
    return "unknown" if nbytes is None else size_text(nbytes)


def _weights(mixture: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={weight:g}" for name, weight in mixture.items())
