"""Text to ids: the conventions of lm-evaluation-harness, checked against its own code where it has some."""

from __future__ import annotations

import json
import logging
import re
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM

from mergemix.errors import CheckpointError, ConfigError
from mergemix.serve.engine import Generate, LogLikelihood
from mergemix.serve.tokens import (
    RequestEncoder,
    cut_at_stop,
    decode_answer,
    encode_pair,
    encode_prompt,
    end_tokens,
    load_tokenizer,
)
from tests.serve.tiny_models import tiny_tokenizer

LLAMA, QWEN = tiny_tokenizer(bos=True), tiny_tokenizer(bos=False)
TEXT = st.text(alphabet="the in abc 12\n", max_size=20) | st.text(alphabet=string.printable, max_size=8)


def lm_eval_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What lm-eval encodes a pair to."""

    def tok_encode(text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found: list[Any] = []
    fake = SimpleNamespace(backend="causal", tok_encode=tok_encode, prefix_token_id=prefix)
    fake._encode_pair = lambda *pair: TemplateLM._encode_pair(fake, *pair)  # type: ignore[arg-type]
    fake._loglikelihood_tokens = lambda requests, disable_tqdm: found.extend(requests)
    request = SimpleNamespace(args=(context, continuation))
    TemplateLM.loglikelihood(fake, [request], disable_tqdm=True)  # type: ignore[arg-type, list-item]
    return found[0][1], found[0][2]


@pytest.mark.parametrize("tokenizer", [LLAMA, QWEN])
@given(context=TEXT, continuation=TEXT.filter(bool))
def test_pairs_are_encoded_as_lm_eval_encodes_them(tokenizer: Any, context: str, continuation: str) -> None:
    before, scored = encode_pair(tokenizer, context, continuation)
    assert before
    assert scored
    if context == "" or context.strip():
        theirs = lm_eval_pair(tokenizer, context, continuation)
        if theirs[1]:  # else lm-eval scores nothing at all
            assert (before, scored) == theirs


@pytest.mark.parametrize("tokenizer", [LLAMA, QWEN])
@given(context=TEXT, continuation=TEXT.filter(bool))
def test_whitespace_may_be_on_either_side_of_the_boundary(
    tokenizer: Any, context: str, continuation: str
) -> None:
    assert encode_pair(tokenizer, context + " ", continuation) == encode_pair(
        tokenizer, context.rstrip(), (context + " ")[len(context.rstrip()) :] + continuation
    )


def test_a_pair_without_context_is_scored_after_bos_or_else_eos() -> None:
    assert encode_pair(LLAMA, "", "a") == ([0], LLAMA("a", add_special_tokens=False)["input_ids"])
    assert encode_pair(QWEN, "", "a") == ([1], QWEN("a")["input_ids"])
    assert encode_pair(QWEN, "  ", "a") == ([1], QWEN("  a")["input_ids"])
    assert encode_pair(LLAMA, "", "<s>a") == encode_pair(LLAMA, "", "a")


def test_a_token_over_the_boundary_does_not_leave_nothing_to_score() -> None:
    assert QWEN("abc")["input_ids"] == [QWEN.convert_tokens_to_ids("abc")]
    assert encode_pair(QWEN, "ab", "c") == (QWEN("ab")["input_ids"], QWEN("c")["input_ids"])


def test_a_prompt_begins_with_one_bos_where_the_tokenizer_adds_it() -> None:
    assert encode_prompt(LLAMA, "<s>the") == encode_prompt(LLAMA, "the") == [0, *QWEN("the")["input_ids"]]
    assert encode_prompt(QWEN, "the") == QWEN("the")["input_ids"]
    assert encode_prompt(LLAMA, "") == [0]
    assert encode_prompt(QWEN, "") == [1]


def test_a_tokenizer_without_bos_and_eos_cannot_encode_an_empty_prompt() -> None:
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="neither a BOS nor an EOS"):
        encode_prompt(tokenizer, "")


def test_end_tokens_come_from_tokenizer_and_generation_config_else_config(tmp_path: Path) -> None:
    assert end_tokens(tmp_path, QWEN) == (1,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(tmp_path, QWEN) == (1, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert end_tokens(tmp_path, QWEN) == (1, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
    assert end_tokens(tmp_path, QWEN) == (1, 8, 9)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, null]}', '{"eos_token_id": true}',
     '{"eos_token_id": {"a": 1}}', '{"eos_token_id": -1}', '{"eos_token_id": 1.5}'],
)  # fmt: skip
def test_damaged_end_tokens_are_an_error_that_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "generation_config.json"))):
        end_tokens(tmp_path, QWEN)


def test_a_damaged_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    QWEN.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_directory_without_a_tokenizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    QWEN.save_pretrained(tmp_path)
    assert encode_prompt(load_tokenizer(tmp_path), "the cat") == encode_prompt(QWEN, "the cat")


@given(length=st.integers(1, 30), max_tokens=st.integers(1, 15))
def test_a_long_prompt_keeps_its_last_tokens_and_room_for_the_answer(length: int, max_tokens: int) -> None:
    encoder = RequestEncoder(QWEN, max_model_len=16)
    encoded = encoder.encode(Generate("x" * length, max_tokens))
    assert len(encoded.ids) == min(length, 16 - max_tokens)
    assert encoded.cut == length - len(encoded.ids)


@given(context=st.integers(0, 30), continuation=st.integers(1, 30))
def test_a_long_pair_keeps_its_last_tokens_and_scores_what_is_left_of_the_continuation(
    context: int, continuation: int
) -> None:
    encoded = RequestEncoder(QWEN, max_model_len=16).encode(LogLikelihood("x" * context, "y" * continuation))
    whole = [*(QWEN("x" * context)["input_ids"] or [1]), *QWEN("y" * continuation)["input_ids"]]
    assert list(encoded.ids) == whole[-15:]
    assert encoded.num_scored == min(continuation, len(encoded.ids) - 1)
    assert encoded.cut == len(whole) - len(encoded.ids)


@given(
    context=st.lists(st.integers(0, 50), min_size=1), continuation=st.lists(st.integers(0, 50), min_size=1)
)
def test_ids_are_taken_as_they_are(context: list[int], continuation: list[int]) -> None:
    encoder = RequestEncoder(QWEN, max_model_len=1000)
    assert encoder.encode(Generate(tuple(context), 1)).ids == tuple(context)
    encoded = encoder.encode(LogLikelihood(tuple(context), tuple(continuation)))
    assert (encoded.ids, encoded.num_scored) == ((*context, *continuation), len(continuation))


def test_text_with_ids_is_refused() -> None:
    with pytest.raises(ConfigError, match="both be text, or both be token ids"):
        RequestEncoder(QWEN, max_model_len=16).encode(LogLikelihood("x", (1,)))


def test_truncation_is_logged_once_a_request(caplog: pytest.LogCaptureFixture) -> None:
    encoder = RequestEncoder(QWEN, max_model_len=4)
    with caplog.at_level(logging.WARNING):
        encoder.encode(Generate("xxxxx", 1))
        encoder.encode(Generate("xxxxx", 1))
    assert [record.getMessage() for record in caplog.records] == [
        "a request of 5 tokens keeps only its last 3, to fit the model"
    ]


def test_a_model_of_one_token_can_answer_nothing() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len must be at least 2.* is 1"):
        RequestEncoder(QWEN, max_model_len=1)
    encoded = RequestEncoder(QWEN, max_model_len=2).encode(LogLikelihood("xxx", "yyy"))
    assert (len(encoded.ids), encoded.num_scored) == (1, 0)


@pytest.mark.parametrize("max_tokens", [-1, 0, 16, 17])
def test_an_answer_must_fit_the_model(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"length of 16 tokens, but is {max_tokens}"):
        RequestEncoder(QWEN, max_model_len=16).encode(Generate("x", max_tokens))


@given(
    text=st.text(alphabet="ab\n", max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", max_size=3), max_size=3),
)
def test_a_cut_answer_is_the_longest_beginning_before_any_stop(text: str, stops: list[str]) -> None:
    cut = cut_at_stop(text, stops)
    assert text.startswith(cut)
    if cut == text:
        assert not any(stop and stop in text for stop in stops)
    else:
        assert any(stop and text[len(cut) :].startswith(stop) for stop in stops)
        for place in range(len(cut)):
            assert not any(stop and text[place:].startswith(stop) for stop in stops)


@given(prompt=TEXT, answer=TEXT)
def test_an_answer_is_decoded_to_its_text(prompt: str, answer: str) -> None:
    ids = QWEN(answer)["input_ids"]
    text = "".join(QWEN.convert_ids_to_tokens([token for token in ids if token > 3]))
    assert decode_answer(QWEN, encode_prompt(LLAMA, prompt), [*ids, 1]) == text


def test_a_space_that_begins_an_answer_is_kept() -> None:
    """Decoders of the SentencePiece kind drop the space that a text begins with."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁a": 0, "▁b": 1, "<unk>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == "b"
    assert decode_answer(tokenizer, [0], [1, 1]) == " b b"
