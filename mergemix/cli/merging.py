"""Commands that merge: to disk, for a few prompts, or only on paper."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mergemix.cli.group import cli, common
from mergemix.config import ENGINES
from mergemix.options import (
    NUMBERS,
    Numbers,
    cache_options,
    collect,
    experts_option,
    memory_option,
    merging_options,
    no_download_option,
    out_option,
)

if TYPE_CHECKING:
    from mergemix.merge.request import MergeRequest


def merge_request(
    *,
    experts: Iterable[list[tuple[str, str]]],
    weights: Iterable[list[tuple[str, float]]],
    mixtures: Path | None,
    out: Path,
    base: str | None,
    memory: int,
    no_normalize: bool,
    no_download: bool,
) -> MergeRequest:
    """The merge that the options of `merging_options` ask for, its checkpoints opened."""
    given = collect("--weights", weights)
    if bool(given) == (mixtures is not None):
        raise click.UsageError("Give one of '--weights' (of one merge) and '--mixtures' (a file of many).")

    from mergemix.merge.request import open_request

    return open_request(
        base,
        collect("--experts", experts),
        weights=given or None,
        mixtures=mixtures,
        out=out,
        memory_bytes=memory,
        normalize=not no_normalize,
        download=not no_download,
    )


def carry_out(request: MergeRequest, console: Console) -> dict[str, Any]:
    """Do the merge under a progress bar; returns what it moved and took, for programs."""
    from mergemix.merge.estimate import check_fits
    from mergemix.merge.resources import peak_memory
    from mergemix.report.progress import merge_progress

    check_fits(request)
    with merge_progress(console, request.plan.bytes_written) as advance:
        stats = request.run(advance)
    return {
        "tensors": stats.tensors,
        "bytes_read": stats.bytes_read,
        "bytes_written": stats.bytes_written,
        "seconds": stats.seconds,
        "peak_rss_bytes": peak_memory(),
    }


@cli.command()
@merging_options
@common
def merge(*, console: Console, **options: Any) -> tuple[dict[str, Any], Any]:
    """Write base + sum of a_k (expert_k - base) as a checkpoint; or many of them, one per mixture of a file."""
    from mergemix.checkpoints.writer import check_output
    from mergemix.report.merge_tables import merge_table

    check_output(options["out"])  # before anything is downloaded
    request = merge_request(**options)
    result = {**request.as_dict(), **carry_out(request, console)}
    return result, merge_table(result)


@cli.command()
@merging_options
@cache_options
@common
def plan(
    *, console: Console, device_cache: int | None, host_cache: int | None, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Tell what a merge would read, hold and write, and how long it would take. Exits with 1 when it cannot fit."""
    from mergemix.merge.estimate import estimate
    from mergemix.report.merge_tables import plan_table

    request = merge_request(**options)
    result = estimate(request, device_cache=device_cache or 0, host_cache=host_cache or 0)
    return result, plan_table(result)


@cli.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@out_option
@click.option(
    "--weights", type=Numbers(), help="How much each counts, in their order. Default: all the same."
)
@click.option("--top", type=int, help="Average only this many, the best by --scores.")
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    help="CSV with the header checkpoint,score, or a JSON object.",
)
@click.option("--minimize", is_flag=True, help="Lower scores are better, as of a loss.")
@memory_option
@no_download_option
@common
def average(
    *,
    console: Console,
    checkpoints: tuple[str, ...],
    out: Path,
    weights: list[float] | None,
    top: int | None,
    scores: Path | None,
    minimize: bool,
    memory: int,
    no_download: bool,
) -> tuple[dict[str, Any], Any]:
    """Average checkpoints of one run: what learning-rate decay would give, without it."""
    if (top is None) != (scores is None) or (minimize and top is None):
        raise click.UsageError("'--top' and '--scores' need each other, and '--minimize' needs both.")

    from mergemix.checkpoints.writer import check_output
    from mergemix.merge.average import select
    from mergemix.merge.request import average_request
    from mergemix.report.merge_tables import average_table

    check_output(out)  # before anything is downloaded
    chosen = select(checkpoints, weights=weights, top=top, scores=scores, minimize=minimize)
    request = average_request(chosen, out=out, memory_bytes=memory, download=not no_download)
    result = {"out": str(out), **chosen.as_dict(), **carry_out(request, console)}
    return result, average_table(result)


@cli.command()
@experts_option
@click.option("--base", help="The shared base; needed when the weights of a mixture do not sum to 1.")
@click.option(
    "--weights",
    type=NUMBERS,
    multiple=True,
    help="NAME=W,... of one mixture; experts left out get 0. Repeat.",
)
@click.option(
    "--mixtures", type=click.Path(path_type=Path), help="JSON Lines file of mixtures, as `merge` takes it."
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help='Text file of one prompt a line, or *.jsonl of {"prompt": ...}; - is standard input, of lines.',
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of an answer."
)
@click.option("--stop", multiple=True, help="Text that ends an answer. Repeat.")
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option("--max-model-len", type=int, help="Longest prompt plus answer in tokens. Default: the model's.")
@click.option("--no-normalize", is_flag=True, help="Use the weights as they are; the base takes the rest.")
@cache_options
@common
def generate(
    *, console: Console, experts: Any, weights: Any, no_normalize: bool, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Answer prompts with several mixtures in turn, from one engine, and show them side by side."""
    mixed = [collect("--weights", [pairs]) for pairs in weights]
    named = collect("--experts", experts)
    given = {key: value for key, value in options.items() if value is not None}

    from mergemix.generate import GenerateConfig
    from mergemix.generate import generate as answer
    from mergemix.report.generate_tables import generate_table
    from mergemix.report.progress import RunProgress

    config = GenerateConfig(experts=named, weights=mixed, normalize=not no_normalize, **given)
    with RunProgress(console) as progress:
        result = answer(config, progress.stage)
    return result, generate_table(result)
