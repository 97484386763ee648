"""Linear algebra on one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_entered = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """NumPy's and SciPy's linear algebra on one thread, where this is entered; as `@one_thread()` in a whole function.

    Matrices are small here: threads would get in each other's way (on cores that are shared, by a factor of ten), and
    the same numbers come out whatever the machine has.
    """
    if getattr(_entered, "already", False):  # a millisecond each time
        yield
        return
    import scipy.linalg  # noqa: F401  SciPy has a library of its own, and only what is loaded can be limited
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    _entered.already = True
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        _entered.already = False
