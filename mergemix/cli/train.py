"""The command `mergemix train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mergemix.cli.group import EXIT_ERROR, Interrupted, cli, common
from mergemix.errors import MergeMixError
from mergemix.options import NUMBERS, PATHS, collect


class Count(click.ParamType):
    """A whole number that may be written 2e9."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return int(value)  # exact, however large
        except ValueError:
            pass
        try:
            number = float(value)
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
        self.fail(f"{value!r} is no whole number, such as 200000000 or 2e8", param, ctx)


@cli.command()
@click.option("--base", required=True, help="Checkpoint to start from: a local directory or a Hub id.")
@click.option(
    "--data", type=PATHS, multiple=True, required=True,
    help='NAME=FILE.jsonl of a domain: lines of {"text"}, or of {"prompt", "answer"}. Repeat.',
)  # fmt: skip
@click.option("--mixture", type=NUMBERS, multiple=True, help="NAME=SHARE,... of the tokens; normalised.")
@click.option("--all", "family", is_flag=True, help="Train one expert per domain, to OUT/NAME.")
@click.option("--domain", multiple=True, help="With --all: only this domain. Repeat. Default: all of --data.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="New directory for the checkpoint."
)
@click.option(
    "--tokens", type=Count(),
    help="Tokens to train on, rounded up to whole steps; of each expert with --all. Default, without it: as many as "
    "there are before a domain repeats.",
)  # fmt: skip
@click.option("--sequence-length", type=Count(), help="In tokens. Default: the base's, at most 2048.")
@click.option(
    "--batch",
    type=Count(),
    default=32,
    show_default=True,
    help="Sequences of a step, all processes together.",
)
@click.option(
    "--learning-rate", type=float, default=3e-4, show_default=True, help="Constant after the warm-up."
)
@click.option("--warmup", type=Count(), help="In steps. Default: a tenth of them, at most 100.")
@click.option(
    "--average-last", type=Count(), default=1, show_default=True,
    help="Steps whose weights the result is the mean of, instead of a learning rate that decays. 1: the last one.",
)  # fmt: skip
@click.option("--general", type=NUMBERS, multiple=True, help="NAME=SHARE,... of the general data.")
@click.option(
    "--general-share",
    type=float,
    default=0.0,
    show_default=True,
    help="Share of all tokens that is general data.",
)
@click.option("--seed", type=Count(), default=0, show_default=True)
@click.option("--save-every", type=Count(), default=500, show_default=True, help="Steps between checkpoints.")
@click.option(
    "--max-epochs", type=float, default=4.0, show_default=True, help="How often a corpus may be repeated."
)
@click.option(
    "--micro-batch", type=Count(), help="Sequences that a process computes at a time. Default: all."
)
@common
def train(
    *,
    console: Console,
    data: Any,
    mixture: Any,
    general: Any,
    family: bool,
    domain: tuple[str, ...],
    out: Path,
    **options: Any,
) -> tuple[dict[str, Any], Any]:
    """Train a model on a mixture of corpora, or (--all) one expert per domain, from a base checkpoint.

    The same command again goes on where an interrupted training was stored last. For several GPUs:
    accelerate launch -m mergemix train ...
    """
    shares = collect("--mixture", mixture)
    if family == bool(shares):
        raise click.UsageError("Give one of '--mixture' (of one model) and '--all' (one expert per domain).")
    if domain and not family:
        raise click.UsageError(
            "'--domain' restricts '--all'; the domains of one model are those of '--mixture'."
        )
    files = {name: Path(path).expanduser() for name, path in collect("--data", data).items()}
    settings = {**options, "general": collect("--general", general)}
    with _interruptible(out), _one_voice():
        if family:
            return _family(console, out=out, data=files, domains=domain or None, **settings)

        from mergemix.report.train_progress import TrainProgress
        from mergemix.report.train_tables import train_table
        from mergemix.train import TrainConfig
        from mergemix.train import train as run

        config = TrainConfig(out=out, data=files, mixture=shares, **settings)
        with TrainProgress(console) as progress:
            record = run(config, progress)
        return record, train_table({out.name: record})


def _family(console: Console, **settings: Any) -> tuple[dict[str, Any], Any]:
    from mergemix.report.train_progress import TrainProgress
    from mergemix.report.train_tables import train_table
    from mergemix.train import expert_configs, train_family

    configs = expert_configs(**settings)
    with TrainProgress(console) as progress:
        records = train_family(configs, progress)
    experts = {name: str(config.out) for name, config in configs.items()}
    return {"out": str(settings["out"]), "experts": experts, "trainings": records}, train_table(records)


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        raise Interrupted(
            f"Interrupted. What was stored towards {out} is kept; the same command again goes on there."
        ) from None


@contextmanager
def _one_voice() -> Iterator[None]:
    """Of the processes that a launcher started, only the first one prints: the others leave in silence."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    try:
        yield
    except (MergeMixError, OSError):
        sys.exit(EXIT_ERROR)
    sys.exit(0)
