"""A worker extension that breaks swaps on request, for tests of what notices it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergemix.serve.swap_plan import Change, SwapPlan
from mergemix.serve.transforms import Transformed, Transforms
from mergemix.serve.vllm_worker import MergeWorker

FAULTS = ("none", "lost tensor", "stale module", "old closure", "kernel kept", "fails halfway")


class FaultyWorker(MergeWorker):
    """mergemix_set_fault says what goes wrong from then on, and in which module."""

    mergemix_fault = "none"
    mergemix_victim = ""

    def mergemix_set_fault(self, fault: str, victim: str = "") -> None:
        assert fault in FAULTS
        self.mergemix_fault, self.mergemix_victim = fault, victim

    def mergemix_write(self, plan: SwapPlan, change: Change) -> dict[str, int]:
        lost = max(plan.moving, key=lambda copy: copy.nbytes)  # so that a sample is sure to meet it
        before = lost.destination.clone()
        read = super().mergemix_write(plan, change)
        if self.mergemix_fault == "lost tensor":
            lost.destination.copy_(before)
        return read

    def mergemix_reprocess(self, transforms: Transforms, modules: Sequence[Transformed]) -> None:
        entries = list(modules)
        victims = [entry for entry in entries if entry.name.endswith(self.mergemix_victim)]
        others = [entry for entry in entries if entry not in victims]
        if self.mergemix_fault == "fails halfway":
            super().mergemix_reprocess(transforms, entries[: len(entries) // 2])
            raise RuntimeError("injected")
        if self.mergemix_fault == "stale module":
            assert victims
            entries = others
        if self.mergemix_fault == "kernel kept":  # vLLM then skips the packing of fused experts
            kept = [
                replace(entry, changed=frozenset(key for key in entry.changed if key[0] != "quant_method"))
                for entry in victims
            ]
            assert kept
            entries = others + kept
        closures = {entry.name: vars(entry.module).get("cpu_linear") for entry in victims}
        super().mergemix_reprocess(transforms, entries)
        if self.mergemix_fault == "old closure":
            assert victims
            for entry in victims:
                entry.module.cpu_linear = closures[entry.name]
