"""The process of a `MultiLoraEngine`, and what runs inside its vLLM workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mergemix.serve.engine import Output, Request
from mergemix.serve.vllm_host import Host, end_with_parent, serve
from mergemix.serve.vllm_worker import MergeWorker

# Sums of magnitudes in fp64, in another order of elements.
CHECKSUM_TOLERANCE = 1e-9


class LoraHost(Host):
    """The methods that the parent may call, beside those of `Host`. An adapter is a pair (number, directory)."""

    def add_adapter(self, number: int, directory: str) -> list[str]:
        """Load an adapter under a number that no other one had; then why it would not be applied as it is."""
        self._llm.llm_engine.add_lora(_lora_request(number, directory))
        reports = self.call_workers("mergemix_adapter_problems", number, directory)
        return [problem for report in reports for problem in report]

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; vLLM may have done so already."""
        self._llm.llm_engine.remove_lora(number)

    def submit_with(self, requests: Sequence[Request], adapters: Sequence[tuple[int, str]]) -> list[Output]:
        """All requests as one batch, each with the adapter of the same index, answered in their order."""
        return self.answer(requests, lora_request=[_lora_request(*adapter) for adapter in adapters])


def _lora_request(number: int, directory: str) -> Any:
    """vLLM's prefix cache tells adapters apart by name and path, everything else in it by number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"mixture-{number}", number, directory)


class LoraWorker(MergeWorker):
    """vLLM's `worker_extension_cls`."""

    def mergemix_adapter_problems(self, number: int, directory: str) -> list[str]:
        """What of the adapter that was loaded last vLLM would leave out, or does not hold as its file says.

        vLLM passes over names that it does not know without a word. With tensor parallelism, and for the experts of
        a mixture-of-experts layer, only names are looked at: each rank holds a part of B then.
        """
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        manager = self.model_runner.lora_manager._adapter_manager
        loaded = manager.get_adapter(number)
        if loaded is None or number not in manager.lora_index_to_id:
            return [f"vLLM did not load the adapter of mixture {number}"]
        slot = manager.lora_index_to_id.index(number)
        problems = [
            f"{name}: vLLM has no place for LoRA there"
            for name in loaded.loras.keys() - manager.modules.keys()
        ]
        layers = [
            layer for name, layer in manager.modules.items()
            if name in loaded.loras and isinstance(layer, BaseLinearLayerWithLoRA)
        ]  # fmt: skip
        if not problems and all(layer.tp_size == 1 for layer in layers) and len(layers) == len(loaded.loras):
            held = sum(_magnitude(part[slot]) for layer in layers for part in layer.lora_b_stacked)
            stored = _stored_magnitude(Path(directory), self.model_runner.vllm_config.lora_config.lora_dtype)
            if abs(held - stored) > CHECKSUM_TOLERANCE * stored:
                problems.append(f"mixture {number}: vLLM's copies of lora_B add up to {held}, not {stored}")
        return problems


def _stored_magnitude(directory: Path, dtype: torch.dtype) -> float:
    """The sum of the magnitudes of all of an adapter's B, as rounded to `dtype`."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    return sum(_magnitude(tensor.to(dtype)) for name, tensor in tensors.items() if ".lora_B." in name)


def _magnitude(tensor: torch.Tensor) -> float:
    return float(tensor.double().abs().sum())


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    serve(Connection(int(sys.argv[1])), LoraHost())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as vllm_host: an interpreter with vLLM inside takes seconds to wind up


if __name__ == "__main__":
    main()
