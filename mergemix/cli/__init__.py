"""The command line: the only place that prints or exits."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import NoReturn

import click
from rich.console import Console

from mergemix.cli import machine, merging, preflight, search, train, verify
from mergemix.cli.group import EXIT_ERROR, Interrupted, cli
from mergemix.errors import MergeMixError

__all__ = ["cli", "machine", "main", "merging", "preflight", "search", "train", "verify"]

EXIT_USAGE, EXIT_INTERRUPTED = 2, 3


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
