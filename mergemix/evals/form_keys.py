"""The keys of a benchmark file that say how its items are asked and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mergemix.errors import BenchmarkError
from mergemix.evals import graders
from mergemix.evals.extract import make_extractor
from mergemix.evals.files import Section
from mergemix.evals.forms import (
    REFERENCE_METRICS,
    ChoiceLikelihood,
    Form,
    Generation,
    ReferenceText,
    Sampling,
)
from mergemix.evals.graders import Choice, Grader

METRICS = ("accuracy", *REFERENCE_METRICS)
DEFAULT_MAX_TOKENS = 256
GENERATION_KEYS = ("stop", "max_tokens", "extract", "samples", "temperature", "top_p", "pass_at")
FORM_KEYS = (*GENERATION_KEYS, "grader", "metric")


def grader_of(form: Form) -> Grader | None:
    """None where nothing is graded."""
    if isinstance(form, Generation):
        return form.grader
    return Choice(normalize=form.normalize) if isinstance(form, ChoiceLikelihood) else None


def read_form(section: Section, name: str, seed: int, max_model_len: int | None) -> Form:
    """The form of the benchmark `name`.

    seed: of the study. Raises BenchmarkError for a value that cannot be, or a key that this form would not use.
    """
    metric = section.choice("metric", METRICS, "accuracy")
    if metric in REFERENCE_METRICS:
        _refuse(section, f"metric {metric}", ("grader", *GENERATION_KEYS))
        return ReferenceText(metric)
    if "grader" not in section:
        known = ", ".join(graders.GRADERS)
        others = ", ".join(REFERENCE_METRICS)
        raise BenchmarkError(
            f"{section.where}: needs the key 'grader' ({known}), or a metric of text ({others})"
        )
    grader = graders.make_grader(section.values["grader"], section.where)
    if isinstance(grader, Choice) and grader.by == "likelihood":
        _refuse(section, "grader choice", GENERATION_KEYS)
        return ChoiceLikelihood(grader.normalize)
    max_tokens = section.count("max_tokens", DEFAULT_MAX_TOKENS, least=1)
    if max_model_len is not None and max_tokens >= max_model_len:
        raise BenchmarkError(
            f"{section.where}: max_tokens must be less than the model's length of {max_model_len} tokens, but "
            f"is {max_tokens}"
        )
    extract = make_extractor(section.values["extract"], section.where) if "extract" in section else None
    return Generation(grader, max_tokens, section.texts("stop"), extract, _sampling(section, name, seed))


def _refuse(section: Section, by: str, keys: Sequence[str]) -> None:
    for key in keys:
        if key in section:
            raise BenchmarkError(
                f"{section.where}: {by} scores log-likelihoods and generates nothing; remove {key!r}"
            )


def _sampling(section: Section, name: str, seed: int) -> Sampling:
    where = section.where
    samples = section.count("samples", 1, least=1)
    temperature = section.number("temperature", 0.0)
    top_p = section.number("top_p", 1.0)
    pass_at = section.count("pass_at", None, least=1)
    if temperature < 0:
        raise section.error("temperature", "a number >= 0")
    if not 0 < top_p <= 1:
        raise section.error("top_p", "a number > 0 and <= 1")
    if temperature == 0 and samples > 1:
        raise BenchmarkError(
            f"{where}: {samples} samples at temperature 0 are all the same: set temperature > 0"
        )
    if temperature == 0 and "top_p" in section:
        raise BenchmarkError(
            f"{where}: top_p is for drawn answers, and at temperature 0 none is drawn; remove it"
        )
    if pass_at is not None and pass_at > samples:
        raise BenchmarkError(f"{where}: pass_at must be at most the {samples} samples, but is {pass_at}")
    digest = hashlib.sha256(json.dumps([seed, name]).encode()).digest()
    own_seed = int.from_bytes(digest[:8]) if temperature > 0 else 0
    return Sampling(samples, temperature, top_p, pass_at, own_seed)
