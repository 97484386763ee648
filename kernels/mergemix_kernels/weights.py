"""What every backend does with the weights before it touches an element."""

from collections.abc import Sequence

import numpy as np

MAX_SOURCES = 1024  # all checkpoints of a long run can be averaged; tables are sized by what a call brings
MAX_OUTPUTS = 8  # of one GPU launch; the CPU has no limit


def active_weights(weights: Sequence[float], source_count: int) -> tuple[list[int], np.ndarray]:
    """Round the weights to fp32 and drop the zeros: indices of the sources that count, and their weights.

    A source of weight zero is skipped as if it were absent: it is not read, its NaN or Inf does not
    spread, and -0.0 of a one-hot source survives (-0.0 + 0.0 would be +0.0). A weight so small that it
    rounds to zero in fp32 counts as zero.

    Raises ValueError unless 1 <= source_count <= MAX_SOURCES, there is one finite weight per source, and at least
    one of them is not zero.
    """
    if not 1 <= source_count <= MAX_SOURCES:
        raise ValueError(f"the number of sources must be from 1 to {MAX_SOURCES}, but got {source_count}")
    if len(weights) != source_count:
        raise ValueError(f"there must be one weight per source, but got {len(weights)} for {source_count}")
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.asarray(weights, dtype=np.float64).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise ValueError(f"weights must be finite in fp32, but got {list(weights)}")
    active = np.flatnonzero(rounded)
    if active.size == 0:
        raise ValueError(f"at least one weight must not be zero in fp32, but got {list(weights)}")
    return active.tolist(), rounded[active]
