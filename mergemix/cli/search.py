"""Commands of the search: run it, decide again, compare, model what was measured, look at items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mergemix.cli.group import cli, common, constraints_given, resumable
from mergemix.config import DESIGNS, ENGINES, NORMALIZATIONS, SURROGATES, RunConfig, load_config_file
from mergemix.options import collect_mappings, constraint_options, run_options, study_option


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
