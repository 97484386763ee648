"""The demo's base and experts: trained once, kept on disk, trained again only when their origin changes."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from mergemix.checkpoints.files import SINGLE_NAME
from mergemix.checkpoints.writer import DirectoryWriter
from mergemix.demo.corpora import Corpora
from mergemix.demo.settings import GENERAL, Horizon, Settings
from mergemix.demo.tokenizer import build_tokenizer
from mergemix.demo.trainer import Packed, build_model, mixture_batches, train

RECORD = "training.json"  # in each model's directory: what it was made from, and how the training went
REPORT_STEPS = 100


class ModelFamily:
    """Base and experts in one directory.

    training[model]: the record of its training. reused: models that were there already.
    """

    def __init__(
        self, directory: Path, corpora: Corpora, settings: Settings, progress: Callable[[str], None]
    ) -> None:
        self.directory = directory
        self.corpora = corpora
        self.settings = settings
        self.progress = progress
        self.training: dict[str, dict[str, Any]] = {}
        self.reused: list[str] = []

    def base(self) -> Path:
        settings = self.settings
        origin = {
            "seed": settings.seed,
            "corpora": {domain: _digest(texts) for domain, texts in self.corpora.documents.items()},
            "mixture": GENERAL,
            "length": settings.length,
            "shape": asdict(settings.shape),
        }

        def start() -> tuple[LlamaForCausalLM, Iterator[torch.Tensor]]:
            model = build_model(settings.shape, settings.seed)
            return model, mixture_batches(self._packed, GENERAL, settings.base.batch, seed=settings.seed)

        return self._model("base", origin, settings.base, start)

    def expert(self, domain: str) -> Path:
        """Partly general data, the rest from `domain`. Call after base().

        The general part is the same, in the same order, for every expert, so that they differ by their domain only.
        """
        settings = self.settings
        general = round(settings.expert.batch * settings.general_share)
        origin = {"base": self.training["base"]["origin"], "domain": domain, "general_sequences": general}

        def start() -> tuple[LlamaForCausalLM, Iterator[torch.Tensor]]:
            model = _load(self.directory / "base")
            own = settings.expert.batch - general
            parts = (
                mixture_batches(self._packed, GENERAL, general, seed=settings.seed + 1),
                mixture_batches(self._packed, {domain: 1.0}, own, seed=settings.seed + 2),
            )
            return model, map(torch.cat, zip(*parts, strict=True))

        return self._model(domain, origin, settings.expert, start)

    @cached_property
    def _packed(self) -> dict[str, Packed]:
        return {d: Packed(texts, self.settings.length) for d, texts in self.corpora.documents.items()}

    def _model(
        self,
        name: str,
        origin: dict[str, Any],
        horizon: Horizon,
        start: Callable[[], tuple[LlamaForCausalLM, Iterator[torch.Tensor]]],
    ) -> Path:
        path = self.directory / name
        key = _digest([origin, asdict(horizon)])
        record = _read_record(path)
        if record is not None and record["origin"] == key:
            self.progress(f"{name}: trained before, reusing {path}")
            self.reused.append(name)
        else:
            model, batches = start()
            record = {"origin": key, **self._train(name, model, batches, horizon)}
            _save(model, record, path)
        self.training[name] = record
        return path

    def _train(
        self, name: str, model: LlamaForCausalLM, batches: Iterator[torch.Tensor], horizon: Horizon
    ) -> dict[str, Any]:
        def report(step: int, loss: float) -> None:
            if step % REPORT_STEPS == 0 or step == horizon.steps:
                self.progress(f"training {name}: step {step} of {horizon.steps}, loss {loss:.3f}")

        begin = time.perf_counter()
        with _threads(self.settings.threads):
            losses = train(model, batches, horizon, report)
        edge = max(1, horizon.steps // 10)
        return {
            **asdict(horizon),
            "tokens": horizon.steps * horizon.batch * self.settings.length,
            "parameters": model.num_parameters(),
            "first_loss": sum(losses[:edge]) / edge,  # nats a token, mean over the first and the last tenth
            "last_loss": sum(losses[-edge:]) / edge,
            "seconds": time.perf_counter() - begin,
        }


def _save(model: LlamaForCausalLM, record: dict[str, Any], path: Path) -> None:
    """Write a bf16 checkpoint with its tokenizer and record; it replaces what is at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, _no_bars():
        model.to(torch.bfloat16).save_pretrained(folder)
        build_tokenizer(model.config.max_position_embeddings).save_pretrained(folder)
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        contents = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    shutil.rmtree(path, ignore_errors=True)
    writer = DirectoryWriter(path)
    try:
        writer.open(sum(map(len, contents.values())))
        for name, content in contents.items():
            writer.write(name, 0, content)
        writer.commit()
    finally:
        writer.discard()


def _load(path: Path) -> LlamaForCausalLM:
    with _no_bars():
        model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars over ours."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a model that is there, else None."""
    if not (path / SINGLE_NAME).is_file() or not (path / RECORD).is_file():
        return None
    record: dict[str, Any] = json.loads((path / RECORD).read_text())
    return record


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
