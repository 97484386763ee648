"""Vocabularies that differ are told from files that only differ in how they were saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergemix.checkpoints.family import open_family
from mergemix.preflight.tokenizers import tokenizer_check
from tests.serve.tiny_models import tiny_tokenizer
from tests.tiny import random_tensors, write_checkpoint

Change = Callable[[dict[str, Any]], None]


def families(root: Path, change: Change | None = None) -> Any:
    """A base and two experts; `change` edits tokenizer.json of the second."""
    tensors = random_tensors({"w": (4, 4)}, 0)
    for name in ("base", "a", "b"):
        write_checkpoint(root / name, tensors)
        tiny_tokenizer(bos=True).save_pretrained(root / name)
    if change is not None:
        path = root / "b" / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return open_family(str(root / "base"), {name: str(root / name) for name in ("a", "b")})


def swap_two_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]


def add_a_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append({**content["added_tokens"][0], "content": "<extra>", "id": 127})


def drop_a_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"].pop()


def lower(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def only_truncate(content: dict[str, Any]) -> None:
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}


def as_it_was_written_once(content: dict[str, Any]) -> None:
    """tokenizers before 0.20: merges as text, without the options that came later."""
    merges = [pair for pair in content["model"]["merges"] if " " not in "".join(pair)]
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    for key in ("ignore_merges", "byte_fallback"):
        del content["model"][key]


def test_equal_ones_are_fine(tmp_path: Path) -> None:
    assert tokenizer_check(families(tmp_path)).verdict == "fine"


def test_what_does_not_change_ids_is_fine(tmp_path: Path) -> None:
    assert tokenizer_check(families(tmp_path, only_truncate)).verdict == "fine"


def test_another_version_that_saved_it_is_fine(tmp_path: Path) -> None:
    """Merges with a space had no text form then: here neither has them."""
    family = families(tmp_path)
    for name in ("base", "a", "b"):
        path = tmp_path / name / "tokenizer.json"
        content = json.loads(path.read_text())
        merges = content["model"]["merges"]
        content["model"]["merges"] = [pair for pair in merges if " " not in "".join(pair)]
        if name == "b":
            as_it_was_written_once(content)
        path.write_text(json.dumps(content))
    assert tokenizer_check(family).verdict == "fine"


def test_a_token_that_one_adds_is_doubtful(tmp_path: Path) -> None:
    """A chat template's tokens: all text that the base knows is read alike."""
    check = tokenizer_check(families(tmp_path, add_a_token))
    assert check.verdict == "doubtful"
    assert "for tokens that one of them adds" in check.why


def test_other_tokens_at_the_same_id_are_not(tmp_path: Path) -> None:
    family = families(tmp_path, add_a_token)
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text((tmp_path / "b" / "tokenizer.json").read_text().replace("<extra>", "<other>"))
    (tmp_path / "base" / "tokenizer.json").unlink()
    check = tokenizer_check(family)
    assert check.verdict == "do not trust"
    assert check.why.startswith("b and a")


def test_other_kinds_of_files_are_not_known_to_differ(tmp_path: Path) -> None:
    """An old base has only a SentencePiece model, what was trained from it only tokenizer.json."""
    family = families(tmp_path)
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "base" / "tokenizer.model")
    check = tokenizer_check(family)
    assert check.verdict == "doubtful"
    assert "a, b and base are kept in other kinds of files" in check.why


def test_a_file_that_only_one_has_is_no_difference(tmp_path: Path) -> None:
    family = families(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert tokenizer_check(family).verdict == "fine"
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"other pieces")
    assert tokenizer_check(family).verdict == "do not trust"


@pytest.mark.parametrize("change", [swap_two_ids, drop_a_merge, lower])
def test_what_changes_ids_is_not(tmp_path: Path, change: Change) -> None:
    check = tokenizer_check(families(tmp_path, change))
    assert check.verdict == "do not trust"
    assert check.why.startswith("b and base")


def test_a_damaged_one_is_doubtful_and_no_error(tmp_path: Path) -> None:
    family = families(tmp_path)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    assert tokenizer_check(family).verdict == "doubtful"


def test_one_that_is_lacking_is_said(tmp_path: Path) -> None:
    family = families(tmp_path)
    (tmp_path / "a" / "tokenizer.json").unlink()
    check = tokenizer_check(family)
    assert check.verdict == "fine"
    assert "a: none" in check.why


def test_without_any_it_is_not_known(tmp_path: Path) -> None:
    tensors = random_tensors({"w": (4, 4)}, 0)
    paths = {name: str(write_checkpoint(tmp_path / name, tensors)) for name in ("base", "a")}
    assert tokenizer_check(open_family(paths["base"], {"a": paths["a"]})).verdict == "doubtful"
