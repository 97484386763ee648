"""Requests through a transformers model, each alone: what lm-evaluation-harness's `hf` model computes.

Its numbers are met to all digits at batch size 1 (`lm_eval/models/huggingface.py`). Padding, other sequences in the
batch, and logits of fewer places all change how matrix products are split, and so the last bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output, Request
from mergemix.serve.tokens import Encoded

# Ids that a stop string is looked for in, besides as many as it is encoded to: text may be split in other ways.
STOP_SLACK = 2


def checkpoint_generation_config(root: Path, config: Any) -> Any:
    """The settings that `from_pretrained` would give the model: a repetition penalty counts in greedy answers too."""
    from transformers import GenerationConfig

    if (root / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(root))
    return GenerationConfig.from_model_config(config)


@torch.inference_mode()
def score_alone(model: Any, encoded: Mapping[int, Encoded]) -> dict[int, Likelihood]:
    """Log-likelihoods by index; sequences that differ in the last id only go through the model once.

    Log-probabilities and their sum are in the model's dtype, as lm-eval's are.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    found: dict[int, Likelihood] = {}
    for index, each in encoded.items():
        if each.num_scored:
            inputs.setdefault(each.ids[:-1], []).append(index)
        else:
            found[index] = Likelihood(0.0, 0, True, each.cut)
    for ids, indices in inputs.items():
        logits = model(torch.tensor([ids], device=model.device)).logits[0]
        keep = max(encoded[index].num_scored for index in indices)
        logprobs = logits[-keep:].log_softmax(-1)
        best = logprobs.argmax(-1)
        for index in indices:
            each = encoded[index]
            targets = torch.tensor(each.ids[-each.num_scored :], device=model.device)
            scores = logprobs[-each.num_scored :].gather(-1, targets[:, None])[:, 0]
            is_greedy = bool((best[-each.num_scored :] == targets).all())
            found[index] = Likelihood(float(scores.sum()), each.num_scored, is_greedy, each.cut)
    return found


class _StopAtText:
    """A stopping criterion for one answer: its last ids hold one of the stop strings, special tokens included."""

    def __init__(self, tokenizer: Any, prompt_length: int, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length
        self._windows = [
            (stop, len(tokenizer.encode(stop, add_special_tokens=False)) + STOP_SLACK)
            for stop in stops
            if stop
        ]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        answer = input_ids[0, self._prompt_length :].tolist()
        said = any(stop in self._tokenizer.decode(answer[-window:]) for stop, window in self._windows)
        return torch.tensor([said], device=input_ids.device)


def answer_alone(
    model: Any, tokenizer: Any, ends: Sequence[int], settings: Any, encoded: Encoded, asked: Generate
) -> Generated:
    """A greedy answer. settings: of the checkpoint. ends: ids that end an answer, which num_tokens counts."""
    prompt = torch.tensor([encoded.ids], device=model.device)
    settings = copy.deepcopy(settings)
    settings.update(
        do_sample=False,
        max_length=None,
        max_new_tokens=asked.max_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    with torch.inference_mode():
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            stopping_criteria=[_StopAtText(tokenizer, len(encoded.ids), asked.stop)],
        )
    answer = whole[0, len(encoded.ids) :].tolist()
    # Decoded alone: many tokenizers drop a space that a text begins with.
    text = tokenizer.decode(answer, skip_special_tokens=True)
    for stop in asked.stop:
        text = text.split(stop)[0] if stop else text
    said = tokenizer.decode(answer)
    stopped = answer[-1] in ends or any(stop and stop in said for stop in asked.stop)
    finished = stopped or len(answer) < asked.max_tokens
    return Generated(text, len(answer), finished, encoded.cut)


def answer_as_lm_eval(
    model: Any,
    tokenizer: Any,
    ends: Sequence[int],
    settings: Any,
    requests: Mapping[int, Request],
    encoded: Sequence[Encoded],
) -> dict[int, Output]:
    """Outputs of the requests, none of which samples, by index. encoded: of all indices."""
    scored = {i: encoded[i] for i, each in requests.items() if isinstance(each, LogLikelihood)}
    outputs: dict[int, Output] = {**score_alone(model, scored)}
    for i, request in requests.items():
        if isinstance(request, Generate):
            outputs[i] = answer_alone(model, tokenizer, ends, settings, encoded[i], request)
    return outputs
