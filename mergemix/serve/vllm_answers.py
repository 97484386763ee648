"""Requests as vLLM takes them, and its outputs as they come: what `LLM.generate` does, but as a stream.

`LLM.generate` returns when the last request is answered. Here the same calls of its LLMEngine are made (`add_request`,
then `step` while there is something to do), and what a step finished is given away at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

from mergemix.errors import EngineError
from mergemix.serve.engine import Generate, Generated, Likelihood, Output, Request
from mergemix.serve.tokens import Encoded, RequestEncoder

# What a step finished, (index, output) each; in the end the seconds inside vLLM.
Stream = Generator[list[tuple[int, Output]], None, float]

# Requests of different text that share their parameters: few benchmarks have more ways of asking.
REMEMBERED_PARAMETERS = 1 << 10


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for vLLM. parameters: its SamplingParams for a generation, None for a log-likelihood."""

    encoded: Encoded
    parameters: Any


def ask_for(request: Request, encoder: RequestEncoder, ends: Sequence[int]) -> Asked:
    """ends: ids that end an answer. Raises ConfigError for a request that cannot fit the model."""
    encoded = encoder.encode(request)
    if not isinstance(request, Generate):
        return Asked(encoded, None)
    stops = tuple(stop for stop in request.stop if stop)
    seed = request.seed if request.temperature > 0 else None
    return Asked(
        encoded,
        _generation(
            request.max_tokens,
            stops,
            tuple(ends),
            request.temperature,
            request.top_p,
            seed,
            request.as_lm_eval,
        ),
    )


class Answers:
    """Asks a vLLM engine. numbers: of its requests, never used twice."""

    def __init__(self, engine: Any) -> None:
        """engine: vLLM's LLMEngine."""
        self._engine = engine
        self._numbers = count()

    def stream(self, asked: Sequence[Asked], adapters: Sequence[Any] = ()) -> Stream:
        """After each of vLLM's steps, (index, output) of what it finished. Returns the seconds inside vLLM.

        adapters: vLLM's LoRARequest of each. Whatever ends it early, vLLM forgets all that it was asked.
        """
        pending: dict[str, int] = {}
        sharing = self._sharing(asked)
        seconds = 0.0

        def ask(index: int) -> None:
            number = str(next(self._numbers))
            pending[number] = index
            prompt = {"type": "token", "prompt_token_ids": list(asked[index].encoded.ids)}
            parameters = asked[index].parameters or _scoring(index in sharing)
            adapter = adapters[index] if adapters else None
            self._engine.add_request(number, prompt, parameters, lora_request=adapter)

        try:
            begin = time.perf_counter()
            for index in range(len(asked)):
                ask(index)
            while self._engine.has_unfinished_requests():
                answers = [answer for answer in self._engine.step() if answer.finished]
                seconds += time.perf_counter() - begin
                finished = []
                for answer in answers:
                    index = pending.pop(answer.request_id)
                    if index in sharing and _lacks_scores(answer, asked[index].encoded):
                        sharing.remove(index)
                        ask(index)
                    else:
                        finished.append((index, _output(answer, asked[index])))
                yield finished
                begin = time.perf_counter()
            if pending:
                raise EngineError(f"vLLM left {len(pending)} of {len(asked)} requests without an answer")
            return seconds
        finally:
            if pending:
                with suppress(Exception):  # an engine that is dead has forgotten them
                    self._engine.abort_request(list(pending))

    def _sharing(self, asked: Sequence[Asked]) -> set[int]:
        """Indices of the log-likelihoods that may read a cached prefix: those that begin as another request does.

        vLLM by itself reads none for a request with log-probabilities of its prompt, since those of the prefix are
        lost. We need those of the continuation only, and few-shot examples, or choices of one question, are shared.
        """
        block = self._engine.vllm_config.cache_config.block_size
        begins = [hash(each.encoded.ids[:block]) for each in asked]
        counts = Counter(begins)
        return {
            index
            for index, each in enumerate(asked)
            if each.parameters is None
            and counts[begins[index]] > 1
            and len(each.encoded.ids) - each.encoded.num_scored > block
        }


@lru_cache(maxsize=REMEMBERED_PARAMETERS)
def _generation(
    max_tokens: int,
    stop: tuple[str, ...],
    ends: tuple[int, ...],
    temperature: float,
    top_p: float,
    seed: int | None,
    special_tokens: bool,
) -> Any:
    """special_tokens: leave them in the text, as lm-evaluation-harness does."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=list(stop) or None,
        stop_token_ids=list(ends),
        skip_special_tokens=not special_tokens,
        spaces_between_special_tokens=not special_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@lru_cache(maxsize=2)
def _scoring(reads_prefix: bool) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # The best token's logprob too, which tells a tie from a better token. vLLM must generate one token at least.
    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=1,
        flat_logprobs=True,
        detokenize=False,
        skip_reading_prefix_cache=not reads_prefix,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _lacks_scores(answer: Any, encoded: Encoded) -> bool:
    """Whether the cached prefix reached the continuation. Its first token's score comes from the position before it."""
    first = len(encoded.ids) - encoded.num_scored
    held = len(answer.prompt_logprobs) - 1  # the first position never has one
    return answer.num_cached_tokens is None or answer.num_cached_tokens >= first or held < encoded.num_scored


def _output(answer: Any, asked: Asked) -> Output:
    if asked.parameters is None:
        return _likelihood(answer, asked.encoded)
    return _generated(answer, asked.encoded)


def _generated(answer: Any, encoded: Encoded) -> Generated:
    completion = answer.outputs[0]
    finished = completion.finish_reason != "length"
    return Generated(completion.text, len(completion.token_ids), finished, encoded.cut)


def _likelihood(answer: Any, encoded: Encoded) -> Likelihood:
    """The last `num_scored` tokens of the prompt. A token that ties with the most probable one counts as greedy."""
    ids = encoded.ids
    total, greedy = 0.0, True
    for place in range(-encoded.num_scored, 0):  # from the end: a cached prefix may be missing
        known = answer.prompt_logprobs[place]
        logprob = known[ids[place]].logprob
        total += logprob
        greedy = greedy and logprob >= max(each.logprob for each in known.values())
    return Likelihood(total, encoded.num_scored, greedy, encoded.cut)
