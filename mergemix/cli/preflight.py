"""The command `mergemix preflight`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mergemix.cli.group import cli, common
from mergemix.config import ENGINES
from mergemix.options import PATHS, collect, experts_option, memory_option


@cli.command()
@experts_option
@click.option(
    "--base", help="The checkpoint that all experts were trained from; without it less can be told."
)
@click.option(
    "--data",
    type=PATHS,
    multiple=True,
    help="DOMAIN=FILE.jsonl of held-out text, an expert's name for its own domain. Repeat.",
)
@click.option(
    "--bench", multiple=True, help="A benchmark file, a directory of them, or lm_eval:TASK. Repeat."
)
@click.option(
    "--include-path", multiple=True, help="Directory with task files for lm-evaluation-harness. Repeat."
)
@click.option(
    "--allow-code-execution", is_flag=True, help="Let benchmarks run what models write, in a sandbox."
)
@click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True)
@click.option("--max-model-len", type=int, help="Longest prompt plus answer in tokens. Default: the model's.")
@memory_option
@common
def preflight(
    *,
    console: Console,
    experts: Any,
    data: Any,
    bench: tuple[str, ...],
    include_path: tuple[str, ...],
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """Can these experts be averaged? One verdict, and a reason for each check. Exits with 0 whatever it is."""
    named = collect("--experts", experts)
    texts = {name: Path(path) for name, path in collect("--data", data).items()}

    from mergemix.path_scores import PreflightConfig
    from mergemix.path_scores import preflight as examine
    from mergemix.report.preflight_tables import preflight_table
    from mergemix.report.progress import RunProgress

    config = PreflightConfig(experts=named, data=texts, bench=bench, include_path=include_path, **options)
    with RunProgress(console) as progress:
        result = examine(config, progress.stage)
    return result, preflight_table(result)
