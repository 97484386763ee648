"""Where an engine's output goes, and what of it a user is told."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergemix.errors import OutputError
from mergemix.serve.engine_log import EngineLog, find_reason

LOG = """\
INFO 11-22 15:24:19 [model.py:2152] Using max model len 256
(Worker pid=11280) ERROR 11-22 15:24:48 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker pid=11280) ERROR 11-22 15:24:48 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=11280) ERROR 11-22 15:24:48 [multiproc_executor.py:953]     raise NonFiniteError(
(Worker pid=11280) ERROR 11-22 15:24:48 [multiproc_executor.py:953] {raised}
(EngineCore pid=11166) ERROR 11-22 15:24:52 [core.py:1] Exception: WorkerProc initialization failed due to an exception
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            "mergemix.errors.NonFiniteError: tensor 'x' holds NaN or Inf in code",
            "tensor 'x' holds NaN or Inf in code",
        ),
        ("ValueError: Available memory on node 0 is less", "ValueError: Available memory on node 0 is less"),
        ("torch.OutOfMemoryError: CUDA out of memory", "OutOfMemoryError: CUDA out of memory"),
        ("nothing to see", None),
    ],
)
def test_the_reason_is_the_first_exception_that_is_no_echo(raised: str, reason: str | None) -> None:
    assert find_reason(LOG.format(raised=raised)) == reason
    assert find_reason("") is None


def run(log: EngineLog, text: str) -> None:
    script = f"import sys; print('out', flush=True); print({text!r}, file=sys.stderr)"
    subprocess.run([sys.executable, "-c", script], stdout=log.fileno, stderr=log.fileno, check=True)
    log.release()


def test_a_file_is_appended_to_and_only_what_is_new_gives_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made" / "engine.log"
    run(EngineLog(path), "ValueError: an old story")
    log = EngineLog(path)
    assert log.reason() is None
    run(log, "ValueError: a new one")
    assert log.reason() == "ValueError: a new one"
    assert path.read_text().splitlines() == [
        "out",
        "ValueError: an old story",
        "out",
        "ValueError: a new one",
    ]
    assert capfd.readouterr() == ("", "")


def test_without_a_file_both_streams_reach_stderr_and_the_reason_is_known(
    capfd: pytest.CaptureFixture[str],
) -> None:
    log = EngineLog(None)
    run(log, "ValueError: told")
    deadline = time.monotonic() + 10
    while log.reason() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.reason() == "ValueError: told"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["out", "ValueError: told"]


def test_a_log_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="engine's log"):
        EngineLog(tmp_path / "file" / "engine.log")
