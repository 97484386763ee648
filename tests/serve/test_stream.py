"""Answers that come one by one: the talk between an engine's process and its parent, and the real vLLM behind it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.checkpoints.family import open_family
from mergemix.errors import ConfigError, EngineError, PoisonedEngineError
from mergemix.mixture import Mixture
from mergemix.serve import pipe
from mergemix.serve.engine import EngineSpec, Generate, Likelihood, LogLikelihood, Output, Request
from mergemix.serve.engine_log import EngineLog
from mergemix.serve.vllm_engine import EngineProcess, VllmEngine
from tests.serve.tiny_models import MAX_POSITIONS, make_family

ROOT = Path(__file__).parents[2]
BLOCK_TOKENS = 32  # of the prefix cache


@pytest.fixture(scope="module", autouse=True)
def importable_by_hosts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """For tests that leave the process as it was."""
    process = EngineProcess(EngineLog(tmp_path_factory.mktemp("log") / "log"), "tests.serve.streaming_host")
    yield process
    process.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    process = EngineProcess(EngineLog(tmp_path / "log"), "tests.serve.streaming_host")
    yield process
    process.stop()


def taken(stream: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """(all that it yields, what it returns)."""
    found = []
    while True:
        try:
            found.append(next(stream))
        except StopIteration as end:
            return found, end.value


def test_elements_come_in_order_and_the_result_at_the_end(shared: EngineProcess) -> None:
    lists = [[1, 2], [], list(range(3, 500)), [500]]
    assert taken(shared.stream("numbers", lists)) == (list(range(1, 501)), 4)
    assert taken(shared.stream("numbers", [])) == ([], 0)
    assert shared.call("echo", "x") == "x"


def test_a_part_comes_while_the_rest_is_not_even_there(shared: EngineProcess, tmp_path: Path) -> None:
    file = tmp_path / "go"
    stream = shared.stream("wait_for", str(file))
    assert next(stream) == "first"
    file.touch()
    assert taken(stream) == (["second"], None)


def test_whoever_generates_does_not_wait_for_whoever_reads(shared: EngineProcess, tmp_path: Path) -> None:
    file, count = tmp_path / "generated", 500
    stream = shared.stream("much", count, str(file))
    first = next(stream)
    deadline = threading.Event()
    for _ in range(6000):
        if file.exists():
            break
        deadline.wait(0.01)
    assert file.exists(), "all was generated while only the first was read"
    rest, _ = taken(stream)
    assert [first, *rest] == [(index, "x" * 1000) for index in range(count) for _ in range(10)]


def test_a_stream_that_is_closed_ends_at_the_other_end_too(shared: EngineProcess) -> None:
    before = shared.call("closings")
    stream = shared.stream("endless")
    assert [next(stream) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(PoisonedEngineError, match="interrupted"):
        shared.call("echo", "not now")
    stream.close()
    assert shared.call("closings") == before + 1
    assert shared.call("echo", "again") == "again"


def test_a_stream_that_is_closed_when_it_has_ended_by_itself_leaves_nothing(shared: EngineProcess) -> None:
    stream = shared.stream("numbers", [[1], [2]])
    assert next(stream) == 1
    stream.close()
    assert shared.call("echo", 1) == 1
    assert taken(shared.stream("numbers", [[3]])) == ([3], 1)


@pytest.mark.parametrize(
    ("how", "expected", "said"),
    [("rule", ConfigError, "^a rule$"), ("bug", EngineError, "ZeroDivisionError: a bug")],
)
def test_what_is_raised_halfway_comes_once(
    shared: EngineProcess, how: str, expected: type[Exception], said: str
) -> None:
    found: list[int] = []
    with pytest.raises(expected, match=said):
        found.extend(shared.stream("fails", how))
    assert found in ([1], [1, 2])
    assert shared.call("echo", 2) == 2


def test_a_process_that_dies_halfway_is_noticed(own: EngineProcess) -> None:
    with pytest.raises(PoisonedEngineError, match="exit status 7"):
        list(own.stream("fails", "death"))
    with pytest.raises(PoisonedEngineError):
        own.call("echo", 1)


def test_ctrl_c_while_waiting_leaves_nothing_behind(own: EngineProcess, tmp_path: Path) -> None:
    stream = own.stream("wait_for", str(tmp_path / "never"))
    assert next(stream) == "first"
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    timer.join()
    with pytest.raises(PoisonedEngineError, match="interrupted"):
        own.call("echo", 1)
    own.stop()
    assert not psutil.pid_exists(own._child.pid) or own._child.returncode is not None
    stream.close()


@given(
    st.lists(st.lists(st.integers(0, 11), max_size=8), max_size=12),
    st.sets(st.integers(0, 11)),
    st.integers(1, 10),
)
def test_remembered_requests_are_those_that_were_asked(
    batches: list[list[int]], failing: set[int], limit: int
) -> None:
    requests = [Generate(f"prompt {n}", 1) for n in range(12)]
    remembered: dict[int, Request] = {}
    sent = pipe.SentRequests()

    def ask(
        forget: bool, new: dict[int, Request], numbers: Sequence[int], fails: bool
    ) -> Generator[Request, None, str]:
        if forget:
            remembered.clear()
        if fails:
            raise ConfigError("one of them cannot fit")
        assert not new.keys() & remembered.keys()
        remembered.update(new)
        yield from [remembered[number] for number in numbers]
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe, "REMEMBERED_REQUESTS", limit)
        for turn, batch in enumerate(batches):
            asked = [requests[n] for n in batch]
            if turn in failing:
                with pytest.raises(ConfigError):
                    taken(sent.stream(ask, asked, True))
                continue
            assert taken(sent.stream(ask, asked, False)) == (asked, "done")
            assert len(remembered) <= max(limit, len(batch))


def test_requests_are_sent_once(shared: EngineProcess) -> None:
    new_counts = []

    def ask(
        forget: bool, new: dict[int, Request], numbers: Sequence[int]
    ) -> Generator[tuple[int, ...], None, None]:
        new_counts.append(len(new))
        yield tuple(numbers)

    sent = pipe.SentRequests()
    first, second = Generate("a", 1), Generate("a", 1)
    for batch in ([first, first, second], [second, first], [Generate("a", 1)]):
        taken(sent.stream(ask, batch))
    assert new_counts == [2, 0, 1]


# The real vLLM: one engine whose core is in the host's process, and one whose core is a process of its own.

SHOTS = "Q: 12 in the hat? A: yes abc. " * 3  # more than a block


def mixed_requests() -> list[Request]:
    requests: list[Request] = [Generate(f"the cat {n}", 3 + n % 7) for n in range(12)]
    requests += [LogLikelihood(f"{SHOTS}Q: {n}?", f" {word} the end") for n in range(6) for word in "abc"]
    requests += [LogLikelihood(f"one {n}", " the end") for n in range(4)]
    requests.append(Generate(f"{SHOTS}Q: 1?", 5))
    return requests


@pytest.fixture(scope="module", params=["0", "1"], ids=["core in process", "core beside"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    directory = tmp_path_factory.mktemp("engine")
    paths = make_family(directory / "models", "llama", experts=2)
    family = open_family(None, {name: str(paths[name]) for name in ("math", "code")})
    options = {"block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": 64 << 20}
    spec = EngineSpec(
        family, "vllm", max_model_len=MAX_POSITIONS, log=directory / "engine.log", options=options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", request.param)
        with VllmEngine(spec, Mixture.uniform(family.names)) as engine:
            yield engine


def alone(engine: VllmEngine, requests: Sequence[Request]) -> list[Output]:
    """Each asked by itself, so that none reads what another one left in the prefix cache."""
    return [engine.submit([request])[0] for request in requests]


def close(outputs: Sequence[Output], expected: Sequence[Output]) -> bool:
    """The same answers. Log-probabilities may differ as bf16 sums in another order do."""
    for output, truth in zip(outputs, expected, strict=True):
        if isinstance(output, Likelihood) and isinstance(truth, Likelihood):
            if output.num_tokens != truth.num_tokens or abs(output.logprob - truth.logprob) > 0.1:
                return False
        elif output != truth:
            return False
    return True


def test_a_stream_gives_what_submit_gives_whatever_the_order(engine: VllmEngine) -> None:
    requests = mixed_requests()
    expected = alone(engine, requests)
    assert close(engine.submit(requests), expected)
    order = random.Random(0).sample(range(len(requests)), len(requests))
    found = list(engine.stream([requests[place] for place in order]))
    assert sorted(index for index, _ in found) == list(range(len(requests)))
    assert close([output for _, output in found], [expected[order[index]] for index, _ in found])
    assert [index for index, _ in found] != sorted(index for index, _ in found), "as they are finished"
    assert engine.generate_s is not None
    assert engine.generate_s > 0
    assert list(engine.stream([])) == []


def test_what_a_cached_prefix_hides_is_asked_again(engine: VllmEngine) -> None:
    """The same request again: all of it is cached, the continuation included."""
    context, continuation = SHOTS, " sat in the hat 12 abc" * 4
    assert len(continuation) > 2 * BLOCK_TOKENS
    request = LogLikelihood(context, continuation)
    [expected] = alone(engine, [request])
    assert isinstance(expected, Likelihood)
    assert expected.num_tokens > 2 * BLOCK_TOKENS
    twins = [request, LogLikelihood(context, continuation), LogLikelihood(context, continuation + " a")]
    for _ in range(2):
        found = engine.submit(twins)
        assert close(found[:2], [expected] * 2)
        assert isinstance(found[2], Likelihood)
        assert found[2].logprob < expected.logprob


def test_a_request_that_cannot_fit_is_told_before_anything_is_asked(engine: VllmEngine) -> None:
    good, bad = mixed_requests()[:2], Generate("a", MAX_POSITIONS)
    stream = engine.stream([*good, bad])
    for _ in range(2):
        with pytest.raises(ConfigError, match="max_tokens must be"):
            next(engine.stream([*good, bad]))
    with pytest.raises(ConfigError, match="max_tokens must be"):
        next(stream)
    assert not engine.poisoned
    assert len(engine.submit(good)) == 2


def test_an_engine_whose_stream_was_left_halfway_answers_as_before(engine: VllmEngine) -> None:
    requests = [Generate(f"the cat {n}", 5 if n < 4 else 200) for n in range(40)]
    expected = engine.submit(requests[:4])
    for _ in range(2):
        stream = engine.stream(requests)
        assert len(list(itertools.islice(stream, 2))) == 2
        stream.close()  # type: ignore[attr-defined]
        assert engine.submit(requests[:4]) == expected
    engine.apply(Mixture.one_hot(("math", "code"), "math"))  # the prefix cache is not in use by what was left
    assert engine.submit(requests[:4]) != expected
    engine.apply(Mixture.uniform(("math", "code")))
    assert engine.submit(requests[:4]) == expected


def test_an_engine_that_is_killed_halfway_is_poisoned(engine: VllmEngine) -> None:
    """The last test of each engine."""
    assert engine._process is not None
    child = engine._process._child
    stream = engine.stream([Generate(f"the cat {n}", 2 if n < 4 else 200) for n in range(80)])
    next(stream)
    os.kill(child.pid, signal.SIGKILL)
    rest: list[tuple[int, Output]] = []
    with pytest.raises(PoisonedEngineError, match="SIGKILL"):
        rest.extend(stream)
    assert len(rest) < 79
    assert engine.poisoned
    with pytest.raises(PoisonedEngineError):
        engine.submit([Generate("a", 1)])
