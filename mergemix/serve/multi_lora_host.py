"""The process of a `MultiLoraEngine`, and what runs inside its vLLM workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mergemix.serve.engine import Request
from mergemix.serve.vllm_answers import Stream
from mergemix.serve.vllm_host import Host, end_with_parent, open_connection, serve
from mergemix.serve.vllm_worker import MergeWorker

# Sums of magnitudes in fp64, in another order of elements.
CHECKSUM_TOLERANCE = 1e-9


class LoraHost(Host):
    """The methods that the parent may call, beside those of `Host`. An adapter is a pair (number, directory)."""

    def add_adapter(self, number: int, directory: str) -> tuple[list[str], bool]:
        """Load an adapter under a number that no other one had; then why it would not be applied as it is, and whether
        its numbers were compared, on every rank.
        """
        self._llm.llm_engine.add_lora(_lora_request(number, directory))
        reports = self.call_workers("mergemix_examine_adapter", number, directory)
        problems = [problem for report in reports for problem in report["problems"]]
        return problems, all(report["compared"] for report in reports)

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; vLLM may have done so already."""
        self._llm.llm_engine.remove_lora(number)

    def stream_with(
        self,
        forget: bool,
        new: Mapping[int, Request],
        numbers: Sequence[int],
        adapters: Sequence[tuple[int, str]],
    ) -> Stream:
        """As `stream`: all requests with each of the adapters as one batch, in the order of adapters, then requests."""
        asked = self._asked(forget, new, numbers)
        with_each = [_lora_request(*adapter) for adapter in adapters for _ in asked]
        return (yield from self._answers.stream(asked * len(adapters), with_each))


def _lora_request(number: int, directory: str) -> Any:
    """vLLM's prefix cache tells adapters apart by name and path, everything else in it by number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"mixture-{number}", number, directory)


class LoraWorker(MergeWorker):
    """vLLM's `worker_extension_cls`."""

    def mergemix_examine_adapter(self, number: int, directory: str) -> dict[str, Any]:
        """problems: what of the adapter that was loaded last vLLM would leave out, or does not hold as its file says.
        compared: whether its numbers were looked at, and not its names only.

        vLLM passes over names that it does not know without a word. With tensor parallelism, and for embeddings and
        the experts of a mixture-of-experts layer, only names are looked at: what a rank holds is cut or arranged
        otherwise. Numbers are compared by the sums of each factor and of its magnitudes.
        """
        from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

        manager = self.model_runner.lora_manager._adapter_manager
        loaded = manager.get_adapter(number)
        if loaded is None or number not in manager.lora_index_to_id:
            return {
                "problems": [f"vLLM did not load the adapter of mixture {number}"],
                "compared": False,
            }
        slot = manager.lora_index_to_id.index(number)
        problems = [
            f"{name}: vLLM has no place for LoRA there"
            for name in loaded.loras.keys() - manager.modules.keys()
        ]
        layers = [
            layer for name, layer in manager.modules.items()
            if name in loaded.loras and isinstance(layer, BaseLinearLayerWithLoRA)
        ]  # fmt: skip
        compared = all(layer.tp_size == 1 for layer in layers) and len(layers) == len(loaded.loras)
        if compared and not problems:
            dtype = self.model_runner.vllm_config.lora_config.lora_dtype
            for factor, stacks in (("lora_A", "lora_a_stacked"), ("lora_B", "lora_b_stacked")):
                held = _sums(part[slot] for layer in layers for part in getattr(layer, stacks))
                if not _agree(held, _sums(_stored(Path(directory), factor, dtype))):
                    problems.append(f"mixture {number}: vLLM's copies of {factor} are not those of its file")
        return {"problems": problems, "compared": compared}


def _stored(directory: Path, factor: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """All of an adapter's A or B, as rounded to `dtype`."""
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    return [tensor.to(dtype) for name, tensor in tensors.items() if f".{factor}." in name]


def _sums(factors: Iterable[torch.Tensor]) -> list[tuple[float, float]]:
    """(sum of magnitudes, sum) of each factor that is not zero, in the order of the former."""
    sums = [(float(each.double().abs().sum()), float(each.double().sum())) for each in factors]
    return sorted(each for each in sums if each[0])


def _agree(held: Sequence[tuple[float, float]], stored: Sequence[tuple[float, float]]) -> bool:
    return len(held) == len(stored) and all(
        max(abs(a - b) for a, b in zip(one, other, strict=True)) <= CHECKSUM_TOLERANCE * other[0]
        for one, other in zip(held, stored, strict=True)
    )


def main() -> None:
    end_with_parent(int(sys.argv[2]))
    serve(open_connection(int(sys.argv[1])), LoraHost())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as vllm_host: an interpreter with vLLM inside takes seconds to wind up


if __name__ == "__main__":
    main()
