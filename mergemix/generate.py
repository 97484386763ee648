"""Answers of several mixtures side by side: one engine, its weights swapped from one mixture to the next."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergemix.checkpoints.family import open_family
from mergemix.checkpoints.strict_json import MAX_FILE_BYTES, parse_object, read_bounded, shown
from mergemix.errors import CheckpointError, ConfigError, EngineError, PoisonedEngineError
from mergemix.merge.mixtures_file import Recipe, read_mixtures
from mergemix.merge.plan import plan_merge
from mergemix.mixture import Mixture
from mergemix.serve import open_engine, resolve_kind
from mergemix.serve.engine import Engine, EngineSpec, Generate

STDIN = Path("-")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What `mergemix generate` is asked to do. Raises ConfigError when that makes no sense."""

    experts: Mapping[str, str]
    """Expert name -> local directory or Hub id."""
    prompts: Path
    """A text file of one prompt a line, JSON Lines (*.jsonl) of {"prompt": ...}, or "-": lines of standard input."""
    base: str | None = None
    weights: Sequence[Mapping[str, float]] = ()
    """One mixture each; or none, and `mixtures`."""
    mixtures: Path | None = None
    """A file of mixtures, as `mergemix merge` takes it."""
    normalize: bool = True
    max_tokens: int = 128
    """The longest answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, which does not contain them."""
    engine: str = "auto"
    max_model_len: int | None = None
    """Tokens of prompt plus answer; the model's own limit when not given."""
    device_cache: int = 0
    """Bytes of device memory that keep experts' weights between swaps."""
    host_cache: int = 0
    """Bytes of shared host memory that do so, after the device's."""

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("no expert was given; give --experts NAME=PATH once per expert")
        if bool(self.weights) == (self.mixtures is not None):
            raise ConfigError(
                "one of --weights (once per mixture) and --mixtures (a file of them) must be given, but "
                f"{'both are' if self.weights else 'neither is'}"
            )
        if "" in self.stop:
            raise ConfigError("--stop must be a text of one character or more, but is empty")

    def recipes(self) -> list[Recipe]:
        """The mixtures, in order. Raises ConfigError."""
        names = list(self.experts)
        if self.mixtures is not None:
            return read_mixtures(self.mixtures, names, normalize=self.normalize)
        mixed = [Mixture.of(names, given, normalize=self.normalize) for given in self.weights]
        return [
            Recipe(str(mixture), given, mixture) for given, mixture in zip(self.weights, mixed, strict=True)
        ]


def generate(config: GenerateConfig, stage: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Answer all prompts with each mixture in turn, greedily, from one engine; returns mixtures and outputs.

    A mixture on which the engine breaks is tried once more, on a new one. stage: told what is being done.
    Raises MergeMixError for everything that a user can mend.
    """
    begin = time.perf_counter()
    recipes, prompts = config.recipes(), read_prompts(config.prompts)
    kind = resolve_kind(config.engine)
    stage("reading checkpoints")
    family = open_family(config.base, config.experts)
    plan_merge(
        family, [recipe.mixture for recipe in recipes]
    )  # refuses what cannot be merged, before the start
    requests = [Generate(prompt, config.max_tokens, config.stop) for prompt in prompts]
    mixtures, outputs = [], []
    with _kept_when_it_fails() as log:
        spec = EngineSpec(
            family,
            kind,
            max_model_len=config.max_model_len,
            log=log,
            device_cache=config.device_cache,
            host_cache=config.host_cache,
        )
        stage(f"starting {kind}")
        with ExitStack() as engines:
            engine = engines.enter_context(open_engine(spec, recipes[0].mixture))
            proven = engine.proven
            for number, recipe in enumerate(recipes, start=1):
                stage(f"mixture {number} of {len(recipes)}: {recipe.mixture}")
                try:
                    answered, texts = _answer(engine, recipe, requests)
                except PoisonedEngineError as error:
                    stage(f"starting {kind} anew: {error}")
                    engine.close()
                    engine = engines.enter_context(open_engine(spec, recipe.mixture))
                    proven = proven and engine.proven
                    answered, texts = _answer(engine, recipe, requests)
                mixtures.append(answered)
                outputs += [
                    {"name": recipe.name, **recipe.mixture.describe(), "prompt": prompt, **text}
                    for prompt, text in zip(prompts, texts, strict=True)
                ]
    return {
        "engine": kind,
        "proven": proven,
        "mixtures": mixtures,
        "outputs": outputs,
        "seconds": time.perf_counter() - begin,
    }


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order; empty lines are no prompts.

    Of JSON Lines (a name that ends with .jsonl) each line is an object with the text "prompt"; its other keys are the
    user's own. A byte order mark and CRLF are accepted. Raises ConfigError, which names the line.
    """
    raw, where = _read(path)
    is_jsonl = path.suffix == ".jsonl"
    prompts = []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = line.removesuffix(b"\r")
        if line.strip():
            prompts.append((_prompt_of if is_jsonl else _decoded)(line, f"{where}:{number}"))
    if not prompts:
        example = 'one {"prompt": "..."} a line' if is_jsonl else "one a line"
        raise ConfigError(f"{where} holds no prompts; write {example}")
    return prompts


def _read(path: Path) -> tuple[bytes, str]:
    """The bytes of a file or of standard input, and what to call it."""
    if path != STDIN:
        try:
            return read_bounded(path, "the prompts "), str(path)
        except CheckpointError as error:
            raise ConfigError(str(error)) from None
    raw = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"standard input has more than the {MAX_FILE_BYTES} bytes that are accepted")
    return raw, "standard input"


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8: byte {error.start}: {error.reason}") from None


def _prompt_of(line: bytes, where: str) -> str:
    try:
        prompt = parse_object(line, where).get("prompt")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: 'prompt' must be text, but is {shown(prompt)}")
    return prompt


def _answer(
    engine: Engine, recipe: Recipe, requests: Sequence[Generate]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Swap to a mixture and answer with it: what it was and took, and text and num_tokens of each answer."""
    swap = engine.apply(recipe.mixture)
    swapped = time.perf_counter()
    answers = engine.generate(requests)
    answered = {
        "name": recipe.name,
        "given": dict(recipe.given),
        **recipe.mixture.describe(),
        "swap_seconds": swap.seconds,
        "bytes_read": dict(swap.bytes_read),
        "bytes_written": swap.bytes_written,
        "generate_seconds": time.perf_counter() - swapped,
    }
    return answered, [{"text": answer.text, "num_tokens": answer.num_tokens} for answer in answers]


@contextmanager
def _kept_when_it_fails() -> Iterator[Path]:
    """A file for the engine's own output, which is of use only when it fails; the error then says where it is."""
    directory = Path(tempfile.mkdtemp(prefix="mergemix-generate-"))
    log = directory / "engine.log"
    keep = False
    try:
        yield log
    except EngineError as error:
        keep = log.exists()
        raise type(error)(f"{error}\nThe engine's log: {log}" if keep else str(error)) from error
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
