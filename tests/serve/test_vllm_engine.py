"""The vLLM engine, with a real vLLM: it keeps what every engine promises, and notices when a swap goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, EngineError, NonFiniteError, PoisonedEngineError
from mergemix.merge import merge_to_directory
from mergemix.merge.delta_cache import shared_memory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve import open_engine
from mergemix.serve.engine import EngineSpec, Generate, LogLikelihood
from mergemix.serve.engine_log import EngineLog
from mergemix.serve.proof import prove
from mergemix.serve.vllm_engine import CHECKS, EngineProcess, VllmEngine, engine_args
from tests.serve.conformance import PAIRS, PROMPTS, EngineConformance, StartEngine
from tests.serve.tiny_models import MAX_POSITIONS, make_family

ROOT = Path(__file__).parents[2]
FAULTY = {"worker_extension_cls": "tests.serve.faults.FaultyWorker"}
MAX_TOKENS = 12
# Longer than a cache block: a prefix cache that outlives a swap shows.
LONG_PROMPT = "the cat 12 in the hat " * 12


@pytest.fixture(scope="module", autouse=True)
def importable_by_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        )
        yield


def spec(family: Family, log: Path, **options: object) -> EngineSpec:
    return EngineSpec(
        family, kind="vllm", max_model_len=MAX_POSITIONS, log=log, options={**FAULTY, **options}
    )


class VllmConformance(EngineConformance):
    victim: str  # a module that vLLM transforms after loading

    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls, tmp_path_factory: pytest.TempPathFactory) -> StartEngine:
        log = tmp_path_factory.mktemp("logs") / "engine.log"
        return lambda family, initial: open_engine(spec(family, log), initial)

    @pytest.mark.parametrize("verify", ["every", "first"])
    def test_a_swap_that_loses_a_tensor_poisons_the_engine(
        self, engine: VllmEngine, family: Family, verify: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "_check", CHECKS[verify])
        engine.apply(Mixture.uniform(family.names))
        self.set_fault(engine, "lost tensor")
        try:
            with pytest.raises(PoisonedEngineError, match="differ from the reference"):
                engine.apply(Mixture.one_hot(family.names, "code"))
        finally:
            self.set_fault(engine, "none")
        assert engine.poisoned
        assert engine._process is not None
        assert engine._process.call("call_workers", "mergemix_mixture") == [""]
        engine.poisoned = False  # for the tests that follow: the next swap writes everything
        engine.apply(Mixture.uniform(family.names))

    def set_fault(self, engine: VllmEngine, fault: str, victim: str = "") -> None:
        assert engine._process is not None
        engine._process.call("call_workers", "mergemix_set_fault", fault, victim)

    def break_swap(self, engine: VllmEngine, paths: dict[str, Path]) -> None:  # type: ignore[override]
        self.set_fault(engine, "fails halfway")

    def test_its_swaps_are_proven(self, engine: VllmEngine, family: Family) -> None:
        assert engine.proven
        described = engine.describe()
        assert all(rank["problems"] == [] for rank in described)
        assert any(name.endswith(self.victim) for name in described[0]["transformed"])
        engine.apply(Mixture.uniform(family.names))
        assert prove(engine, Mixture.uniform(family.names)).problems == ()

    def test_greedy_answers_and_logprobs_equal_those_of_a_fresh_plain_vllm_on_the_merge_on_disk(
        self, engine: VllmEngine, family: Family, plain: dict[str, list[dict[str, object]]]
    ) -> None:
        mixtures = plain_mixtures(family.names)
        for index in (0, 1, 2, 1, 0, 2, 2, 0):
            engine.apply(mixtures[index])
            expected = plain[self.arch][index]
            requests = [Generate(prompt, MAX_TOKENS) for prompt in (*PROMPTS, LONG_PROMPT)]
            assert [output.text for output in engine.generate(requests)] == expected["texts"], mixtures[index]
            outputs = engine.loglikelihood([LogLikelihood(*pair) for pair in PAIRS])
            assert [output.logprob for output in outputs] == expected["logprobs"], mixtures[index]

    @pytest.mark.parametrize("fault", ["lost tensor", "stale module", "old closure"])
    def test_the_proof_notices(self, engine: VllmEngine, family: Family, fault: str) -> None:
        uniform = Mixture.uniform(family.names)
        engine.apply(uniform)
        self.set_fault(engine, fault, self.victim if fault == "stale module" else "o_proj")
        try:
            evidence = prove(engine, uniform)
        finally:
            self.set_fault(engine, "none")
        assert evidence.problems
        # Repaired: the state that the fault left does not outlive the next swap.
        engine.apply(Mixture.one_hot(family.names, "math"))
        engine.apply(uniform)
        assert prove(engine, uniform).problems == ()


class TestLlamaWithTiedEmbeddings(VllmConformance):
    arch = "llama"
    victim = "lm_head"


class TestQwen3Moe(VllmConformance):
    arch = "qwen3_moe"
    victim = "experts"

    def test_the_proof_notices_experts_that_are_not_packed_again(
        self, engine: VllmEngine, family: Family
    ) -> None:
        uniform = Mixture.uniform(family.names)
        engine.apply(uniform)
        self.set_fault(engine, "kernel kept", "experts")
        try:
            evidence = prove(engine, uniform)
        finally:
            self.set_fault(engine, "none")
        assert any("experts" in problem for problem in evidence.problems)


def plain_mixtures(names: tuple[str, ...]) -> list[Mixture]:
    """An expert, a mixture, and one whose weights do not sum to one."""
    return [
        Mixture.one_hot(names, names[1]),
        Mixture(names, (0.2, 0.5, 0.3)),
        Mixture(names, (0.9, -0.2, 0.1)),
    ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    """What plain vLLM (load_format auto), started afresh on each merge on disk, answers; by architecture."""
    directory = tmp_path_factory.mktemp("plain")
    asked = {"prompts": [*PROMPTS, LONG_PROMPT], "pairs": PAIRS, "max_tokens": MAX_TOKENS}
    cases = []
    for arch in ("llama", "qwen3_moe"):
        paths = make_family(directory / arch, arch)  # type: ignore[arg-type]
        family = open_family(str(paths.pop("base")), {name: str(path) for name, path in paths.items()})
        for index, mixture in enumerate(plain_mixtures(family.names)):
            root = directory / f"merged-{arch}-{index}"
            merge_to_directory(family, mixture, root)
            case = {"name": f"{arch}-{index}", "role": "plain", "options": {}, "environment": {}}
            cases.append({**case, "arguments": {"root": str(root), **asked}})
    task = {"architectures": ["LlamaForCausalLM", "Qwen3MoeForCausalLM"], "cases": cases}
    (directory / "task.json").write_text(json.dumps(task))
    environment = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.serve.many_engines", str(directory / "task.json"), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[dict[str, object]]] = {}
    for case in cases:
        result = json.loads((directory / f"{case['name']}.json").read_text())
        assert "error" not in result, result["error"]
        found.setdefault(str(case["name"]).rpartition("-")[0], []).append(result["answers"])
    return found


def session_of(process: EngineProcess) -> list[psutil.Process]:
    def belongs(candidate: psutil.Process) -> bool:
        try:
            return (
                os.getpgid(candidate.pid) == process._child.pid and candidate.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.Error, ProcessLookupError):
            return False

    return [candidate for candidate in psutil.process_iter() if belongs(candidate)]


def test_a_start_that_fails_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    paths = make_family(tmp_path, "llama", experts=2)
    file = paths["code"] / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[name][1, 2] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    family = open_family(None, {name: str(paths[name]) for name in ("math", "code")})
    initial = Mixture.one_hot(family.names, "math")
    good = spec(family, tmp_path / "engine.log")
    process = EngineProcess(EngineLog(good.log))
    try:
        with pytest.raises(EngineError, match="no_such_argument"):
            process.call("start", engine_args(spec(family, tmp_path / "log", no_such_argument=1), initial))
        with pytest.raises(NonFiniteError, match=rf"{name}.*code"):
            process.call("start", engine_args(good, initial))
        assert session_of(process)
    finally:
        process.stop()
    assert session_of(process) == []
    process.stop()


def test_a_process_that_dies_is_noticed(tmp_path: Path) -> None:
    process = EngineProcess(EngineLog(tmp_path / "engine.log"))
    process._child.kill()
    with pytest.raises(PoisonedEngineError, match="SIGKILL"):
        process.call("submit", [])
    process.stop()
    assert session_of(process) == []


def test_an_engine_that_is_busy_is_ended_at_once(tmp_path: Path) -> None:
    paths = make_family(tmp_path, "llama", experts=1)
    family = open_family(None, {"math": str(paths["math"])})
    process = EngineProcess(EngineLog(tmp_path / "engine.log"))
    args = engine_args(spec(family, tmp_path / "log"), Mixture.one_hot(family.names, "math"))
    process._connection.send(("start", (args,)))
    process._busy = True  # as `call` leaves it when Ctrl-C interrupts it
    process.stop()
    assert session_of(process) == []
    assert process._child.returncode == -signal.SIGTERM


def test_an_engine_does_not_outlive_its_parent(tmp_path: Path) -> None:
    script = (
        "import time; from pathlib import Path\n"
        "from mergemix.serve.engine_log import EngineLog\n"
        "from mergemix.serve.vllm_engine import EngineProcess\n"
        f"process = EngineProcess(EngineLog(Path({str(tmp_path / 'engine.log')!r})))\n"
        "print(process._child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        assert engine.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([engine], timeout=10)
    assert not alive


def test_two_ranks_swap_each_their_own_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    paths = make_family(tmp_path, "llama", experts=2)
    family = open_family(str(paths["base"]), {name: str(paths[name]) for name in ("math", "code")})
    log = tmp_path / "engine.log"
    before = set(shared_memory().glob("mergemix-*"))
    cached: dict[str, Any] = {"device_cache": 100_000, "host_cache": 400_000, "verify_swaps": "every"}
    two_ranks = EngineSpec(
        family, "vllm", max_model_len=MAX_POSITIONS, tensor_parallel_size=2, log=log, **cached
    )
    with open_engine(two_ranks, Mixture.uniform(family.names)) as engine:
        assert isinstance(engine, VllmEngine)
        assert engine.proven
        ranks = engine.describe()
        assert len(ranks) == 2
        whole = sum(tensor.nbytes for tensor in family.template.tensors.values())
        assert all(rank["bytes_written"] < 0.7 * whole for rank in ranks)
        for rank in ranks:
            assert 0 < rank["cache"]["device"] <= 50_000
            assert 0 < rank["cache"]["host"] <= 200_000
            assert rank["cache"]["disk"] > 0
        swap = engine.apply(Mixture.base_only(family.names))
        assert swap.skipped == 0
        first_layer = LayerGroup(("model.layers.0.*",), (0.5, 0.5))
        part = engine.apply(Mixture(family.names, (0.0, 0.0), (first_layer,)))
        assert 0 < part.bytes_written < swap.bytes_written / 2
        assert 0 < part.process_s < part.seconds
        assert sum(part.bytes_read.values()) == 2 * part.bytes_written
        assert part.bytes_read["device"] > 0
        assert part.bytes_read["host"] > 0
        again = engine.apply(Mixture(family.names, (0.0, 0.0), (first_layer,)))
        assert (again.bytes_written, sum(again.bytes_read.values())) == (0, 0)
        assert again.skipped == again.destinations == part.destinations > 0
        keys = engine._usable_process().call("call_workers", "mergemix_mixture")
        assert keys == [Mixture(family.names, (0.0, 0.0), (first_layer,)).key()] * 2
        with pytest.raises(ConfigError, match="matches none"):
            engine.apply(Mixture(family.names, (0.5, 0.5), (LayerGroup(("layer.*",), (1.0, 0.0)),)))
        assert not engine.poisoned
        segments = set(shared_memory().glob("mergemix-*")) - before
        assert len(segments) == 2
        process = engine._process
    assert process is not None
    assert session_of(process) == []
    assert not any(path.exists() for path in segments)
    assert "Worker" in log.read_text()
    assert capfd.readouterr().out == ""
