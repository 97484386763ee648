"""The command line: the only place that prints or exits."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

from mergemix import __version__
from mergemix.config import DESIGNS, ENGINES, NORMALIZATIONS, SURROGATES, RunConfig, load_config_file
from mergemix.errors import MergeMixError
from mergemix.options import (
    NUMBERS,
    Numbers,
    cache_options,
    collect,
    collect_mappings,
    constraint_options,
    experts_option,
    memory_option,
    merging_options,
    no_download_option,
    out_option,
    run_options,
    study_option,
)

if TYPE_CHECKING:
    from mergemix.merge.request import MergeRequest
    from mergemix.search.constraints import Constraints

PLAIN_WIDTH = 120  # columns of a table that goes to a file or a pipe
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 3

Command = Callable[..., Any]


def common(command: Command) -> Command:
    """--json and --debug, as every command has them. The command gets `console`, which writes to stderr."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, for programs.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(*, as_json: bool, debug: bool, **options: Any) -> None:
        console = Console(stderr=True)
        result, table = command(console=console, **options)
        if as_json:
            print(json.dumps(result, allow_nan=False), flush=True)
        else:
            Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)
        if result.get("fits") is False:
            sys.exit(EXIT_ERROR)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mergemix")
def cli() -> None:
    """Find the data mixture for mid-training: merge experts into a live engine, score, search."""


class Interrupted(Exception):
    """A run was stopped by Ctrl-C or SIGTERM, and can be resumed."""


