"""Starting an engine: choose its kind, start it, prove its swaps, and fall back when they are not right."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mergemix.errors import ConfigError, EngineError, ProofError
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, EngineSpec
from mergemix.serve.proof import distance, known_problems, probe, prove
from mergemix.serve.restarting import RestartingEngine

log = logging.getLogger(__name__)

SHOWN_PROBLEMS = 3


def resolve_kind(kind: str) -> Literal["vllm", "hf"]:
    """What `kind` (auto, vllm, hf) stands for on this machine. Raises ConfigError when it cannot run here."""
    installed = importlib.util.find_spec("vllm") is not None
    if kind not in ("auto", "vllm", "hf"):
        raise ConfigError(f"engine must be auto, vllm or hf, but is {kind!r}")
    if kind == "vllm" and not installed:
        raise ConfigError("the vllm engine needs vLLM: pip install 'mergemix[vllm]', or take --engine hf")
    return "vllm" if installed and kind != "hf" else "hf"


def start_engine(spec: EngineSpec, initial: Mixture) -> Engine:
    """A live engine of the spec's kind that holds `initial`; its swaps are not proven yet."""
    kind = resolve_kind(spec.kind)
    if spec.lora_in_flight:
        if kind != "vllm":
            raise ConfigError(
                f"lora_in_flight {spec.lora_in_flight} needs vLLM's multi-LoRA: pip install 'mergemix[vllm]', or take "
                "lora_in_flight 0, which folds adapters into the weights"
            )
        from mergemix.serve.multi_lora import MultiLoraEngine

        return MultiLoraEngine(spec, initial)
    if kind == "vllm":
        from mergemix.serve.vllm_engine import VllmEngine

        return VllmEngine(spec, initial)
    from mergemix.serve.hf_engine import HfEngine

    return HfEngine(replace(spec, kind="hf"), initial)  # which refuses what is for vLLM


def open_engine(spec: EngineSpec, initial: Mixture) -> Engine:
    """Start an engine on `initial` and prove that its swaps give the weights they should.

    An engine that serves mixtures as adapters swaps nothing: it compares each adapter as it loads it, whatever
    verify_swaps says. With verify_swaps "never" nothing is proven, and `proven` stays False. When swaps are not right,
    the engine that is returned starts anew for every mixture instead: slow, and its `proven` is False.
    Raises ConfigError, EngineError (it does not start), ProofError (not even that is right).
    """
    engine = start_engine(spec, initial)
    if spec.lora_in_flight:
        return engine
    evidence = None
    unverified = spec.verify_swaps == "never"
    try:
        if unverified:
            problems: Sequence[str] = known_problems(engine)
        else:
            evidence = prove(engine, initial)
            problems = evidence.problems
        if not problems:
            engine.proven = not unverified
            if unverified:
                log.warning(
                    "live swaps are not verified (verify_swaps is never): no score of this engine is proven to be right"
                )
            return engine
    except EngineError as error:
        problems = [str(error)]
    except BaseException:
        engine.close()
        raise
    engine.close()
    log.warning(
        "live swaps are not right with this model, so every candidate gets a fresh engine, which is slow: %s",
        "; ".join(problems[:SHOWN_PROBLEMS]),
    )
    fallback = RestartingEngine(lambda mixture: start_engine(spec, mixture), initial)
    if evidence is not None and distance(evidence.initial, probe(fallback)) > evidence.tolerance:
        fallback.close()
        raise ProofError(
            f"two fresh loads of {initial} answer differently, so no score could be trusted; swaps are wrong too: "
            + "; ".join(problems[:SHOWN_PROBLEMS])
        )
    return fallback
