"""Types of command-line values (NAME=VALUE lists, numbers, byte sizes), and options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from mergemix.config import DESIGNS, ENGINES, NORMALIZATIONS, SEARCHES, SURROGATES, VERIFICATIONS
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


class Groups(NamedValues):
    """NAME=DOMAIN+DOMAIN, or several with commas between them."""

    name = "name=a+b"

    def __init__(self) -> None:
        super().__init__(lambda text: tuple(part.strip() for part in text.split("+")))


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
study_option = click.option(
    "--study", type=click.Path(path_type=Path), required=True, help="Directory of the study."
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


def constraint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which mixtures are allowed; as `search.constraints.Constraints` takes them. What is not given is None or ()."""
    for option in reversed(
        (
            click.option("--min", type=NUMBERS, multiple=True, help="NAME=SHARE at least, of a domain or group."),
            click.option("--max", type=NUMBERS, multiple=True, help="NAME=SHARE at most, of a domain or group."),
            click.option("--pin", type=NUMBERS, multiple=True, help="NAME=SHARE exactly, of a domain or group."),
            click.option("--group", "groups", type=Groups(), multiple=True,
                         help="NAME=DOMAIN+DOMAIN whose shares are bounded together. Repeat."),
            click.option("--tokens", type=NUMBERS, multiple=True, help="NAME=N tokens that there are of a domain."),
            click.option("--train-tokens", type=float, help="Tokens that will be trained on."),
            click.option("--max-epochs", type=float,
                         help="How often a domain's tokens may be repeated: a cap on its share. Default: 4."),
            click.option("--prior", type=NUMBERS, multiple=True,
                         help="NAME=SHARE,... of a mixture to start from, and to measure --kl-limit from."),
            click.option("--kl-limit", type=float, help="Largest divergence KL(mixture || prior), in nats."),
            click.option("--kl-penalty", type=float, help="Utility that a nat of it costs. Default: 0."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


MAPPINGS = ("experts", "prior", "min", "max", "pin", "groups", "tokens")


def collect_mappings(options: dict[str, Any]) -> None:
    """Make one mapping of each repeated NAME=VALUE option, in place. Raises a usage error for a name given twice."""
    for key in MAPPINGS:
        if key in options:
            options[key] = collect("--group" if key == "groups" else f"--{key}", options[key])


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


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The fields of RunConfig. What is not given is None or ()."""
    for option in reversed(
        (
            experts_option,
            click.option(
                "--base", help="The checkpoint that all experts were trained from; scored as a baseline."
            ),
            click.option(
                "--bench",
                multiple=True,
                help="Benchmark YAML file, a directory of them, or lm_eval:TASK. Repeat.",
            ),
            click.option(
                "--holdout",
                multiple=True,
                help="Benchmarks kept from the search; the finalists are scored on them.",
            ),
            click.option(
                "--holdout-share",
                type=float,
                help="Share of each benchmark's items kept from the search too. Default: 0.",
            ),
            click.option(
                "--include-path",
                multiple=True,
                help="Directory with lm-evaluation-harness task files. Repeat.",
            ),
            click.option(
                "--allow-code-execution",
                is_flag=True,
                default=None,
                help="Let code benchmarks run answers, in a sandbox.",
            ),
            click.option(
                "--study",
                type=click.Path(path_type=Path),
                help="Directory of the study; the same one resumes it.",
            ),
            click.option(
                "--search", type=click.Choice(SEARCHES), help="How mixtures are proposed. Default: bo."
            ),
            click.option(
                "--surrogate",
                type=click.Choice(SURROGATES),
                help="Model of --search surrogate. Default: auto, several stacked by cross-validation.",
            ),
            click.option(
                "--design",
                type=click.Choice(DESIGNS),
                help="What --search surrogate measures before it models. Default: maximin.",
            ),
            click.option(
                "--budget", type=int, help="Candidates to evaluate, baselines included. Default: 40."
            ),
            click.option("--item-budget", type=int, help="Answers to items that all of them may cost."),
            click.option(
                "--race/--no-race",
                default=None,
                help="Whether candidates stop early that are clearly worse than the best. Default: they do.",
            ),
            click.option("--seed", type=int, help="Seed of everything random. Default: 0."),
            click.option(
                "--engine", type=click.Choice(ENGINES), help="auto is vllm where it is installed, else hf."
            ),
            click.option(
                "--utility",
                help="macro, worst, one capability, NAME=W,..., an expression, or a weights file; "
                "'; NAME >= base' adds a floor. Default: macro.",
            ),
            click.option(
                "--normalize",
                type=click.Choice(NORMALIZATIONS),
                help="How benchmark scores are made comparable.",
            ),
            constraint_options,
            click.option(
                "--hierarchy",
                help="YAML file of a tree of domains, searched level by level.",
            ),
            click.option(
                "--warm-start",
                multiple=True,
                help="Directory of a study whose evidence the search begins with. Repeat.",
            ),
            click.option(
                "--interval",
                type=float,
                help="Stop when the predicted best utility is known within this, on either side (bo, surrogate).",
            ),
            click.option(
                "--max-model-len",
                type=int,
                help="Longest prompt plus answer in tokens. Default: the model's.",
            ),
            click.option("--tensor-parallel", type=int, help="Ranks of the vllm engine. Default: 1."),
            click.option(
                "--layer-groups",
                metavar="N|NAME=PATTERN,...",
                help="Search weights of their own for N runs of layers, or for tensors by patterns, with half of the "
                "budget.",
            ),
            cache_options,
            click.option(
                "--verify-swaps",
                type=click.Choice(VERIFICATIONS),
                help="Which swaps are compared with the reference. Default: first, all of the self-test at start and "
                "a sample of each later one.",
            ),
            click.option(
                "--lora-in-flight",
                type=int,
                help="Mixtures that vLLM's multi-LoRA answers at once, of LoRA adapters alone. Default: 0, which "
                "folds adapters into the weights.",
            ),
            click.option(
                "--config", type=click.Path(path_type=Path), help="The same options from a YAML file."
            ),
        )
    ):
        command = option(command)
    return command
