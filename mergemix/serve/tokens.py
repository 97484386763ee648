"""Text to token ids and back, shared by all engines so that each sees the same ids.

The conventions for log-likelihoods and truncation are lm-evaluation-harness's (`lm_eval/api/model.py`,
`lm_eval/models/vllm_causallms.py`), so that scores are comparable with published ones.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergemix.checkpoints.strict_json import read_object, shown
from mergemix.errors import CheckpointError, ConfigError
from mergemix.serve.engine import Generate, Request, Text

log = logging.getLogger(__name__)

# Requests whose ids are remembered: a search asks the same ones for every candidate.
REMEMBERED_REQUESTS = 1 << 17


def load_tokenizer(root: Path) -> Any:
    """The tokenizer in directory `root`; raises CheckpointError when transformers can load none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
    except Exception as error:  # damaged files end in anything at all, down to a bare Exception of tokenizers
        raise CheckpointError(f"no tokenizer could be loaded from {root}: {error}") from error


def prefix_token(tokenizer: Any) -> int:
    """What stands before text without context: BOS, else EOS. CheckpointError when there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CheckpointError(
        "the tokenizer has neither a BOS nor an EOS token, so an empty prompt cannot be answered"
    )


def end_tokens(root: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer, sorted: tokenizer EOS and generation_config.json, else config.json.

    Raises CheckpointError when one of these files is damaged or its eos_token_id is no id and no list of ids.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        if (root / name).is_file():
            given = read_object(root / name).get("eos_token_id")
            if given is not None:
                ids = given if isinstance(given, list) else [given]
                if not all(type(token) is int and token >= 0 for token in ids):
                    raise CheckpointError(
                        f"{root / name}: eos_token_id must be a token id or a list of them, but is {shown(given)}"
                    )
                ends.update(ids)
                break
    return tuple(sorted(ends))


def encode_prompt(tokenizer: Any, text: Text) -> list[int]:
    """Ids of a prompt; given ids as they are.

    Text comes with the tokenizer's own special tokens (BOS) unless it already begins with BOS. An empty prompt becomes
    the prefix token, since a model needs something to continue.
    """
    if not isinstance(text, str):
        return list(text) or [prefix_token(tokenizer)]
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return _ids(tokenizer, text, special=not has_bos) or [prefix_token(tokenizer)]


def encode_pair(tokenizer: Any, context: Text, continuation: Text) -> tuple[list[int], list[int]]:
    """Ids of a context (never empty) and of the continuation to be scored after it; given ids as they are.

    Trailing whitespace of the context moves to the continuation, and the two are encoded as one text that is
    split at the length of the encoded context, so that words keep their usual tokens. An empty context is the
    prefix token, which is not repeated when the continuation begins with it. Where a token that spans the
    boundary would leave nothing to score, the continuation is encoded alone (lm-eval scores it 0).
    """
    if not isinstance(context, str) or not isinstance(continuation, str):
        if isinstance(context, str) or isinstance(continuation, str):
            raise ConfigError("context and continuation must both be text, or both be token ids")
        return encode_prompt(tokenizer, context), list(continuation)
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if kept:
        context_ids = encode_prompt(tokenizer, kept)
        continuation_ids = encode_prompt(tokenizer, kept + continuation)[len(context_ids) :]
        return context_ids, continuation_ids or _ids(tokenizer, continuation, special=False)
    first = prefix_token(tokenizer)
    continuation_ids = _ids(tokenizer, continuation, special=False)
    return [first], continuation_ids[1:] if continuation_ids[:1] == [first] else continuation_ids


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids for the model, and how many of the last ones are to be scored (0 for generation).

    cut: how many did not fit and were left out, at the beginning.
    """

    ids: tuple[int, ...]
    num_scored: int
    cut: int = 0


class RequestEncoder:
    """Requests to ids that fit the model, remembered across candidates.

    What is too long loses tokens on the left: a prompt keeps its last max_model_len - max_tokens tokens, a
    context with its continuation the last max_model_len - 1 (vLLM always generates one more), or the last
    `most_scored_as_lm_eval` where it is asked so. How many were cut is in the result, and a warning is logged when a
    request is first cut. Raises ConfigError when max_model_len is less than 2, for a request whose max_tokens is not in
    [1, max_model_len), and for a pair of text and ids.
    """

    def __init__(self, tokenizer: Any, max_model_len: int, most_scored_as_lm_eval: int | None = None) -> None:
        if max_model_len < 2:
            raise ConfigError(
                f"max_model_len must be at least 2, a token to read and one to answer, but is {max_model_len}"
            )
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._most_scored_as_lm_eval = most_scored_as_lm_eval or max_model_len - 1
        self.encode = lru_cache(maxsize=REMEMBERED_REQUESTS)(self._encode)

    def _encode(self, request: Request) -> Encoded:
        if isinstance(request, Generate):
            if not 0 < request.max_tokens < self.max_model_len:
                raise ConfigError(
                    f"max_tokens must be at least 1 and less than the model's length of {self.max_model_len} "
                    f"tokens, but is {request.max_tokens}"
                )
            prompt = encode_prompt(self.tokenizer, request.prompt)
            ids = self._fit(prompt, self.max_model_len - request.max_tokens)
            return Encoded(ids, 0, len(prompt) - len(ids))
        context, continuation = encode_pair(self.tokenizer, request.context, request.continuation)
        limit = self._most_scored_as_lm_eval if request.as_lm_eval else self.max_model_len - 1
        ids = self._fit(context + continuation, limit)
        # The first id of all has nothing before it that could predict it.
        return Encoded(ids, min(len(continuation), len(ids) - 1), len(context) + len(continuation) - len(ids))

    def _fit(self, ids: list[int], limit: int) -> tuple[int, ...]:
        if len(ids) > limit:
            log.warning("a request of %d tokens keeps only its last %d, to fit the model", len(ids), limit)
        return tuple(ids[-limit:])


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to, not including, the first place where any of `stops` begins; empty stops are ignored."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def decode_answer(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """Text of the `answer` ids after the `prompt` ids, without special tokens.

    Decoded together with the end of the prompt, as vLLM does: many tokenizers drop a space that a text begins
    with.
    """
    before = list(prompt[-4:])
    known = tokenizer.decode(before, skip_special_tokens=True)
    text = tokenizer.decode([*before, *answer], skip_special_tokens=True)
    return (
        text[len(known) :] if text.startswith(known) else tokenizer.decode(answer, skip_special_tokens=True)
    )
