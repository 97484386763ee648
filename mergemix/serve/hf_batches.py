"""Batches of requests through a transformers model: answers and log-likelihoods.

Sequences are padded on the left, so that the places that matter are the last ones of every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mergemix.serve.engine import Generate, Generated, Likelihood, Request
from mergemix.serve.tokens import Encoded, cut_at_stop, decode_answer

TOKENS_PER_BATCH = 16384  # padded prompt and answer tokens
LOGITS_PER_BATCH = 1 << 26  # fp32 elements: 256 MiB
STEPS_PER_STOP_CHECK = 4


def batches(requests: Sequence[Request], encoded: Sequence[Encoded], vocab_size: int) -> Iterator[list[int]]:
    """Indices of requests that go through the model together: one kind, of like length, longest first.

    The batches depend on the set of requests, not on the order they came in. A request that samples is alone: its
    random numbers are then its own.
    """
    max_tokens = [request.max_tokens if isinstance(request, Generate) else 0 for request in requests]

    def key(i: int) -> tuple[int, int, tuple[int, ...], str]:
        return max_tokens[i], len(encoded[i].ids), encoded[i].ids, repr(requests[i])

    batch: list[int] = []
    width = scored = 0  # of the batch: longest prompt, most tokens to score
    for i in sorted(range(len(requests)), key=key, reverse=True):
        rows, answer = len(batch) + 1, max_tokens[batch[0]] if batch else max_tokens[i]
        width, scored = max(width, len(encoded[i].ids)), max(scored, encoded[i].num_scored)
        fits = (
            not (batch and (samples(requests[batch[0]]) or samples(requests[i])))
            and (answer > 0) == (max_tokens[i] > 0)
            and rows * (width + answer) <= TOKENS_PER_BATCH
            and rows * scored * vocab_size <= LOGITS_PER_BATCH
        )
        if batch and not fits:
            yield batch
            batch, width, scored = [], len(encoded[i].ids), encoded[i].num_scored
        batch.append(i)
    if batch:
        yield batch


def samples(request: Request) -> bool:
    """Whether the answer is drawn, not the most probable one."""
    return isinstance(request, Generate) and request.temperature > 0


def pad_left(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 (len(prompts), length of the longest)."""
    longest = max(map(len, prompts))
    ids = [[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


class StopWatch:
    """A stopping criterion for `generate`: each row ends at its own max_tokens, or once it says a stop string.

    Text is decoded every few steps only, so a row may run on past its stop; the answer is cut afterwards.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Sequence[int]], asked: Sequence[Generate]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._asked = asked
        self._prompt_length = max(map(len, prompts))
        self.done = [False] * len(asked)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._prompt_length
        if length % STEPS_PER_STOP_CHECK == 0:
            self._look_for_stops(input_ids[:, self._prompt_length :].tolist())
        ended = [
            done or length >= asked.max_tokens for done, asked in zip(self.done, self._asked, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)

    def _look_for_stops(self, answers: list[list[int]]) -> None:
        for row, (prompt, answer, asked) in enumerate(zip(self._prompts, answers, self._asked, strict=True)):
            if asked.stop and not self.done[row]:
                text = decode_answer(self._tokenizer, prompt, answer)
                self.done[row] = cut_at_stop(text, asked.stop) != text


def answer_batch(
    model: Any,
    tokenizer: Any,
    ends: Sequence[int],
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Generate],
) -> list[Generated]:
    """Answers, greedy or (a batch of one) sampled. ends: ids that end an answer, which num_tokens counts."""
    from transformers import GenerationConfig

    pad = ends[0] if ends else 0
    batch = pad_left(prompts, pad, model.device)
    first = asked[0]
    sampling = {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0} if samples(first) else {}
    config = GenerationConfig(
        do_sample=bool(sampling),
        **sampling,
        max_new_tokens=max(request.max_tokens for request in asked),
        eos_token_id=list(ends) or None,
        pad_token_id=pad,
    )
    watch = StopWatch(tokenizer, prompts, asked)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices):
        torch.manual_seed(first.seed)
        whole = model.generate(**batch, generation_config=config, stopping_criteria=[watch])
    answers = whole[:, batch["input_ids"].shape[1] :].tolist()
    return [
        _finish(tokenizer, set(ends), prompt, answer[: request.max_tokens], request)
        for prompt, answer, request in zip(prompts, answers, asked, strict=True)
    ]


def _finish(
    tokenizer: Any, ends: set[int], prompt: Sequence[int], answer: list[int], request: Generate
) -> Generated:
    """The answer as it would be had generation ended at the first end token or stop string."""
    end = next((place + 1 for place, token in enumerate(answer) if token in ends), None)
    length = len(answer) if end is None else end
    text = decode_answer(tokenizer, prompt, answer[:length])
    stops = request.stop
    cut = cut_at_stop(text, stops)
    if cut != text:
        # The shortest answer that holds the stop string; text only grows with tokens.
        low, high = 1, length
        while low < high:
            middle = (low + high) // 2
            part = decode_answer(tokenizer, prompt, answer[:middle])
            low, high = (low, middle) if cut_at_stop(part, stops) != part else (middle + 1, high)
        length = low
    return Generated(cut, length, finished=end is not None or cut != text or length < request.max_tokens)


@torch.inference_mode()
def score_batch(
    model: Any, sequences: Sequence[Sequence[int]], num_scored: Sequence[int]
) -> list[Likelihood]:
    """Log-likelihoods of the last num_scored[i] ids of sequence i: fp32 log-softmax, summed in fp64."""
    keep = max(num_scored)
    if keep == 0:
        return [Likelihood(0.0, 0, True) for _ in sequences]
    batch = pad_left(sequences, 0, model.device)
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    options = {"logits_to_keep": keep + 1} if "logits_to_keep" in accepted else {}
    logits = model(**batch, **options, use_cache=False).logits[:, -keep - 1 : -1].float()
    targets = batch["input_ids"][:, -keep:]
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].double().cpu()
    greedy = (logits.argmax(-1) == targets).cpu()
    return [
        Likelihood(float(row[keep - n :].sum()), n, bool(hits[keep - n :].all()))
        for row, hits, n in zip(logprobs, greedy, num_scored, strict=True)
    ]
