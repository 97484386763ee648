"""A mixture as a transformers model in memory, for what an engine cannot tell: gradients, and a router's choices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mergemix.checkpoints.family import Family
from mergemix.errors import EngineError
from mergemix.merge.plan import plan_merge
from mergemix.merge.sinks import ParameterSink
from mergemix.merge.stream import stream
from mergemix.mixture import Mixture
from mergemix.serve.dtypes import TORCH_DTYPES


def load_model(family: Family, mixture: Mixture, *, dtype: torch.dtype | None = None) -> Any:
    """The mixture's model, in evaluation mode, its parameters without gradients; on the GPU where there is one.

    dtype: of its parameters; None: the checkpoints'. Attention and experts are computed in plain operations, which can
    be differentiated twice. Memory: the merged weights, and the model's own.
    Raises EngineError when transformers has no causal language model of these checkpoints, and as `stream`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    root = family.template.root
    plan = plan_merge(family, [mixture])
    staged = {task.name: torch.empty(task.shape, dtype=TORCH_DTYPES[task.dtype]) for task in plan.tasks}
    memory = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in staged.items()}
    stream(plan, ParameterSink(plan, memory))
    try:
        config = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
        with _no_progress_bar():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=staged,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # a config.json that makes no model fails with anything at all
        raise EngineError(
            f"transformers can make no causal language model of {root}: {type(error).__name__}: {error}"
        ) from error
    absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if absent:
        raise EngineError(f"the checkpoints do not fit transformers' model: no weights for {absent[0]!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every load."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
