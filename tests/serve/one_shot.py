"""A worker extension with a fault that is armed by a file, so that it can outlive the engine that it breaks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from mergemix.serve.swap_plan import Change, SwapPlan
from mergemix.serve.transforms import Transformed, Transforms
from mergemix.serve.vllm_worker import MergeWorker

DIRECTORY = "MERGEMIX_TEST_FAULTS"  # environment variable: where the file is
Stage = Literal["before reading", "writing", "written", "reprocessing", "reprocessed", "prefix cache"]
STAGES: tuple[Stage, ...] = (
    "before reading",
    "writing",
    "written",
    "reprocessing",
    "reprocessed",
    "prefix cache",
)


@dataclass(frozen=True)
class Fault:
    """What happens at a stage of the swap to the mixture with this key, in one rank, as often as `times` says.

    how: "raise", "kill" (SIGKILL of the worker's process), "wait" (a second); silently "lose" the largest tensor that
    was written, leave a module "stale", or "corrupt" the memory of the cache. `stage` matters to the first three only.
    """

    key: str
    how: Literal["raise", "kill", "wait", "lose", "stale", "corrupt"]
    stage: Stage = "written"
    rank: int = 0
    times: int = 1

    def arm(self, directory: Path) -> None:
        beside = directory / "fault.partial"
        beside.write_text(json.dumps(asdict(self)))
        beside.replace(directory / "fault.json")


def armed(directory: Path) -> Fault | None:
    path = directory / "fault.json"
    return Fault(**json.loads(path.read_text())) if path.exists() else None


class OneShotWorker(MergeWorker):
    """What goes wrong is taken from the file at the beginning of each swap."""

    rank: int
    mergemix_fault: Fault | None = None

    def mergemix_pid(self) -> int:
        return os.getpid()

    def mergemix_write(self, plan: SwapPlan, change: Change) -> dict[str, int]:
        fault = armed(Path(os.environ[DIRECTORY]))
        mine = fault is not None and (fault.key, fault.rank) == (change.mixture.key(), self.rank)
        self.mergemix_fault = fault if mine else None
        self._mergemix_reach("before reading")
        if self._mergemix_expects("writing"):
            super().mergemix_write(plan, halved(change))
        self._mergemix_reach("writing")
        lost = max(plan.moving, key=lambda copy: copy.nbytes)
        before = lost.destination.clone()
        if self._mergemix_silently("corrupt"):
            kept = plan.cache.tiers.index("device")
            for operand in range(plan.cache.filled.shape[1]):
                slot = plan.cache.slot(kept, operand)
                assert slot is not None
                slot.neg_()
        read = super().mergemix_write(plan, change)
        if self._mergemix_silently("lose"):
            lost.destination.copy_(before)
        return read

    def mergemix_reprocess(self, transforms: Transforms, modules: Sequence[Transformed]) -> None:
        self._mergemix_reach("written")
        entries = list(modules)
        if self._mergemix_silently("stale"):
            entries = [entry for entry in entries if not entry.name.endswith("o_proj")]
            assert len(entries) < len(modules)
        if self._mergemix_expects("reprocessing"):
            super().mergemix_reprocess(transforms, entries[: len(entries) // 2])
        self._mergemix_reach("reprocessing")
        super().mergemix_reprocess(transforms, entries)
        self._mergemix_reach("reprocessed")
        if self._mergemix_expects("prefix cache"):
            self._mergemix_break_prefix_cache()

    def _mergemix_expects(self, stage: Stage) -> bool:
        fault = self.mergemix_fault
        return fault is not None and fault.stage == stage and fault.how in ("raise", "kill", "wait")

    def _mergemix_reach(self, stage: Stage) -> None:
        """Do what is to happen at this stage."""
        if not self._mergemix_expects(stage):
            return
        how = self._mergemix_use_up()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "raise":
            raise RuntimeError(f"injected: {stage}")
        time.sleep(1.0)

    def _mergemix_silently(self, how: str) -> bool:
        if self.mergemix_fault is None or self.mergemix_fault.how != how:
            return False
        self._mergemix_use_up()
        return True

    def _mergemix_use_up(self) -> str:
        """Count the fault, before it happens; returns how."""
        fault, directory = self.mergemix_fault, Path(os.environ[DIRECTORY])
        assert fault is not None
        if fault.times > 1:
            replace(fault, times=fault.times - 1).arm(directory)
        else:
            (directory / "fault.json").unlink()
        return fault.how

    def _mergemix_break_prefix_cache(self) -> None:
        """Of a vLLM that runs in this very process: it refuses, or is killed, when it is told to drop the cache."""
        from vllm.v1.core.block_pool import BlockPool

        how = self._mergemix_use_up()

        def reset(pool: BlockPool) -> bool:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return False  # as vLLM does while blocks are in use

        BlockPool.reset_prefix_cache = reset  # type: ignore[method-assign]


def halved(change: Change) -> Change:
    """Its first writes, and of one of them the first destinations."""
    first, last = change.writes[: len(change.writes) // 2], change.writes[len(change.writes) // 2]
    half = replace(last, copies=last.copies[: max(1, len(last.copies) // 2)])
    return replace(change, writes=(*first, half))
