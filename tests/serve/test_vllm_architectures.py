"""Every architecture of the table, with a real vLLM: a swapped engine answers as a fresh one on the merge on disk.

Equality is exact: texts, and log-probabilities to the last bit. Fresh means plain vLLM with its own loader, in a
process that starts on the merged checkpoint and ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mergemix.checkpoints.family import open_family
from mergemix.merge import merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from tests.serve.architectures import ARCHITECTURES, Architecture, write_family

ROOT = Path(__file__).parents[2]
SWAPS = 10
RESTARTS = 3
LIMIT_S = 540
TWO_RANKS = ("llama_untied", "qwen3_moe")
CASES: dict[str, tuple[Architecture, int]] = {
    **{name: (architecture, 1) for name, architecture in ARCHITECTURES.items()},
    **{f"{name}-2-ranks": (ARCHITECTURES[name], 2) for name in TWO_RANKS},
}
SERVED = [name for name, (architecture, _) in CASES.items() if architecture.refused is None]
REFUSED = [name for name in CASES if name not in SERVED]

# Nats, of a whole continuation. bf16 gives 0.1 where sums are taken in another order; wrong weights give several.
ROUNDING = 0.2


def mixtures(names: tuple[str, ...]) -> list[Mixture]:
    """An expert, a mixture, one whose weights do not sum to one, and one with other weights for a layer."""
    return [
        Mixture.one_hot(names, names[1]),
        Mixture(names, (0.2, 0.5, 0.3)),
        Mixture(names, (0.9, -0.2, 0.1)),
        Mixture(names, (0.2, 0.5, 0.3), (LayerGroup(("*.layers.1.*",), (0.0, 0.0, 0.8)),)),
    ]


def swap_order(name: str) -> list[int]:
    """Which of the mixtures the engine is swapped to in turn: each at least twice, in random order."""
    architecture, _ = CASES[name]
    chooser = random.Random(name)
    if not architecture.replayable:
        return chooser.sample(range(4), RESTARTS)
    order = [*range(4), *range(4), *chooser.sample(range(4), SWAPS - 8)]
    chooser.shuffle(order)
    return order


class Engines:
    """The processes that run the cases of some rows, all started at once; `find` waits for what one found."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        cases = [case for name in names for case in cases_of(name, directory / name)]
        models = {model for case in cases for model in case.pop("architectures")}
        task = {"architectures": sorted(models), "cases": cases}
        (directory / "task.json").write_text(json.dumps(task))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",  # a core each
        }
        self._directory, self._log = directory, directory / "server.log"
        with self._log.open("w") as out:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.serve.many_engines", "task.json", "."],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def find(self, case: str) -> dict[str, Any]:
        found = self._directory / f"{case}.json"
        deadline = time.monotonic() + LIMIT_S
        while True:
            ended = self._server.poll() is not None
            if found.exists():
                return json.loads(found.read_text())
            assert not ended, f"the engines ended before {case}: {self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"{case} took more than {LIMIT_S} s"
            time.sleep(0.1)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """All cases of the tests that were selected."""
    selected = {
        item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")
    }
    names = [name for name in CASES if name in selected]
    engines = Engines(names, tmp_path_factory.mktemp("architectures"))
    yield engines
    engines.stop()


def cases_of(name: str, directory: Path) -> Iterator[dict[str, Any]]:
    """A fresh plain vLLM on each mixture's merge, and the live engine; writes all checkpoints."""
    architecture, ranks = CASES[name]
    paths = write_family(directory, architecture)
    experts = {key: str(path) for key, path in paths.items() if key != "base"}
    family = open_family(str(paths["base"]), experts)
    options = {**architecture.options, **({"tensor_parallel_size": ranks} if ranks > 1 else {})}
    common = {
        "options": options,
        "environment": architecture.environment,
        "architectures": json.loads((paths["base"] / "config.json").read_text())["architectures"],
    }
    for index, mixture in enumerate(mixtures(family.names)):
        root = directory / f"merged-{index}"
        merge_to_directory(family, mixture, root)
        yield {**common, "name": f"{name}-plain-{index}", "role": "plain", "arguments": {"root": str(root)}}
    arguments = {
        "base": str(paths["base"]),
        "experts": experts,
        "mixtures": [mixture.key() for mixture in mixtures(family.names)],
        "order": swap_order(name),
    }
    yield {**common, "name": f"{name}-live", "role": "live", "arguments": arguments}


def test_the_orders_exercise_every_mixture_again_after_another() -> None:
    for name in SERVED:
        order = swap_order(name)
        assert len(order) == (SWAPS if CASES[name][0].replayable else RESTARTS)
        assert CASES[name][0].replayable is False or {order.count(index) for index in range(4)} <= {2, 3}


@pytest.mark.parametrize("name", SERVED)
def test_swaps_answer_as_a_fresh_plain_vllm_on_the_merge_on_disk(
    name: str, engines: Engines, tmp_path: Path
) -> None:
    """Rarely a process of vLLM sums in another order from start to end: then both sides are run once more.

    Only where everything agrees up to rounding, though: wrong weights are told at once.
    """
    wrong, largest = compare(name, engines)
    if wrong and largest <= ROUNDING:
        warnings.warn(f"{name} differs by rounding, run again: {wrong[0]}", stacklevel=1)
        again = Engines([name], tmp_path)
        try:
            wrong, largest = compare(name, again)
        finally:
            again.stop()
    assert not wrong, f"{len(wrong)} swaps, by up to {largest:.3g} nats\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_itself_cannot_run_fails_with_its_reason(name: str, engines: Engines) -> None:
    """The day that plain vLLM runs it, this fails, and the architecture's `refused` must go."""
    reason = CASES[name][0].refused
    assert reason is not None
    plain = engines.find(f"{name}-plain-0")
    assert reason in plain.get("error", f"plain vLLM runs it now: {plain}")
    live = engines.find(f"{name}-live")
    assert reason in live.get("error", f"it is served: {live}")


def compare(name: str, engines: Engines) -> tuple[list[str], float]:
    """Which swaps answer otherwise than a fresh engine, and by how many nats at most. Checks what they say, too."""
    architecture, ranks = CASES[name]
    fresh = [answers_of(engines.find(f"{name}-plain-{index}")) for index in range(4)]
    assert len({text for answers in fresh for text in answers["texts"]}) > 4
    # The mixtures can be told apart.
    assert all(distance(a, b) > ROUNDING for i, a in enumerate(fresh) for b in fresh[:i])
    live = engines.find(f"{name}-live")
    swapped = answers_of(live)
    assert live["proven"] is architecture.replayable, live["warnings"]
    if architecture.replayable:
        assert len(live["ranks"]) == ranks
        assert all(rank["problems"] == [] for rank in live["ranks"])
        assert all(rank["bytes_written"] > 0 and not rank["uncovered"] for rank in live["ranks"])
    else:
        assert "live swaps are not right with this model" in live["warnings"]
    wrong = [
        (
            distance(fresh[index], answers),
            f"swap {step} (mixture {index}): {answers} should be {fresh[index]}",
        )
        for step, (index, answers) in enumerate(zip(swap_order(name), swapped, strict=True))
        if answers != fresh[index]
    ]
    return [text for _, text in wrong], max((nats for nats, _ in wrong), default=0.0)


def distance(left: Mapping[str, list[float]], right: Mapping[str, list[float]]) -> float:
    return max(abs(a - b) for a, b in zip(left["logprobs"], right["logprobs"], strict=True))


def answers_of(found: Mapping[str, Any]) -> Any:
    assert "error" not in found, found["error"]
    return found["answers"]
