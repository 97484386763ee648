"""Types of command-line values (NAME=VALUE lists, numbers, byte sizes), and options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from mergemix.units import parse_size

Value = TypeVar("Value")


class Size(click.ParamType):
    """Bytes: 268435456, 256MiB, 1GB (a decimal unit), 512M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        nbytes = parse_size(str(value))
        if nbytes is None:
            self.fail(
                f"{value!r} is no size; write bytes, or a number with a unit such as 256MiB or 1GB",
                param,
                ctx,
            )
        return nbytes


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "w,w,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        numbers = []
        for text in str(value).split(","):
            try:
                numbers.append(float(text))
            except ValueError:
                self.fail(f"{text.strip()!r} is no number; write one per checkpoint, as in 1,1,2", param, ctx)
        return numbers


class NamedValues(click.ParamType):
    """NAME=VALUE, or several with commas between them; a comma in a path is kept unless NAME= follows it."""

    name = "name=value"

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[tuple[str, Any]]:
        if isinstance(value, list):
            return value
        pairs = []
        for part in re.split(r",(?=[^,=]+=)", str(value)):
            name, equals, text = part.partition("=")
            name, text = name.strip(), text.strip()
            if not (name and equals and text):
                self.fail(f"{part!r} must be NAME=VALUE", param, ctx)
            try:
                pairs.append((name, self.kind(text)))
            except ValueError:
                self.fail(f"the value of {name!r} must be a number, but is {text!r}", param, ctx)
        return pairs


def collect(option: str, given: Iterable[Iterable[tuple[str, Value]]]) -> dict[str, Value]:
    """One mapping from a repeated NAME=VALUE option; a name given twice is a usage error."""
    values: dict[str, Value] = {}
    for name, value in (pair for pairs in given for pair in pairs):
        if name in values:
            raise click.UsageError(f"{option} names {name!r} twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values


PATHS = NamedValues(str)
NUMBERS = NamedValues(float)

experts_option = click.option(
    "--experts",
    type=PATHS,
    multiple=True,
    help="NAME=PATH of an expert: a local directory or a Hub id. Repeat.",
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="New directory for the checkpoint."
)
memory_option = click.option(
    "--memory", type=Size(), default="256MiB", show_default=True, help="Bound on the merge's buffers."
)
no_download_option = click.option(
    "--no-download", is_flag=True, help="Read what is needed of a Hub id from the Hub, without a local copy."
)


def cache_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where experts' weights are kept between swaps. A size that is not given is None."""
    for option in (
        click.option(
            "--host-cache", type=Size(), help="Shared host memory to keep more of them in. Default: 0."
        ),
        click.option(
            "--device-cache",
            type=Size(),
            help="Device memory to keep experts' weights in between swaps, all ranks together. Default: 0.",
        ),
    ):
        command = option(command)
    return command


def merging_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What merge and plan are told; as `merge_request` of the command line takes it."""
    for option in (
        no_download_option,
        click.option(
            "--no-normalize", is_flag=True, help="Use the weights as they are; the base takes the rest."
        ),
        memory_option,
        click.option("--base", help="The shared base; needed when the weights do not sum to 1."),
        out_option,
        click.option(
            "--mixtures",
            type=click.Path(path_type=Path),
            help="JSON Lines file of mixtures; each becomes DIR/<its name>, all from one read of the experts.",
        ),
        click.option("--weights", type=NUMBERS, multiple=True, help="NAME=W,...; experts left out get 0."),
        experts_option,
    ):
        command = option(command)
    return command
