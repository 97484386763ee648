"""lm-eval's model interface over our engines: its instances become requests in token ids, and outputs its responses.

Text becomes ids as in `lm_eval/models/huggingface.py` and `lm_eval/models/vllm_causallms.py`, which differ in what
fits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mergemix.errors import BenchmarkError, CheckpointError, EngineError
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Output, Request

DEFAULT_MAX_GEN_TOKS = 256  # of both of lm-eval's models
# Generation arguments with a meaning here; others are refused unless they ask for nothing.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
_NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "top_k": (None, 0, -1),
    "use_cache": (True,),
}


class EngineLM(TemplateLM):
    """A model for lm-eval that an engine answers.

    kind: whose limits hold. vLLM must generate a token after every prompt and so takes less text at once.
    submit: an engine's; None where requests are only made, as when a task is loaded.
    """

    def __init__(
        self,
        root: Path,
        kind: Literal["hf", "vllm"],
        max_model_len: int | None = None,
        submit: Callable[[Sequence[Request]], Sequence[Output]] | None = None,
    ) -> None:
        """Load the tokenizer of the checkpoint in `root`. Raises CheckpointError when it or config.json is no good."""
        from transformers import AutoConfig, AutoTokenizer

        super().__init__()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
            config = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        except Exception as error:  # damaged files end in anything at all
            raise CheckpointError(f"no tokenizer could be loaded from {root}: {error}") from error
        self.root = root
        self.kind = kind
        self.max_length = max_model_len or resolve_max_length(config, self.tokenizer)
        self._submit = submit

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        prefix = self.tokenizer.eos_token_id if bos is None else bos
        if prefix is None:
            raise CheckpointError(f"the tokenizer in {self.root} has neither a BOS nor an EOS token")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with the tokenizer's own special tokens unless the text begins with the prefix token already."""
        if add_special_tokens is None:
            return self._encode(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _encode(self, text: str, prefix: str | None) -> list[int]:
        if not text and self.kind == "vllm":
            return []
        options = {"add_special_tokens": False} if has_bos_prefix(text, prefix) else {}
        return self.tokenizer.encode(text, **options)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as one text; the system's turn is dropped where the template refuses one, as lm-eval does."""

        def render(turns: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            return render([turn for turn in chat_history if turn["role"] != "system"])

    # What an instance asks, and what an engine's outputs answer

    def requests_of(self, instances: Sequence[Instance]) -> list[tuple[Request, ...]]:
        """For each instance what an engine is asked. Instances of sampled answers that come again get other seeds.

        Raises BenchmarkError for generation arguments that no engine knows.
        """
        seen: Counter[tuple[Any, ...]] = Counter()
        found: list[tuple[Request, ...]] = []
        for instance in instances:
            if instance.request_type == "loglikelihood":
                # Ends in _loglikelihood_tokens below, which gives requests.
                found.append(tuple(super().loglikelihood([instance], disable_tqdm=True)))
            elif instance.request_type == "loglikelihood_rolling":
                found.append(tuple(self._windows(*instance.args)))
            else:
                place = (instance.task_name, instance.doc_id, instance.idx)
                found.append((self._generation(instance, seen[place]),))
                seen[place] += 1
        return found

    def response_of(self, instance: Instance, outputs: Sequence[Output]) -> Any:
        """lm-eval's response from the outputs of `requests_of`. Raises EngineError when one is no usable answer."""
        if instance.request_type == "generate_until":
            (generated,) = outputs
            if not isinstance(generated, Generated):
                raise EngineError(f"the engine answered a generation with {type(generated).__name__}")
            return postprocess_generated_text(generated.text, self._until(instance.args[1]), None)
        likelihoods = []
        for output in outputs:
            if not isinstance(output, Likelihood):
                raise EngineError(f"the engine answered a log-likelihood with {type(output).__name__}")
            if not math.isfinite(output.logprob):
                raise EngineError(
                    f"a log-likelihood must be finite, but is {output.logprob} in document {instance.doc_id} of "
                    f"{instance.task_name}: the merged weights give no usable probabilities"
                )
            likelihoods.append(output)
        if instance.request_type == "loglikelihood":
            (likelihood,) = likelihoods
            return likelihood.logprob, likelihood.is_greedy
        return sum(likelihood.logprob for likelihood in likelihoods)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[LogLikelihood]:
        return [
            LogLikelihood(tuple(context), tuple(scored), as_lm_eval=True) for _, context, scored in requests
        ]

    def _windows(self, text: str) -> Iterable[LogLikelihood]:
        longest = self.max_length if self.kind == "hf" else self.max_length - 2
        windows = get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=longest, context_len=1
        )
        for context, scored in map(make_disjoint_window, windows):
            yield LogLikelihood(tuple(context), tuple(scored), as_lm_eval=True)

    def _until(self, arguments: dict[str, Any]) -> list[str]:
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        return handle_stop_sequences(normalize_gen_kwargs(arguments).pop("until", None), eos=eos)

    def _generation(self, instance: Instance, repeat: int) -> Generate:
        context, given = instance.args
        where = f"lm_eval:{instance.task_name}"
        arguments: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_MAX_GEN_TOKS))
        for key, value in arguments.items():
            if key not in _KNOWN and value not in _NOTHING.get(key, ()):
                raise BenchmarkError(
                    f"{where}: generation_kwargs may hold {', '.join(sorted(_KNOWN))}, but has {key}: {value!r}, which "
                    "no engine here can do; take it out of the task"
                )
        temperature = float(arguments.get("temperature", 0.0))
        if arguments["do_sample"] and temperature == 0:
            raise BenchmarkError(
                f"{where}: do_sample needs a temperature above 0 in generation_kwargs, but it is 0; give one, or leave "
                "do_sample out for greedy answers"
            )
        if not 0 < arguments["max_gen_toks"] < self.max_length:
            raise BenchmarkError(
                f"{where}: max_gen_toks must be at least 1 and less than the model's length of {self.max_length} "
                f"tokens, but is {arguments['max_gen_toks']}; set it in the task's generation_kwargs"
            )
        # lm-eval's two models look for different texts at the beginning of a prompt.
        prefix = (
            self.tokenizer.bos_token if self.kind == "hf" else self.tokenizer.decode(self.prefix_token_id)
        )
        asked = Generate(
            tuple(self._encode(context, prefix)),
            arguments["max_gen_toks"],
            tuple(self._until(given)),
            as_lm_eval=True,
        )
        if temperature == 0:
            return asked
        seed = int(instance.doc_id or 0) * int(instance.repeats or 1) + repeat
        return replace(asked, temperature=temperature, top_p=float(arguments.get("top_p", 1.0)), seed=seed)

    # lm-eval's own interface, for its `simple_evaluate`

    def _answers(self, instances: Sequence[Instance]) -> list[Any]:
        if self._submit is None:
            raise EngineError("this model has no engine to ask")
        asked = self.requests_of(instances)
        outputs = iter(self._submit([request for requests in asked for request in requests]))
        return [
            self.response_of(instance, [next(outputs) for _ in requests])
            for instance, requests in zip(instances, asked, strict=True)
        ]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._answers(requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._answers(requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._answers(requests)
