"""Do base and experts read text alike?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergemix.checkpoints.checkpoint import Checkpoint
from mergemix.checkpoints.family import Family
from mergemix.preflight.verdict import Check

FAST_NAME = "tokenizer.json"
VOCABULARY_NAMES = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tiktoken.model",
    "tekken.json",
)
# What decides which ids a text becomes; padding, truncation and the template that adds BOS may be saved otherwise.
FAST_KEYS = ("model", "normalizer", "pre_tokenizer")
NAME = "tokenizer"


def tokenizer_check(family: Family) -> Check:
    """Whether all whole checkpoints of the family have the same vocabulary; adapters have their base's.

    A checkpoint without tokenizer files cannot differ: mixtures use the base's, or the first expert's, in any case.
    """
    members = [member for member in family.members if isinstance(member, Checkpoint)]
    try:
        found = {member.name: files for member in members if (files := _files(member.root))}
        if not found:
            return Check(
                NAME, "doubtful", "no checkpoint has a tokenizer: whether they read text alike is not known"
            )
        first, *rest = found
        others = [name for name in rest if not _same(found[first], found[name])]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return Check(
            NAME, "doubtful", f"the tokenizers could not be compared: {type(error).__name__}: {error}"
        )
    if others:
        return Check(
            NAME, "do not trust",
            f"{', '.join(others)} and {first} have different vocabularies, so the same token means different text: "
            "were they trained from one base?",
        )  # fmt: skip
    lacking = [member.name for member in members if member.name not in found]
    if lacking:
        return Check(NAME, "fine", f"the same wherever there is one ({', '.join(lacking)}: none)")
    return Check(NAME, "fine", "all checkpoints have the same vocabulary")


def _files(root: Path) -> dict[str, bytes]:
    """The files that hold the vocabulary: tokenizer.json, or those of tokenizers that have none."""
    names = (FAST_NAME,) if (root / FAST_NAME).is_file() else VOCABULARY_NAMES
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def _same(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> bool:
    if one == other:
        return True
    if FAST_NAME in one and FAST_NAME in other:
        return _vocabulary(one[FAST_NAME]) == _vocabulary(other[FAST_NAME])
    return False


def _vocabulary(raw: bytes) -> dict[str, Any]:
    content = json.loads(raw)
    # Ids, not the flags of added tokens, which versions of transformers write differently.
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    return {**{key: content.get(key) for key in FAST_KEYS}, "added": added}
