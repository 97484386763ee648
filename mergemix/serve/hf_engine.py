"""The transformers engine: the fallback where vLLM is not installed, and the reference it is compared with."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mergemix.errors import ConfigError, EngineError, PoisonedEngineError
from mergemix.merge.blocks import Block, Piece, tensor_blocks
from mergemix.merge.plan import MergePlan, plan_merge
from mergemix.merge.sinks import ParameterSink, Sink
from mergemix.merge.stream import stream
from mergemix.mixture import Mixture
from mergemix.serve.dtypes import TORCH_DTYPES
from mergemix.serve.engine import (
    Engine,
    EngineSpec,
    Generate,
    Output,
    Request,
    Swap,
)
from mergemix.serve.hf_batches import answer_batch, batches, samples, score_batch
from mergemix.serve.hf_single import answer_as_lm_eval, checkpoint_generation_config
from mergemix.serve.memory_check import MemoryCheck
from mergemix.serve.tokens import Encoded, RequestEncoder, end_tokens, load_tokenizer

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 3


class HfEngine(Engine):
    """A transformers model in this process, on the GPU if there is one, in the checkpoints' dtype.

    swap_path: "in place" where every checkpoint tensor is a live parameter of the same name, shape and dtype,
    which the merge is then streamed into. "reload" where transformers converts at load (fused experts of
    MoE models): the merge is built in memory and a new model is loaded from it by transformers itself, so a
    swap needs memory for the weights twice. Nothing is written to disk on either path.
    """

    kind = "hf"

    def __init__(self, spec: EngineSpec, initial: Mixture) -> None:
        """Load `initial`. Raises EngineError when transformers cannot, and what plan_merge and stream raise."""
        self._family = spec.family
        self._verify = spec.verify_swaps
        root = spec.family.template.root
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = plan_merge(spec.family, [initial])
        self._config, self._model_class = _architecture(root)
        self._tokenizer = load_tokenizer(root)
        self._ends = end_tokens(root, self._tokenizer)
        max_model_len = _max_model_len(self._config, spec.max_model_len)
        # transformers needs no room for another token, and the last one is scored, not read.
        self._encoder = RequestEncoder(
            self._tokenizer, max_model_len, most_scored_as_lm_eval=max_model_len + 1
        )
        self._settings = _settings(root, self._config)
        self._model: Any = None
        staged = self._load(plan)
        self._live = _live_parameters(self._model, staged)
        self._check = MemoryCheck(spec.family)
        self.swap_path = "reload" if self._live is None else "in place"
        log.info("hf engine on %s; swaps go by %s", self._device, self.swap_path)

    def apply(self, mixture: Mixture) -> Swap:
        self._check_usable()
        begin = time.perf_counter()
        plan = plan_merge(self._family, [mixture])
        try:
            if self._live is None:
                self._model = None  # not three times the weights at once
                memory = {name: _bytes_of(tensor) for name, tensor in self._load(plan).items()}
            else:
                memory = self._live
                stream(plan, _sink(plan, memory))
            seconds = time.perf_counter() - begin
            if self._verify != "never":
                self._compare(mixture, memory)
        except BaseException as error:
            self.poisoned = True
            if not isinstance(error, Exception):
                raise
            raise PoisonedEngineError(f"the swap to {mixture} failed halfway: {error}") from error
        read = {"device": 0, "host": 0, "disk": plan.bytes_read}
        return Swap(seconds, plan.bytes_written, read, destinations=len(plan.tasks))

    def submit(self, requests: Sequence[Request]) -> list[Output]:
        """In batches; what is asked `as_lm_eval` one at a time (`hf_single`).

        Raises ConfigError for a request that cannot fit the model, whatever the others are.
        """
        self._check_usable()
        encoded = [self._encoder.encode(request) for request in requests]
        try:
            return self._answer(requests, encoded)
        except RuntimeError as error:  # out of memory, above all
            raise EngineError(f"the model failed to answer: {error}") from error

    def _answer(self, requests: Sequence[Request], encoded: Sequence[Encoded]) -> list[Output]:
        alone = {
            i: request for i, request in enumerate(requests) if request.as_lm_eval and not samples(request)
        }
        outputs = answer_as_lm_eval(self._model, self._tokenizer, self._ends, self._settings, alone, encoded)
        rest = [i for i in range(len(requests)) if i not in alone]
        vocab_size = self._config.get_text_config().vocab_size
        for places in batches([requests[i] for i in rest], [encoded[i] for i in rest], vocab_size):
            chosen = [rest[place] for place in places]
            prompts = [encoded[i].ids for i in chosen]
            if isinstance(requests[chosen[0]], Generate):
                asked = cast(list[Generate], [requests[i] for i in chosen])  # a batch is of one kind
                answers: Sequence[Output] = answer_batch(
                    self._model, self._tokenizer, self._ends, prompts, asked
                )
            else:
                answers = score_batch(self._model, prompts, [encoded[i].num_scored for i in chosen])
            for i, answer in zip(chosen, answers, strict=True):
                outputs[i] = replace(answer, cut=encoded[i].cut)
        return [outputs[i] for i in range(len(requests))]

    def checksum(self) -> str:
        """Hex SHA-256 over names and bytes of the live state dict, in the order of the names."""
        self._check_usable()
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(_bytes_of(tensor.cpu().contiguous()).numpy().data)
        return digest.hexdigest()

    def close(self) -> None:
        self._model = self._live = None
        self._check.close()

    def _compare(self, mixture: Mixture, memory: Mapping[str, torch.Tensor]) -> None:
        """Raise EngineError where the memory of the tensors, or a sample of it, is not what the reference gives."""
        wrong = self._check.mismatches(mixture, memory, sample=self._verify == "first")
        if wrong:
            raise EngineError(
                f"{', '.join(wrong[:SHOWN_PROBLEMS])}: the live weights differ from the reference"
            )

    def _check_usable(self) -> None:
        if self.poisoned:
            raise PoisonedEngineError("an earlier swap failed halfway: this engine must be rebuilt")
        if self._model is None:
            raise EngineError("this engine is closed")

    def _load(self, plan: MergePlan) -> dict[str, torch.Tensor]:
        """Merge in memory and let transformers make the model of it; returns the merged tensors by name.

        The model takes the tensors that it need not convert as its parameters, so they are never used again.
        """
        from transformers import GenerationConfig

        staged = {task.name: torch.empty(task.shape, dtype=TORCH_DTYPES[task.dtype]) for task in plan.tasks}
        stream(plan, _sink(plan, {name: _bytes_of(tensor) for name, tensor in staged.items()}))
        with _no_progress_bar(), _translated(self._family.template.root):
            model, info = self._model_class.from_pretrained(
                None,
                config=self._config,
                state_dict=dict(staged),
                output_loading_info=True,
                trust_remote_code=False,
            )
        absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if absent:
            raise EngineError(f"the checkpoints do not fit transformers' model: no weights for {absent[0]!r}")
        model.generation_config = GenerationConfig()  # the checkpoint's may sample, or penalise repetition
        self._model = model.to(self._device)
        return staged


def _architecture(root: Path) -> tuple[Any, Any]:
    """transformers' configuration of the checkpoint and its class for it; EngineError when it has none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _translated(root), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        return config, type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def _settings(root: Path, config: Any) -> Any:
    with _translated(root):
        return checkpoint_generation_config(root, config)


