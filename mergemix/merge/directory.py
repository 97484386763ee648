"""`mergemix merge` and `mergemix average`: mixtures in, checkpoint directories out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergemix import __version__
from mergemix.checkpoints.family import Family
from mergemix.checkpoints.writer import check_output
from mergemix.merge.plan import MergePlan, plan_merge
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
    return _merge(family, {".": mixture}, out, memory_bytes, progress)


def merge_many(
    family: Family,
    mixtures: Mapping[str, Mixture],
    out: Path,
    *,
    memory_bytes: int = 256 << 20,
    progress: Callable[[int], None] | None = None,
) -> MergeStats:
    """Write one checkpoint per mixture, `out`/<name>, from a single read of the experts; otherwise as above.

    `out` appears when all of them are whole.
    """
    return _merge(family, mixtures, out, memory_bytes, progress)


def _merge(
    family: Family,
    mixtures: Mapping[str, Mixture],
    out: Path,
    memory_bytes: int,
    progress: Callable[[int], None] | None,
) -> MergeStats:
    check_output(out)
    plan = plan_merge(family, list(mixtures.values()))
    records = [_record(family, plan, mixture) for mixture in mixtures.values()]
    with SafetensorsSink(out, plan, family.template, names=list(mixtures), records=records) as sink:
        return stream(plan, sink, memory_bytes=memory_bytes, progress=progress)


def _record(family: Family, plan: MergePlan, mixture: Mixture) -> dict[str, Any]:
    """What a reader of the directory needs to know to make it again: mergemix.json."""
    members = {
        member.name: {"source": member.source, "revision": member.revision}
        for member in family.members
        if member.name in plan.operand_names
    }
    return {"mergemix": __version__, **mixture.describe(), "checkpoints": members}
