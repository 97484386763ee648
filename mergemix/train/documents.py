"""Documents of a JSON Lines file, and their token ids."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergemix.errors import ConfigError, CorpusError

SHOWN = 80  # characters of a line that a message repeats
FORMS = 'a line must be a JSON object with "text", or with "prompt" and "answer"'


class Document(NamedTuple):
    """prompt: what is read and not learned; "" in a document of text."""

    prompt: str
    text: str


def read_documents(path: Path, digest: Any) -> Iterator[tuple[Document, int]]:
    """Each document, and the bytes of the file read so far; empty lines are passed over.

    digest: a hash that is given all bytes. Raises CorpusError naming the file and the line of what cannot be used.
    """
    done = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                done += len(line)
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if line.strip():
                    yield _document(line, f"{path}, line {number}"), done
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}") from error


def _document(line: bytes, where: str) -> Document:
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: is not UTF-8 at byte {error.start}: convert the file") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CorpusError(f"{where}: {FORMS}, but is {_shown(content)}")
    if "text" in content:
        if "answer" in content:
            raise CorpusError(f'{where}: has both "text" and "answer", so it is not clear what to train on')
        return Document("", _text(content, "text", where))
    if "prompt" not in content or "answer" not in content:
        raise CorpusError(f"{where}: {FORMS}, but has the keys {_shown(sorted(content))}")
    return Document(_text(content, "prompt", where, empty=True), _text(content, "answer", where))


def _text(content: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise CorpusError(f'{where}: "{key}" must be text, but is {_shown(value)}')
    if not empty and not value.strip():
        raise CorpusError(f'{where}: "{key}" is empty; a line must have something to train on')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise CorpusError(f'{where}: "{key}" holds half of a surrogate pair, which is no text') from None
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class Encoder:
    """Token ids of documents, with the end token after each. Raises ConfigError for a tokenizer that has none.

    A text begins as the tokenizer begins one (with BOS, or not). A prompt is encoded as the engines encode
    it, alone, and the answer follows it with the tokens it has in the whole text; where one token would span the
    boundary, the answer is encoded alone too.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = end_token(tokenizer)
        self._begin = tokenizer.bos_token_id

    def encode(self, documents: Sequence[Document]) -> list[tuple[list[int], int]]:
        """Of each document its ids, and how many of the first ones are its prompt."""
        whole = self._ids([document.prompt + document.text for document in documents])
        asked = [i for i, document in enumerate(documents) if document.prompt]
        prompts = dict(zip(asked, self._ids([documents[i].prompt for i in asked]), strict=True))
        encoded = []
        for i, ids in enumerate(whole):
            prompt = prompts.get(i, [])
            if ids[: len(prompt)] != prompt:
                ids = prompt + self._ids([documents[i].text], special=False)[0]
            encoded.append(([*ids, self._end], len(prompt)))
        return encoded

    def _ids(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """As the tokenizer begins a text, once, and without an end."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, verbose=False
        )["input_ids"]
        for ids in found:
            if ids[-1:] == [self._end]:
                ids.pop()
            if self._begin is not None and ids[:2] == [self._begin] * 2:
                del ids[0]
        return found


def end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the base's tokenizer has no end token, which must stand between documents; set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)