@contextmanager
def _translated(root: Path) -> Iterator[None]:
    """A config.json that makes no model fails anywhere in transformers and torch, with any exception."""
    try:
        yield
    except Exception as error:
        raise EngineError(
            f"transformers can make no causal language model of {root}: {type(error).__name__}: {error}"
        ) from error


def _max_model_len(config: Any, wanted: int | None) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        limit = wanted
    if limit is None:
        raise ConfigError("config.json does not say how many tokens the model takes; give max_model_len")
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len must be at most the model's {limit} tokens, but is {wanted}")
    return int(limit if wanted is None else wanted)


def _live_parameters(model: Any, staged: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The memory of each checkpoint tensor in the live model, flat, as uint8; None if not all of it is there.

    Every checkpoint tensor must be in a parameter or buffer of that name, bit for bit, no two in the same
    memory, and every parameter must be among them: then writing them all is the same as loading them.
    """
    state = model.state_dict()
    live: dict[str, torch.Tensor] = {}
    for name, tensor in staged.items():
        target = state.get(name)
        if target is None or target.dtype != tensor.dtype or target.shape != tensor.shape:
            return None
        if not target.is_contiguous() or not torch.equal(_bytes_of(target).cpu(), _bytes_of(tensor)):
            return None
        live[name] = _bytes_of(target)
    written = {view.data_ptr() for view in live.values() if view.numel()}
    wanted = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    distinct = len(written) == sum(1 for view in live.values() if view.numel())
    return live if distinct and wanted <= written else None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's own memory, flat, as uint8."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _sink(plan: MergePlan, memory: Mapping[str, torch.Tensor]) -> Sink:
    if all(view.device.type == "cpu" for view in memory.values()):
        return ParameterSink(plan, {name: view.numpy() for name, view in memory.items()})
    return DeviceSink(plan, memory)


class DeviceSink:
    """Live parameters that numpy cannot write: flat uint8 views on another device, filled block by block."""

    def __init__(self, plan: MergePlan, memory: Mapping[str, torch.Tensor]) -> None:
        self._plan = plan
        self._memory = memory

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        return tensor_blocks(self._plan, block_bytes)

    def target(self, block: Block, output: int) -> None:
        return None

    def write(self, block: Block, output: int, data: np.ndarray) -> None:
        self.rewrite(block.pieces[0], output, data)

    def rewrite(self, piece: Piece, output: int, data: np.ndarray) -> None:
        # Not asynchronous: the block's buffer is used again as soon as this returns.
        self._memory[piece.task.name][piece.begin : piece.begin + data.size].copy_(torch.from_numpy(data))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every load; a search may load at every swap."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
