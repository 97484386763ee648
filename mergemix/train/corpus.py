"""A corpus as token ids on disk: a JSON Lines file, tokenised once, in bounded memory, and mapped into memory after."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergemix.checkpoints.files import is_prompt_file
from mergemix.checkpoints.writer import DirectoryWriter
from mergemix.errors import ConfigError, CorpusError, OutputError
from mergemix.train.documents import Encoder, read_documents

FORMAT = 1  # of the cache; another number makes new ones
CACHE = ".mergemix-tokens"  # beside the outputs, shared by all of a family
META, TOKENS, LENGTHS, PROMPTS = "meta.json", "tokens.bin", "lengths.bin", "prompts.bin"
GROUP_DOCUMENTS, GROUP_BYTES = 2048, 4 << 20  # tokenised at a time


@dataclass(frozen=True)
class Corpus:
    """The documents of one file, each with the end token after it.

    tokens: [n] uint16 or uint32, mapped. offsets: [documents + 1] int64, where each begins. prompts: [documents]
    uint32, how many tokens of each are a prompt, which is read and not learned. digest: SHA-256 of the file.
    largest: token id.
    """

    path: Path
    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray
    digest: str
    largest: int

    @property
    def documents(self) -> int:
        return len(self.prompts)


def tokenizer_digest(root: Path, end: int) -> str:
    """64 hex digits of what turns text into token ids: the tokenizer's files in `root`, and the end token."""
    digest = hashlib.sha256(str(end).encode())
    for path in sorted(root.iterdir()):
        if is_prompt_file(path.name) and path.name != "generation_config.json" and path.is_file():
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def open_corpus(
    path: Path, tokenizer: Any, tokenizer_key: str, cache: Path, progress: Callable[[int, int], None]
) -> Corpus:
    """The corpus in `path`, tokenised now unless the directory `cache` holds it.

    progress(done, total): bytes of the file. Raises CorpusError for a file or line that cannot be used, OutputError
    when the cache cannot be written.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}") from error
    identity = [FORMAT, str(path.resolve()), found.st_size, found.st_mtime_ns, tokenizer_key]
    directory = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    if not (directory / META).is_file():
        with _made(cache):
            writer = DirectoryWriter(directory)
            try:
                _tokenise(path, found, tokenizer, writer, progress)
            except OutputError:
                if not (directory / META).is_file():  # else another training was faster
                    raise
            finally:
                writer.discard()
    return _open(path, directory)


def _tokenise(
    path: Path,
    found: os.stat_result,
    tokenizer: Any,
    writer: DirectoryWriter,
    progress: Callable[[int, int], None],
) -> None:
    # Ids may have gaps: the number of tokens says nothing of the largest.
    kind = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    writer.open(found.st_size)
    digest = hashlib.sha256()
    encoder = Encoder(tokenizer)
    ends = dict.fromkeys((TOKENS, LENGTHS, PROMPTS), 0)
    largest = 0

    def append(name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        writer.write(name, ends[name], data)
        ends[name] += len(data)

    for group, done in _groups(path, digest):
        documents = encoder.encode(group)
        tokens = np.concatenate([np.asarray(ids, np.int64) for ids, _ in documents])
        largest = max(largest, int(tokens.max()))
        append(TOKENS, tokens.astype(kind))
        append(LENGTHS, np.array([len(ids) for ids, _ in documents], np.uint32))
        append(PROMPTS, np.array([prompt for _, prompt in documents], np.uint32))
        progress(done, found.st_size)
    if not ends[TOKENS]:
        raise CorpusError(f'{path} holds no documents; give a JSON Lines file of {{"text": ...}}')
    now = os.stat(path)
    if (now.st_size, now.st_mtime_ns) != (found.st_size, found.st_mtime_ns):
        raise CorpusError(f"{path} was changed while it was read; leave it alone, and start again")
    meta = {"source": str(path), "sha256": digest.hexdigest(), "dtype": kind.__name__, "largest": largest}
    writer.write(META, 0, json.dumps(meta).encode())
    writer.commit()


def _groups(path: Path, digest: Any) -> Iterator[tuple[list[Any], int]]:
    """Documents in groups of bounded size, and the bytes of the file read so far."""
    group: list[Any] = []
    begin = done = 0
    for document, done in read_documents(path, digest):
        group.append(document)
        if len(group) == GROUP_DOCUMENTS or done - begin > GROUP_BYTES:
            yield group, done
            group, begin = [], done
    if group:
        yield group, done


def _open(path: Path, directory: Path) -> Corpus:
    meta = json.loads((directory / META).read_text())
    lengths = np.fromfile(directory / LENGTHS, np.uint32)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.memmap(directory / TOKENS, np.dtype(meta["dtype"]), "r")
    if len(tokens) != offsets[-1]:
        raise ConfigError(f"the tokenised corpus {directory} is damaged; remove it, it is made again")
    prompts = np.memmap(directory / PROMPTS, np.uint32, "r")
    return Corpus(path, tokens, offsets, prompts, meta["sha256"], meta["largest"])


class _made:
    """The cache's directory, made on entry; removed again when it stays empty."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create {self._directory}: {error.strerror}") from error

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._directory.rmdir()
