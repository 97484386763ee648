"""A worker extension whose swaps stop halfway on request, for tests of who must notice."""

from __future__ import annotations

from typing import Any

from mergemix.serve.vllm_worker import MergeWorker


class HalfwayWorker(MergeWorker):
    """After mergemix_fail_halfway the next swap writes the raw weights, and fails before vLLM processes them."""

    mergemix_fails = False

    def mergemix_fail_halfway(self) -> None:
        self.mergemix_fails = True

    def mergemix_reprocess(self, *arguments: Any) -> None:
        if self.mergemix_fails:
            raise RuntimeError("injected")
        super().mergemix_reprocess(*arguments)
