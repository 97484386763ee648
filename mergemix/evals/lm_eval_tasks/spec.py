"""Which lm-eval task, and how: `lm_eval:gsm8k,few_shot=5,limit=100`, or the same keys in a benchmark file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergemix.errors import BenchmarkError
from mergemix.evals.files import Section, nearest

PREFIX = "lm_eval:"
_KEYS = ("lm_eval", "name", "capability", "few_shot", "limit", "chat_template", "metric", "filter")
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class LmEvalSpec:
    """A task, group or tag, or a task's YAML file, and what the `lm_eval` command would be told about it.

    few_shot: None takes the task's own number. limit: the first so many documents of each task, below 1 a share of
    them. chat_template: `--apply_chat_template`, examples as turns. metric, filter: what a search maximises; None takes
    the task's first that can be averaged over documents. name: of the benchmark; None takes the task's own.
    capability: None takes the name of the task or group.
    """

    task: str
    few_shot: int | None = None
    limit: int | float | None = None
    chat_template: bool = False
    metric: str | None = None
    filter: str | None = None
    name: str | None = None
    capability: str | None = None

    @property
    def source(self) -> str:
        return PREFIX + self.task


def parse_lm_eval(text: str) -> LmEvalSpec:
    """From `lm_eval:TASK,key=value,...`. Raises BenchmarkError for anything else."""
    task, *options = text.removeprefix(PREFIX).split(",")
    values: dict[str, Any] = {"lm_eval": task.strip()}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals or not key or not value:
            raise BenchmarkError(
                f"{text}: options of a task must be key=value after commas, but one is {option!r}; for example "
                "lm_eval:gsm8k,few_shot=5,limit=100"
            )
        if key in values:
            raise BenchmarkError(f"{text}: {key} is given twice")
        values[key] = _number(value) if key in ("few_shot", "limit") else _WORDS.get(value, value)
    return lm_eval_spec(values, text)


def lm_eval_spec(values: Mapping[str, Any], where: str) -> LmEvalSpec:
    """From the keys of a benchmark file with `lm_eval: TASK`. Raises BenchmarkError naming `where` and the key."""
    section = Section(values, where, _KEYS)
    task = section.text("lm_eval")
    if not task:
        raise BenchmarkError(f"{where}: lm_eval must name a task, a group or a tag, as in lm_eval:gsm8k")
    chat_template = values.get("chat_template", False)
    if not isinstance(chat_template, bool):
        raise section.error("chat_template", "true or false")
    capability = section.name("capability", None) if "capability" in section else None
    if capability == "macro":
        raise BenchmarkError(f"{where}: capability must not be 'macro', which names the default utility")
    return LmEvalSpec(
        task=task,
        few_shot=section.count("few_shot", None, least=0),
        limit=_limit(section),
        chat_template=chat_template,
        metric=section.text("metric") if "metric" in section else None,
        filter=section.text("filter") if "filter" in section else None,
        name=section.name("name") if "name" in section else None,
        capability=capability,
    )


def choose(what: str, wanted: str, known: list[str], where: str) -> str:
    """`wanted`, which must be in `known`: else a BenchmarkError with the nearest and all of them."""
    if wanted in known:
        return wanted
    guess = nearest(wanted, known)
    also = "" if guess.startswith("known") else f" (known: {', '.join(known)})"
    raise BenchmarkError(f"{where}: unknown {what} {wanted!r}; {guess}{also}")


def _limit(section: Section) -> int | float | None:
    limit = section.values.get("limit")
    if limit is None and "limit" not in section:
        return None
    whole = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    if not whole and not (isinstance(limit, float) and 0 < limit < 1):
        raise section.error("limit", "a whole number of documents, or a share of them between 0 and 1")
    return limit


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
