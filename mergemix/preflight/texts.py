"""A little text of each domain, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mergemix.errors import ConfigError
from mergemix.serve.tokens import load_tokenizer
from mergemix.train.documents import Encoder, read_documents


@dataclass(frozen=True, slots=True)
class Snippet:
    """The beginning of one document. ids: at least two. num_read: the first ones, which are read and not scored."""

    ids: tuple[int, ...]
    num_read: int

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.num_read


Texts = Mapping[str, tuple[Snippet, ...]]


def read_texts(data: Mapping[str, Path], root: Path, *, documents: int, tokens: int) -> Texts:
    """The first `documents` documents of each domain's JSON Lines file, and of each at most `tokens` tokens.

    data: as `mergemix train` takes it, {"text"} or {"prompt", "answer"}, of which the answer is scored. root: of the
    tokenizer. Raises CorpusError for a line that cannot be used, ConfigError where nothing is left to score.
    """
    encoder = Encoder(load_tokenizer(root))
    texts = {}
    for domain, path in data.items():
        read = islice(read_documents(path, hashlib.sha256()), documents)
        encoded = encoder.encode([document for document, _ in read])
        # The first id of all has nothing before it that could predict it.
        snippets = (Snippet(tuple(ids[:tokens]), max(num_prompt, 1)) for ids, num_prompt in encoded)
        texts[domain] = tuple(snippet for snippet in snippets if snippet.num_scored > 0)
        if not texts[domain]:
            raise ConfigError(
                f"the data of {domain} must have text to score within the first {tokens} tokens of a document, but "
                f"{path} has none in {len(encoded)} documents"
            )
    return texts
