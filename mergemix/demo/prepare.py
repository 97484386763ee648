"""Everything the demo's search needs, made here: corpora, base, one expert per domain, benchmark files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergemix.demo.corpora import CAPABILITIES, DOMAINS, Item, make_corpora
from mergemix.demo.models import ModelFamily
from mergemix.demo.settings import Settings
from mergemix.errors import OutputError


@dataclass(frozen=True)
class Demo:
    """Where everything is.

    config: a study.yaml for `mergemix run`. benchmarks: YAML files that the search sees. test_benchmarks:
    the same tasks with other items.
    training[model]: steps, learning rate, tokens, losses, seconds. reused: models that were there already.
    """

    config: Path
    base: Path
    experts: dict[str, Path]
    benchmarks: list[Path]
    test_benchmarks: list[Path]
    training: dict[str, dict[str, Any]]
    reused: tuple[str, ...]


def prepare_demo(
    directory: Path, *, seed: int = 0, quick: bool = False, progress: Callable[[str], None] | None = None
) -> Demo:
    """Make what is missing in `directory` and reuse what is there.

    quick: a far smaller training and fewer items, for tests; its scores mean little. progress receives lines
    such as "training base: step 100 of 700, loss 1.234". A killed call leaves only whole products behind,
    and the next one continues. Raises OutputError when the directory cannot be written.
    """
    settings = Settings.quick(seed) if quick else Settings(seed)
    return prepare(directory, settings, progress or (lambda line: None))


def prepare(directory: Path, settings: Settings, progress: Callable[[str], None]) -> Demo:
    """`prepare_demo` with any settings: a product is made again only if what it depends on has changed."""
    progress("writing corpora and benchmarks")
    corpora = make_corpora(
        settings.seed, documents=settings.documents, items=settings.items, people=settings.people
    )
    for domain, documents in corpora.documents.items():
        _write(directory / "corpora" / f"{domain}.jsonl", _lines({"text": text} for text in documents))
    benchmarks = _write_benchmarks(directory / "benchmarks", corpora.search)
    test_benchmarks = _write_benchmarks(directory / "test-benchmarks", corpora.test)

    family = ModelFamily(directory / "models", corpora, settings, progress)
    base = family.base()
    experts = {domain: family.expert(domain) for domain in DOMAINS}
    config = directory / "study.yaml"
    study = {
        "base": "models/base",
        "experts": {domain: f"models/{domain}" for domain in experts},
        "bench": "benchmarks",
        "holdout": "test-benchmarks",
        "study": "study",
        "normalize": "minmax",  # nats of different tasks are not comparable
        "seed": settings.seed,
    }
    _write(config, yaml.safe_dump(study, sort_keys=False))
    return Demo(config, base, experts, benchmarks, test_benchmarks, family.training, tuple(family.reused))


def _write_benchmarks(directory: Path, items: dict[str, list[Item]]) -> list[Path]:
    """One benchmark file per capability, with its items beside it."""
    paths = []
    for capability in CAPABILITIES:
        records = [
            {"id": f"{capability}-{number}", "prompt": item.prompt, "answer": item.answer}
            for number, item in enumerate(items[capability])
        ]
        _write(directory / f"{capability}.jsonl", _lines(records))
        benchmark = {
            "name": capability,
            "capability": capability,
            "items": f"{capability}.jsonl",
            "prompt": "{{ prompt }}",
            "answer": "{{ answer }}",
            "delimiter": "",
            "metric": "loglikelihood",
        }
        paths.append(directory / f"{capability}.yaml")
        _write(paths[-1], yaml.safe_dump(benchmark, sort_keys=False))
    return paths


def _lines(records: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all; a file that holds it already is left alone."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        if path.is_file() and path.read_text() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise OutputError(
            f"cannot write {path}: {error.strerror}; give the demo a directory that is writable and has space"
        ) from error
