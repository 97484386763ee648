"""Scenes with engines that fail: `python -m tests.serve.forked_engines TASK.json DIRECTORY`.

Every failure costs a start of vLLM, most of which is the import. So it is imported once, each scene runs in a fork,
and the processes of its engines are forks again; everything else is what users get. What a scene found, or its
error, goes to DIRECTORY/NAME.json.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import EngineError, PoisonedEngineError
from mergemix.evals.benchmark import load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import LocalEvaluator
from mergemix.evidence import Evidence, Silent
from mergemix.merge.delta_cache import shared_memory
from mergemix.mixture import Mixture
from mergemix.serve import open_engine, vllm_engine
from mergemix.serve.engine import Engine, EngineSpec, Generate, LogLikelihood
from mergemix.serve.engine_log import EngineLog
from mergemix.study import Study
from tests.serve.many_engines import KV_CACHE_BYTES, preload
from tests.serve.one_shot import DIRECTORY, Fault
from tests.serve.tiny_models import MAX_POSITIONS

SCENE_LIMIT_S = 200
WORKER = "tests.serve.one_shot.OneShotWorker"
ASKED = [LogLikelihood("the cat", " sat in the hat"), Generate("abc", 6)]
LONG = [Generate(f"the cat {n}", 200) for n in range(400)]


class Fork:
    """A child as subprocess.Popen has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        return code


class ForkedProcess(vllm_engine.EngineProcess):
    """An EngineProcess whose child begins as a fork, with vLLM imported."""

    def __init__(self, log: EngineLog) -> None:
        self._log = log
        self._busy = False
        self._connection, theirs = Pipe()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            self._connection.close()
            serve_in_fork(theirs, log, parent)
        theirs.close()
        self._child = Fork(pid)  # type: ignore[assignment]
        log.release()


def serve_in_fork(connection: Connection, log: EngineLog, parent: int) -> None:
    """As mergemix.serve.vllm_host does. Does not return."""
    from mergemix.serve.vllm_host import Host, end_with_parent, serve

    try:
        os.setsid()
        os.register_at_fork(after_in_child=connection.close)  # what vLLM starts has no part in it
        for output in (1, 2):
            os.dup2(log.fileno, output)
        os.environ.update({**vllm_engine.CHILD_ENVIRONMENT, **os.environ})
        end_with_parent(parent)
        serve(connection, Host())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Stage:
    """A family, its benchmarks, and engines that break on demand."""

    def __init__(self, task: dict[str, Any], directory: Path, **spec: Any) -> None:
        paths = dict(task["paths"])
        self.family: Family = open_family(paths.pop("base"), paths)
        self.suite = Suite(load_benchmarks(task["bench"]))
        self.directory = directory
        self.initial = Mixture.uniform(self.family.names)
        options = {"worker_extension_cls": WORKER, "kv_cache_memory_bytes": KV_CACHE_BYTES}
        self.spec = EngineSpec(
            self.family,
            "vllm",
            max_model_len=MAX_POSITIONS,
            log=directory / "engine.log",
            options=options,
            **spec,
        )
        self.engines: list[Any] = []
        self.pids: list[int] = []
        os.environ[DIRECTORY] = str(directory)

    def start(self) -> Engine:
        engine: Any = open_engine(self.spec, self.initial)
        self.engines.append(engine)
        if getattr(engine, "_process", None) is not None:
            self.pids.append(engine._process._child.pid)
        return engine

    def mixture(self, share: float) -> Mixture:
        return Mixture(self.family.names, (share, 1 - share))

    def arm(self, mixture: Mixture, how: Any, **where: Any) -> None:
        Fault(mixture.key(), how, **where).arm(self.directory)

    def is_armed(self) -> bool:
        return (self.directory / "fault.json").exists()

    @contextmanager
    def evidence(self, pool: LocalEvaluator, name: str) -> Iterator[Evidence]:
        with Study.open(self.directory / name, {"name": name}, {}) as study:
            yield Evidence(study, self.suite, pool, Silent(), expected=0)

    def scores(self, pool: LocalEvaluator, name: str, mixtures: Sequence[Mixture]) -> list[list[Any]]:
        """Stored scores of all items by mixture, evaluated if need be."""
        with self.evidence(pool, name) as evidence:
            return [stored(evidence, record) for record in evidence.collect(mixtures, origin="test")]

    def left(self) -> list[str]:
        """Processes of engines that were started, besides the newest one's."""
        return [f"{p.pid} {p.name()}" for p in session(self.pids[:-1])]


def stored(evidence: Evidence, record: Any) -> list[Any]:
    """What the store has, read back from it: [benchmark, item, score, text] each."""
    return [[r.benchmark, r.item, r.score, r.text] for r in evidence.study.results(record.id)]


