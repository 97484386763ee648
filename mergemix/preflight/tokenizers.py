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
        by_relation: dict[str, list[str]] = {}
        for name in rest:
            by_relation.setdefault(_compare(found[first], found[name]), []).append(name)
    except Exception as error:  # tokenizers raises Exception itself for what is no tokenizer
        return Check(
            NAME, "doubtful", f"the tokenizers could not be compared: {type(error).__name__}: {error}"
        )
    if others := by_relation.get("different"):
        return Check(
            NAME, "do not trust",
            f"{', '.join(others)} and {first} have different vocabularies, so the same token means different text: "
            "were they trained from one base?",
        )  # fmt: skip
    if more := by_relation.get("added"):
        return Check(
            NAME, "doubtful",
            f"{', '.join(more)} and {first} have the same vocabulary, but for tokens that one of them adds: merges "
            f"read text as {members[0].name} does",
        )  # fmt: skip
    if unknown := by_relation.get("unknown"):
        return Check(
            NAME, "doubtful",
            f"the tokenizers of {', '.join(unknown)} and {first} are kept in other kinds of files: whether they read "
            "text alike is not known",
        )  # fmt: skip
    lacking = [member.name for member in members if member.name not in found]
    if lacking:
        return Check(NAME, "fine", f"the same wherever there is one ({', '.join(lacking)}: none)")
    return Check(NAME, "fine", "all checkpoints have the same vocabulary")


def _files(root: Path) -> dict[str, bytes]:
    """The files that hold the vocabulary, by name."""
    names = (FAST_NAME, *VOCABULARY_NAMES)
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def _compare(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> str:
    """ "same", "added" (tokens in one of the two), "different", or "unknown" where they have no file in common.

    tokenizer.json says all; without it the same vocabulary files.
    """
    common = [FAST_NAME] if FAST_NAME in one and FAST_NAME in other else sorted(set(one) & set(other))
    if not common:
        return "unknown"
    if all(one[name] == other[name] for name in common):
        return "same"
    if common != [FAST_NAME]:
        return "different"
    (reads, added), (other_reads, other_added) = _read(one[FAST_NAME]), _read(other[FAST_NAME])
    if reads != other_reads:
        return "different"
    if added == other_added:
        return "same"
    return (
        "added"
        if added.items() <= other_added.items() or added.items() >= other_added.items()
        else "different"
    )


def _read(raw: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    """What decides the ids of text, and the ids of added tokens, as this version of tokenizers would write them.

    Earlier versions wrote the same merges in another way and left out options that were not there yet.
    """
    from tokenizers import Tokenizer

    content = json.loads(Tokenizer.from_str(raw.decode()).to_str())
    # Ids, not the flags of added tokens, which versions of transformers write differently.
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return {key: content.get(key) for key in FAST_KEYS}, added
