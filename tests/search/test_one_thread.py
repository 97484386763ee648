"""Linear algebra on one thread, and what is left of it after."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import numpy
from mergemix.search.one_thread import one_thread
assert "scipy" not in sys.modules, "the case that matters: SciPy is not loaded yet"
from threadpoolctl import threadpool_info

def threads():
    return {each["filepath"]: each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

@one_thread()
def inside():
    with one_thread():
        pass
    import scipy.linalg
    return threads()

found = {"inside": inside()}
found["after"] = threads()
print(json.dumps({**found, "again": inside()}))
"""


def test_every_library_is_held_to_one_thread_and_let_go_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env={"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found["inside"]) >= 2, "NumPy and SciPy bring a library each"
    assert set(found["inside"].values()) == {1}
    assert set(found["after"].values()) == {2}
    assert set(found["again"].values()) == {1}
