"""`mergemix merge`: one mixture, one directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mergemix.checkpoints.family import Family
from mergemix.checkpoints.writer import check_output
from mergemix.merge.plan import plan_merge
from mergemix.merge.sinks import SafetensorsSink
from mergemix.merge.stream import MergeStats, stream
from mergemix.mixture import Mixture


def merge_to_directory(
    family: Family,
    mixture: Mixture,
    out: Path,
    *,
    memory_bytes: int = 256 << 20,
    progress: Callable[[int], None] | None = None,
) -> MergeStats:
    """Write the merge of `family` by `mixture` to the new directory `out`, a whole Hugging Face checkpoint.

    memory_bytes, progress: as for `stream`. Raises OutputError when `out` exists or cannot be written
    (nothing is left behind), and what plan_merge and stream raise.
    """
    check_output(out)
    plan = plan_merge(family, mixture)
    with SafetensorsSink(out, plan, family.template) as sink:
        return stream(plan, sink, memory_bytes=memory_bytes, progress=progress)