def session(leaders: Sequence[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) in leaders and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def faults(stage: Stage, plan: Sequence[tuple[str, str, int, int]]) -> dict[str, Any]:
    """Candidates whose first swap breaks, each in its way (how, stage, rank, times), beside the same ones unbroken."""
    mixtures = [stage.mixture(0.1 + 0.07 * n) for n in range(len(plan))]
    found = []
    with LocalEvaluator(stage.start) as pool:
        plain = stage.scores(pool, "plain", mixtures)
        with stage.evidence(pool, "broken") as evidence:
            for mixture, (how, where, rank, times), expected in zip(mixtures, plan, plain, strict=True):
                before = len(stage.engines)
                stage.arm(mixture, how, stage=where, rank=rank, times=times)
                begin = time.perf_counter()
                [record] = evidence.collect([mixture], origin="test")
                found.append(
                    {
                        "fault": [how, where, rank, times],
                        "starts": len(stage.engines) - before,
                        "poisoned": stage.engines[before - 1].poisoned,
                        "happened": not stage.is_armed(),
                        "status": record.status,
                        "reason": record.reason,
                        "proven": record.proven,
                        "same": stored(evidence, record) == expected,
                        "scores": len(stored(evidence, record)),
                        "left": stage.left(),
                        "seconds": time.perf_counter() - begin,
                    }
                )
                if pool._engine is None:
                    pool._ready()  # the next fault is for a candidate, not for the start
    return {"cases": found, "distinct": len({json.dumps(each) for each in plain}), "left": alive(stage)}


def silent(stage: Stage) -> dict[str, Any]:
    """Faults that raise nothing, in the fifth swap of an engine that verifies all of every swap, and of a sample."""
    mixtures = [stage.mixture(0.1 + 0.2 * n) for n in range(5)]
    found: dict[str, Any] = {"caught": {}}
    with LocalEvaluator(stage.start) as pool:
        plain = stage.scores(pool, "plain", mixtures)
        engine = stage.engines[0]
        found["proven"] = engine.proven
        for how in ("stale", "corrupt"):
            for mixture in mixtures[:4]:
                engine.apply(mixture)
            stage.arm(mixtures[4], how)
            found["caught"][how] = [raised(lambda: engine.apply(mixtures[4])), engine.poisoned]
            found["caught"][how].append(raised(lambda: engine.submit(ASKED)))
            engine.poisoned = False  # the workers know that nothing they hold is right
        found["still corrupt"] = raised(lambda: engine.apply(mixtures[3]))
        found["lost"] = []
        for verify in ("every", "first"):
            stage.spec = dataclasses.replace(stage.spec, verify_swaps=verify)
            pool.close()
            pool._ready()
            stage.arm(mixtures[4], "lose")
            found[verify] = stage.scores(pool, verify, mixtures) == plain
            found["lost"].append(not stage.is_armed())
        found["starts"] = len(stage.engines)
    return {**found, "left": alive(stage)}


def at_start(stage: Stage) -> dict[str, Any]:
    """A tensor that is lost in the self-test's swap, and what the store then says of a candidate.

    An engine that verifies nothing, and is not broken, gives the scores to compare with.
    """
    names = stage.family.names
    first = stage.spec
    stage.spec = dataclasses.replace(first, verify_swaps="never")
    found = {"never": _one_candidate(stage, "never")}
    stage.spec = first
    stage.arm(Mixture.one_hot(names, names[0]), "lose")
    found["lose"] = _one_candidate(stage, "lose")
    found["lose"]["happened"] = not stage.is_armed()
    return {**found, "left": alive(stage)}


def _one_candidate(stage: Stage, name: str) -> dict[str, Any]:
    with LocalEvaluator(stage.start) as pool, stage.evidence(pool, name) as evidence:
        [record] = evidence.collect([stage.mixture(0.3)], origin="test")
        engine = stage.engines[-1]
        proven = [engine.proven, record.proven]
        return {"engine": type(engine).__name__, "proven": proven, "scores": stored(evidence, record)}


def deaths(stage: Stage, victims: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """SIGKILL of an engine's process (host, or a rank) while it is idle, or generates: what follows and how soon."""
    mixtures = [stage.mixture(0.2 + 0.2 * n) for n in range(len(victims))]
    found = []
    with LocalEvaluator(stage.start) as pool:
        plain = stage.scores(pool, "plain", mixtures)
        for index, (victim, when) in enumerate(victims):
            engine = stage.engines[-1]
            pid = engine._process._child.pid if victim == "host" else workers(engine)[int(victim)]
            killed = [0.0]

            def kill(pid: int = pid, killed: list[float] = killed) -> None:
                killed[0] = time.perf_counter()
                os.kill(pid, signal.SIGKILL)

            if when == "idle":
                kill()
                reason = raised(lambda index=index, engine=engine: engine.apply(mixtures[index]))
            else:
                timer = threading.Timer(0.5, kill)
                timer.start()
                reason = raised(lambda engine=engine: engine.submit(LONG))
                timer.join()
            noticed = time.perf_counter() - killed[0]
            case = {
                "victim": [victim, when],
                "reason": reason,
                "noticed_s": noticed,
                "poisoned": engine.poisoned,
            }
            same = stage.scores(pool, f"after-{index}", [mixtures[index]]) == [plain[index]]
            case |= {"same": same, "left": stage.left(), "starts": len(stage.engines)}
            case["total_s"] = time.perf_counter() - killed[0]
            found.append(case)
    return {"cases": found, "left": alive(stage)}


def workers(engine: Any) -> list[int]:
    """Process ids by rank."""
    return engine._process.call("call_workers", "mergemix_pid")


def interrupted(stage: Stage) -> dict[str, Any]:
    """Ctrl-C in the middle of a swap and of an answer; what the engine then does if it is asked again."""
    found = {}
    for where in ("apply", "submit"):
        engine: Any = stage.start()
        pid = engine._process._child.pid
        stage.arm(stage.mixture(0.3), "wait", stage="reprocessing")
        if where == "submit":
            engine.apply(stage.mixture(0.3))
        timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        try:
            engine.apply(stage.mixture(0.3)) if where == "apply" else engine.submit(LONG)
            interrupt = "none"
        except KeyboardInterrupt:
            interrupt = "KeyboardInterrupt"
        timer.join()
        again = [raised(lambda engine=engine: engine.submit(ASKED))]
        again.append(raised(lambda engine=engine: engine.apply(stage.mixture(0.5))))
        begin = time.perf_counter()
        engine.close()
        seconds = time.perf_counter() - begin
        found[where] = {
            "interrupt": interrupt,
            "again": again,
            "left": [p.pid for p in session([pid])],
            "close_s": seconds,
        }
    return found


def all_killed(stage: Stage) -> dict[str, Any]:
    """SIGKILL of the program that runs an engine with a host cache; then the next start."""
    before = set(segments())
    reader, writer = os.pipe()
    if (program := os.fork()) == 0:
        engine: Any = stage.start()
        os.write(writer, json.dumps(stage.pids).encode())
        time.sleep(SCENE_LIMIT_S)
        os._exit(0)
    [pid] = json.loads(os.read(reader, 100))
    shared = [path for path in segments() if path not in before]
    os.kill(program, signal.SIGKILL)
    killed = time.perf_counter()
    os.waitpid(program, 0)
    while session([pid]) and time.perf_counter() - killed < 20:
        time.sleep(0.05)
    ended_s = time.perf_counter() - killed
    left = [path for path in shared if path.exists()]
    for path in left:  # so that the next engine would not take it for its own
        path.rename(path.with_name(path.name[:-4] + "dead"))
    renamed = [path.with_name(path.name[:-4] + "dead") for path in left]
    engine = stage.start()
    removed = not any(path.exists() for path in renamed)
    engine.close()
    return {
        "shared": len(shared),
        "ended_s": ended_s,
        "killed": [p.pid for p in session([pid])],
        "left by killed": len(left),
        "removed": removed,
        "left": sorted(map(str, set(segments()) - before)),
    }


def segments() -> list[Path]:
    return sorted(shared_memory().glob(f"mergemix-{os.getuid()}-*"))


def raised(do: Callable[[], object]) -> str:
    """The class and message of what `do` raises; what it returns where it raises nothing."""
    try:
        return f"returned {do()}"
    except (EngineError, PoisonedEngineError) as error:
        return f"{type(error).__name__}: {error}"


def alive(stage: Stage) -> list[str]:
    return [f"{p.pid} {p.name()}" for p in session(stage.pids)]


SCENES: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (faults, silent, at_start, deaths, interrupted, all_killed)
}


def play(task: dict[str, Any], scene: dict[str, Any], out: Path) -> None:
    """In a fork: write what the scene finds, and end."""
    signal.alarm(SCENE_LIMIT_S)
    directory = Path(tempfile.mkdtemp(prefix=f"{scene['name']}-", dir=out))
    log = os.open(out / f"{scene['name']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    begin = time.perf_counter()
    try:
        found = SCENES[scene["scene"]](Stage(task, directory, **scene["spec"]), **scene["arguments"])
    except BaseException:
        found = {"error": traceback.format_exc()}
    (out / f"{scene['name']}.json").write_text(json.dumps({**found, "took_s": time.perf_counter() - begin}))
    os._exit(0)


def main() -> None:
    vllm_engine.EngineProcess = ForkedProcess  # type: ignore[misc, assignment]
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    preload(["LlamaForCausalLM"])
    utils: Any = __import__("vllm.v1.engine.utils", fromlist=["utils"])
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")  # the workers' is so already
    cores = sorted(os.sched_getaffinity(0))[:2]
    running: set[int] = set()
    for scene in task["scenes"]:
        ranks = scene["spec"].get("tensor_parallel_size", 1)
        while len(running) > (0 if ranks > 1 else 1):
            running.remove(os.wait()[0])
        pid = os.fork()
        if pid == 0:
            if ranks > 1:
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"{cores[0]}|{cores[-1]}"
            play(task, scene, out)
        running.add(pid)
    while running:
        running.remove(os.wait()[0])


if __name__ == "__main__":
    main()
