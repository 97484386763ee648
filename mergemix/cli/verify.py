"""The command that checks a study's proxies against trained references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mergemix.cli.group import cli, common, resumable
from mergemix.config import ENGINES
from mergemix.options import study_option


@cli.command()
@study_option
@click.option(
    "--trained",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON Lines of training runs: mixture, checkpoint or scores, seed.",
)
@click.option(
    "--engine", type=click.Choice(ENGINES), default="auto", help="Must be the study's own, which auto takes."
)
@click.option(
    "--top", type=click.IntRange(min=1), help="Size of the top sets. Default: a quarter of the mixtures."
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The study's options as a YAML file, where experts or benchmarks have moved.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the intervals."
)
@common
def verify(
    *, console: Console, study: Path, config: Path | None, engine: str, **options: Any
) -> tuple[dict[str, Any], Any]:
    """Do the study's merged proxies rank mixtures as training on them does? Scores trained checkpoints if given."""
    from mergemix.cli.search import run_config
    from mergemix.report.progress import RunProgress
    from mergemix.report.verify_tables import verify_table
    from mergemix.verify import verify as verify_study

    given = None if config is None else run_config(config, {"study": study})
    own = None if engine == "auto" else engine
    with resumable(study), RunProgress(console) as progress:
        result = verify_study(study, engine=own, config=given, observer=progress, **options)
    return result, verify_table(result)