@contextmanager
def resumable(study: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        raise Interrupted(
            f"Interrupted. Every finished candidate is stored in {study}; the same command again resumes there."
        ) from None


@cli.command()
@run_options
@common
def run(*, console: Console, config: Path | None, **options: Any) -> tuple[dict[str, Any], Any]:
    """Search the mixture of experts that scores best. The same command again resumes it."""
    settings = run_config(config, options)  # first: a mistake is told before the heavy imports

    from mergemix.report.progress import RunProgress
    from mergemix.report.run_tables import run_table
    from mergemix.run import run as run_study

    with resumable(settings.study), RunProgress(console) as progress:
        summary = run_study(settings, progress)
    return summary, run_table(summary)


def run_config(config: Path | None, options: dict[str, Any]) -> RunConfig:
    """One RunConfig from the file and the command line; what the command line names wins."""
    given = load_config_file(config) if config is not None else {}
    collect_mappings(options)
    given.update({key: value for key, value in options.items() if value not in (None, (), {})})
    if not given.get("study"):
        raise click.UsageError("Missing option '--study': the directory that keeps the study's evidence.")
    given["study"] = Path(given["study"])
    given.setdefault("experts", {})
    given.setdefault("bench", ())
    return RunConfig(**given)


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


@cli.command()
@study_option
@click.option("--utility", help="Another utility than the study's, as `run` takes it.")
@click.option(
    "--normalize", type=click.Choice(NORMALIZATIONS), help="Another normalisation than the study's."
)
@constraint_options
@click.option("--drop", multiple=True, help="A domain that is not to be used. Repeat.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@common
def solve(*, console: Console, study: Path, **options: Any) -> tuple[dict[str, Any], Any]:
    """Decide again from what a study has measured: another utility, other constraints, fewer domains. No engine."""
    constraints = constraints_given(options)

    from mergemix.report.solve_tables import solve_table
    from mergemix.solve import solve as decide_again

    result = decide_again(study, constraints=constraints, **options)
    return result, solve_table(result)


@cli.command()
@click.argument("studies", nargs=2, type=click.Path(path_type=Path), metavar="STUDY STUDY")
@click.option("--utility", help="Another utility than the first study's, as `run` takes it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@common
def compare(
    *, console: Console, studies: tuple[Path, Path], utility: str | None, seed: int
) -> tuple[dict[str, Any], Any]:
    """Does the best mixture move between two studies: with training, or with scale?"""
    from mergemix.compare import compare as compare_studies
    from mergemix.report.compare_tables import compare_table

    result = compare_studies(*studies, utility=utility, seed=seed)
    return result, compare_table(result)


@cli.command()
@click.option(
    "--mixtures", type=click.Path(path_type=Path), required=True, help="CSV of shares: one row a mixture."
)
@click.option(
    "--scores", type=click.Path(path_type=Path), required=True, help="CSV of what each of them scored."
)
@click.option("--test-mixtures", type=click.Path(path_type=Path), help="CSV of mixtures to be predicted.")
@click.option("--test-scores", type=click.Path(path_type=Path), help="CSV of what those scored.")
@click.option("--surrogate", type=click.Choice(SURROGATES), default="auto", show_default=True)
@click.option("--minimize", is_flag=True, help="Lower scores are better, as of a loss.")
@constraint_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@common
def fit(*, console: Console, **options: Any) -> tuple[dict[str, Any], Any]:
    """Fit surrogates to mixtures and scores that anybody has measured, test them, and predict the best mixture."""
    constraints = constraints_given(options)

    from mergemix.fit import fit as fit_files
    from mergemix.report.fit_tables import fit_table

    if constraints is not None:
        options["region_of"] = constraints.region
    result = fit_files(**options)
    return result, fit_table(result)


@cli.command()
@click.option("--domain", "domains", multiple=True, help="A domain's name; or several with commas. Repeat.")
@click.option("--count", type=click.IntRange(min=1), required=True, help="Mixtures, at most.")
@click.option("--kind", type=click.Choice(DESIGNS), default="maximin", show_default=True)
@constraint_options
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="CSV file for them, as `fit` takes it back with scores."
)
@common
def design(*, console: Console, domains: tuple[str, ...], **options: Any) -> tuple[dict[str, Any], Any]:
    """Mixtures that are worth measuring, inside constraints: for proxies that are trained elsewhere."""
    constraints = constraints_given(options)

    from mergemix.design import design as lay_out
    from mergemix.report.tables import design_table

    names = tuple(name.strip() for given in domains for name in given.split(","))
    result = lay_out(names, constraints=constraints, **options)
    return result, design_table(result)


def constraints_given(options: dict[str, Any]) -> Constraints | None:
    """The constraints among the options, which are taken out of them; None without any."""
    collect_mappings(options)
    names = (
        "min",
        "max",
        "pin",
        "groups",
        "tokens",
        "train_tokens",
        "max_epochs",
        "prior",
        "kl_limit",
        "kl_penalty",
    )
    given = {name: value for name in names if (value := options.pop(name)) not in (None, {})}
    if not given:
        return None

    from mergemix.search.constraints import Constraints

    return Constraints(**given)


@cli.command()
@study_option
@click.option(
    "--candidate", "candidates", type=int, multiple=True, help="Only this candidate's number. Repeat."
)
@click.option("--benchmark", "benchmarks", multiple=True, help="Only this benchmark. Repeat.")
@click.option("--below", type=float, help="Only items that scored less than this: a candidate's failures.")
@click.option(
    "--beside", type=int, help="Show where the one --candidate differs from this one, furthest behind first."
)
@common
def items(
    *,
    console: Console,
    study: Path,
    candidates: tuple[int, ...],
    benchmarks: tuple[str, ...],
    below: float | None,
    beside: int | None,
) -> tuple[dict[str, Any], Any]:
    """Show what every candidate scored, and answered, on every item."""
    if beside is not None and (len(candidates) != 1 or below is not None):
        raise click.UsageError("--beside N needs exactly one --candidate, and takes no --below.")

    from mergemix.report.items import beside_rows, item_rows
    from mergemix.report.tables import items_table
    from mergemix.study import Study

    with Study.read(study) as opened:
        if beside is not None:
            rows = beside_rows(opened, candidates[0], beside, benchmarks=benchmarks)
        else:
            rows = item_rows(opened, candidates=candidates, benchmarks=benchmarks, below=below)
    return {"rows": rows}, items_table(rows)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default="mergemix-demo", show_default=True,
              help="Where the demo keeps its models and its study.")  # fmt: skip
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option("--budget", type=int, default=32, show_default=True, help="Candidates to evaluate.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--quick", is_flag=True, help="Smaller models and fewer items: shows the way, not the result.")
@common
def demo(
    *, console: Console, out: Path, engine: str, budget: int, seed: int, quick: bool
) -> tuple[dict[str, Any], Any]:
    """The whole story on models it makes itself: train experts, search their mixture, show the answer."""
    from mergemix.demo import prepare_demo
    from mergemix.report.progress import RunProgress
    from mergemix.report.run_tables import demo_table
    from mergemix.run import run as run_study

    with resumable(out), RunProgress(console) as progress:
        models = prepare_demo(out, seed=seed, progress=progress.stage, quick=quick)
        given = load_config_file(models.config)  # what a user would write; `mergemix run` takes it too
        config = RunConfig(**{**given, "study": Path(given["study"]), "budget": budget, "engine": engine})
        summary = run_study(config, progress)
    return summary, demo_table(summary, out)


@cli.command()
@common
def doctor(*, console: Console) -> tuple[dict[str, Any], Any]:
    """What this machine can run: engines, kernels, bandwidths, versions."""
    from mergemix.doctor import examine
    from mergemix.report.tables import doctor_table

    console.print("Importing engines and measuring bandwidths, half a minute ...")
    found = examine()
    return found, doctor_table(found)


def fail(message: str, code: int, *, resume: bool = False) -> NoReturn:
    """One message on stderr; for programs the same as JSON on stdout; then exit."""
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)
    if "--json" in sys.argv[1:]:
        print(json.dumps({"error": message}), flush=True)
    sys.stderr.flush()
    sys.exit(code)


def main() -> None:
    """Run the command line: exit 0 done, 1 an error told in one message, 2 wrong usage, 3 interrupted, resumable."""
    # OpenMP threads that spin while they wait take the core from the one they wait for, where cores are shared.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # A scheduler's SIGTERM is Ctrl-C, also where SIGINT is ignored (a job in the background of a script).
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"\nTry '{context.command_path} --help'." if context else ""
        fail(f"Usage error: {error.format_message()}{hint}", EXIT_USAGE)
    except Interrupted as interruption:
        fail(str(interruption), EXIT_INTERRUPTED)
    except (click.Abort, KeyboardInterrupt):
        fail("Interrupted; nothing was left half-written.", EXIT_ERROR)
    except (MergeMixError, OSError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        fail(f"Error: {error}", EXIT_ERROR)


if __name__ == "__main__":
    main()
