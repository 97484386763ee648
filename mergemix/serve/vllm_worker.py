"""What runs inside every vLLM worker: swaps, and the evidence that they worked (called with collective_rpc)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from mergemix.errors import EngineError
from mergemix.serve.swap_plan import same_bits
from mergemix.serve.transforms import Mark, Transformed, marks

PROBED_COLUMNS = 16


class MergeWorker:
    """vLLM's `worker_extension_cls`; arguments and results are plain values, since they cross processes."""

    model_runner: Any
    vllm_config: Any
    model_config: Any

    def mergemix_describe(self) -> dict[str, Any]:
        """This rank's plan: bytes_written by a swap, transformed modules, uncovered bytes by name, problems."""
        loaded = self._mergemix_loaded()
        return {
            "tensors": len(loaded.plan.copies),
            "bytes_written": loaded.plan.nbytes,
            "transformed": [entry.name for entry in loaded.transforms.modules],
            "uncovered": dict(loaded.uncovered),
            "problems": list(loaded.problems),
        }

    def mergemix_swap(self, coefficients: Sequence[float], check: str = "none") -> dict[str, Any]:
        """Write the merge with other coefficients into the live model.

        check: "none", "sample" or "all": how much of what was written is compared with the fp32 reference, and
        unless "none" every transformed module is examined. Returns seconds, bytes_written and problems (empty
        when all is well). Whatever it raises, the weights are then mixed.
        """
        begin = time.perf_counter()
        loaded = self._mergemix_loaded()
        plan = loaded.plan
        with torch.no_grad(), self._mergemix_context():
            self.mergemix_write(plan, coefficients)
            seconds = time.perf_counter() - begin
            problems = []
            if check != "none":
                bad = plan.mismatches(coefficients, sample=check == "sample")
                problems += [f"{name}: the live weights differ from the reference" for name in bad]
            before = [marks(entry.module) for entry in loaded.transforms.modules]
            begin = time.perf_counter()
            self.mergemix_reprocess(loaded.transforms)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += time.perf_counter() - begin
            if check != "none":
                for entry, old in zip(loaded.transforms.modules, before, strict=True):
                    problems += examine(entry, old)
        return {"seconds": seconds, "bytes_written": plan.nbytes, "problems": problems}

    def mergemix_write(self, plan: Any, coefficients: Sequence[float]) -> None:
        plan.write(coefficients)

    def mergemix_reprocess(self, transforms: Any) -> None:
        transforms.reprocess()

    def _mergemix_loaded(self) -> Any:
        loaded = getattr(self.model_runner.get_model(), "mergemix", None)
        if loaded is None:
            raise EngineError("this engine was not loaded with load_format mergemix")
        return loaded

    @contextmanager
    def _mergemix_context(self) -> Iterator[None]:
        """What vLLM processes weights under when it loads."""
        from vllm.config import set_current_vllm_config

        from mergemix.serve.vllm_loader import default_dtype

        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(self.vllm_config))
            stack.enter_context(default_dtype(self.model_config.dtype))
            stack.enter_context(torch.device(self.vllm_config.device_config.device))
            yield


def examine(entry: Transformed, before: dict[Any, Mark]) -> list[str]:
    """Why the module does not use its new weights, as far as can be seen from outside; empty when it does.

    before: its state ahead of the swap. What processing makes must have been made anew, and a linear layer must
    give back the very columns of its raw weight.
    """
    after = marks(entry.module)
    on_cpu = all(raw.data.device.type == "cpu" for raw in entry.raw)
    problems = [
        f"{entry.name}.{key[1]}: it was not made anew from the new weights"
        for key in entry.changed
        if on_cpu and key in before and key in after and _is_stale(before[key], after[key])
    ]
    if not _gives_back_columns(entry):
        problems.append(f"{entry.name}: it does not compute with its new weights")
    return problems


def _is_stale(before: Mark, after: Mark) -> bool:
    """Whether this is the same product of processing as before: a packed tensor, a closure, a kernel object.

    Constants (numbers, classes, functions that close over nothing) hold no weights.
    """
    value = after.value
    if isinstance(value, torch.Tensor):
        return value.numel() > 0 and after.token == before.token
    if value is None or isinstance(value, (bool, int, float, str, type, torch.dtype)):
        return False
    if isinstance(value, (FunctionType, BuiltinFunctionType)) and not getattr(value, "__closure__", None):
        return False
    return value is before.value


def _gives_back_columns(entry: Transformed) -> bool:
    """One-hot inputs through the layer's own kernel: every output is one weight, exactly."""
    module: nn.Module = entry.module
    weights = [raw.data for raw in entry.raw if raw.name == "weight" and raw.data.dim() == 2]
    method: Any = getattr(module, "quant_method", None)
    if not weights or not hasattr(method, "apply") or not weights[0].is_floating_point():
        return True
    weight = weights[0]
    generator = torch.Generator(device="cpu").manual_seed(0)  # vLLM's own generator stays as it is
    columns = torch.randperm(weight.shape[1], generator=generator, device="cpu")[:PROBED_COLUMNS].to(
        weight.device
    )
    inputs = torch.zeros(len(columns), weight.shape[1], dtype=weight.dtype, device=weight.device)
    inputs[torch.arange(len(columns), device=weight.device), columns] = 1
    outputs = method.apply(module, inputs, bias=None)
    # Adding 0.0 turns -0.0, which a kernel may give or not, into 0.0.
    return same_bits(outputs.to(weight.dtype) + 0.0, weight[:, columns].t().contiguous() + 0.0)
