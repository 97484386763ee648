"""The group of commands, and what every command shares: how it prints, how it is interrupted."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from mergemix import __version__
from mergemix.options import collect_mappings

if TYPE_CHECKING:
    from mergemix.search.constraints import Constraints

PLAIN_WIDTH = 120  # columns of a table that goes to a file or a pipe
EXIT_ERROR = 1

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
