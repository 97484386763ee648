"""The files of a Hugging Face checkpoint directory: by name, and whether one is still the file it was."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mergemix.errors import CheckpointError

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# What turns a request into token ids, and what ends an answer.
PROMPT_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "generation_config.json",
)  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
# All that belongs to the model beside its weights. Code: what config.json's auto_map names.
SIDE_FILES = (
    *PROMPT_FILES, CONFIG_NAME, "chat_template.json", "*.jinja", "*processor_config.json", "*.py",
)  # fmt: skip


def is_side_file(name: str) -> bool:
    """Whether a file of the top folder belongs to the model, and is neither weights nor anything else."""
    return _matches(name, SIDE_FILES)


def is_prompt_file(name: str) -> bool:
    """Whether a file of the top folder decides which token ids a request becomes, and which end an answer."""
    return _matches(name, PROMPT_FILES)


def check_unambiguous(where: str, indexed: Iterable[str], has_single: bool) -> None:
    """Refuse an index (of the files `indexed`) beside a single file that may hold other weights.

    Libraries differ in which one they take, so that scores could be of other weights than those merged.
    """
    if has_single and set(indexed) != {SINGLE_NAME}:
        raise CheckpointError(
            f"{where} holds both {INDEX_NAME} and {SINGLE_NAME}, and it cannot be told which are the model's "
            "weights; make a copy without the other"
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A file as it was when its header was read. What is known of its tensors holds for no other file."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def check_unchanged(path: Path, descriptor: int, identity: FileIdentity) -> None:
    """Raise CheckpointError unless the open file `descriptor` is the one that `path` was at first."""
    if FileIdentity.of(descriptor) != identity:
        raise CheckpointError(
            f"{path} was changed after it was opened: where its tensors lie is no longer known; "
            "leave checkpoints alone while they are used, and start again"
        )


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file that stays on the Hugging Face Hub, of one commit: what it holds can never change.

    repo: `org/name`. commit: 40 hex digits. etag: the Hub's name for the contents (SHA-256, or git's id of a small
    file).
    """

    repo: str
    commit: str
    name: str
    nbytes: int
    etag: str

    @property
    def path(self) -> Path:
        """How messages name the file."""
        return Path(f"{self.repo}@{self.commit[:12]}") / self.name
