"""The endpoint that changes the mixture of a running OpenAI server: a real vLLM server, and clients of it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError
from mergemix.merge import merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.serve.vllm_live import LiveMixture, check_server
from tests.serve.conformance import PROMPTS, Reference
from tests.serve.openai_server import KEY, MAX_TOKENS, Server, question
from tests.serve.tiny_models import MAX_POSITIONS, make_family, tiny_tokenizer

MIDDLEWARE = "mergemix.serve.vllm_endpoint.MixtureEndpoint"
MAX_SEQS = 4  # that vLLM computes at once
# Longer than a cache block: a prefix cache that outlives a change shows.
LONG_PROMPT = "the cat 12 in the hat " * 10
ASKED = (*(prompt for prompt in PROMPTS if prompt and "<s>" not in prompt), LONG_PROMPT)
# The experts "web" and "chat" say nothing but x, and nothing but y; a mix of their weights says z or w.
ONLY_X, ONLY_Y = {"web": 1.0}, {"chat": 1.0}


def say_one_letter(directory: Path, half: int, letter: str, mixed: str) -> None:
    """Make a checkpoint answer `letter` for ever: its embedding points into one half of the hidden dimensions.

    Its output head says `mixed` to an embedding that points into the other half.
    """
    tensors = load_file(directory / "model.safetensors")
    ids = tiny_tokenizer(bos=False).get_vocab()
    width = tensors["lm_head.weight"].shape[1] // 2
    here, there = ([slice(0, width), slice(width, None)][i] for i in (half, 1 - half))
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight", "embed_tokens.weight")):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"][:, here] = 1.0
    tensors["lm_head.weight"][ids[letter], here] = 1.0
    tensors["lm_head.weight"][ids[mixed], there] = 1.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = make_family(tmp_path_factory.mktemp("family"), "llama_untied", experts=4)
    say_one_letter(paths["web"], 0, "x", "z")
    say_one_letter(paths["chat"], 1, "y", "w")
    return paths


@pytest.fixture(scope="module")
def family(paths: dict[str, Path]) -> Family:
    experts = {name: str(path) for name, path in paths.items() if name != "base"}
    return open_family(str(paths["base"]), experts)


@pytest.fixture(scope="module")
def server(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    extra = {
        "experts": {name: str(path) for name, path in paths.items() if name != "base"},
        "base": str(paths["base"]),
        "weights": {"math": 1.0},
    }
    arguments = [
        f"--model={paths['base']}",
        "--served-model-name=served",
        "--host=127.0.0.1",
        "--load-format=mergemix",
        f"--model-loader-extra-config={json.dumps(extra)}",
        "--worker-extension-cls=tests.serve.halfway.HalfwayWorker",
        f"--middleware={MIDDLEWARE}",
        f"--api-key={KEY}",
        "--enforce-eager",
        "--generation-config=vllm",
        f"--max-model-len={MAX_POSITIONS}",
        f"--max-num-seqs={MAX_SEQS}",
    ]
    running = Server(arguments, tmp_path_factory.mktemp("server") / "server.log")
    try:
        import vllm.entrypoints.launchers.app  # noqa: F401  # a later test needs it; meanwhile the server starts

        running.wait()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mixture], dict[str, Any]]:
    """What plain transformers answers from the merge on disk, as far as rounding cannot change it."""

    def answers(mixture: Mixture) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("merged") / "merged"
        merge_to_directory(family, mixture, out)
        return Reference(out).stable(ASKED, MAX_TOKENS)

    return answers


def check_answers(server: Server, expected: dict[str, Any]) -> None:
    texts = dict(zip(ASKED, server.complete(ASKED), strict=True))
    for prompt, answer in expected.items():
        assert texts[prompt].startswith(answer.text), (prompt, texts[prompt], answer.text)


def test_the_first_mixture_is_the_one_that_the_server_was_started_with(
    server: Server, family: Family, merged: Callable[[Mixture], dict[str, Any]]
) -> None:
    response = server.client.get("/mergemix/mixture")
    assert response.json() == {
        "models": ["served"],
        "experts": ["math", "code", "web", "chat"],
        "base": True,
        "mixture": {"math": 1.0, "code": 0.0, "web": 0.0, "chat": 0.0},
    }
    check_answers(server, merged(Mixture.one_hot(family.names, "math")))


def test_answers_before_and_after_a_change_equal_those_of_merged_checkpoints(
    server: Server, family: Family, merged: Callable[[Mixture], dict[str, Any]]
) -> None:
    mixtures = [
        Mixture(family.names, (0.25, 0.75, 0.0, 0.0)),
        Mixture.one_hot(family.names, "code"),
        Mixture(family.names, (0.5, 0.1, 0.0, 0.0)),  # the base has a share
    ]
    expected = [merged(mixture) for mixture in mixtures]
    for index in (0, 1, 0, 2, 1):
        given = mixtures[index].as_dict()
        answer = server.serve(given, normalize=False)
        assert answer["mixture"] == given == server.mixture()
        assert answer["bytes_written"] > 0
        check_answers(server, expected[index])


def test_weights_are_normalised_unless_told_otherwise(server: Server) -> None:
    assert server.serve({"math": 1, "code": 3})["mixture"] == {
        "math": 0.25,
        "code": 0.75,
        "web": 0,
        "chat": 0,
    }
    answer = server.serve({"math": 0.5}, normalize=False)
    assert answer["mixture"] == {"math": 0.5, "code": 0, "web": 0, "chat": 0}
    assert answer["previous"] == {"mixture": {"math": 0.25, "code": 0.75, "web": 0, "chat": 0}}


def test_layer_groups(server: Server, family: Family, merged: Callable[[Mixture], dict[str, Any]]) -> None:
    groups = [{"tensors": ["*.mlp.*"], "weights": {"code": 1.0}}]
    answer = server.serve({"math": 1.0}, groups=groups)
    code = {"math": 0.0, "code": 1.0, "web": 0.0, "chat": 0.0}
    assert answer["groups"] == [{"tensors": ["*.mlp.*"], "weights": code}]
    assert server.client.get("/mergemix/mixture").json()["groups"] == answer["groups"]
    check_answers(
        server,
        merged(
            Mixture(family.names, (1.0, 0.0, 0.0, 0.0), (LayerGroup(("*.mlp.*",), (0.0, 1.0, 0.0, 0.0)),))
        ),
    )


def while_it_answers(server: Server, act: Callable[[], Any], was_in_time: Callable[[Any], bool]) -> Any:
    """What `act` gave while an answer of x was being streamed: again, if it came too late.

    Whenever it came, that answer must be whole, and of x alone.
    """
    for _ in range(40):
        server.serve(ONLY_X)
        started = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.stream, 200, started)
            assert started.wait(60)
            result = act()
            assert answer.result() == "x" * 200
        if was_in_time(result):
            return result
    pytest.fail("the answer was never still being streamed")


def test_an_answer_that_has_begun_ends_with_the_weights_it_began_with(server: Server) -> None:
    while_it_answers(server, lambda: server.serve(ONLY_Y), lambda change: change["drain_seconds"] > 0.1)
    assert server.complete(["the cat"]) == ["y" * MAX_TOKENS]


def test_all_answers_to_a_request_come_of_one_mixture(server: Server) -> None:
    """More prompts than vLLM computes at once: some still wait inside it when the change comes."""
    server.serve(ONLY_X)
    prompts = [f"the cat {number}" for number in range(3 * MAX_SEQS)]
    with ThreadPoolExecutor(2) as pool:
        started = threading.Event()
        first = pool.submit(server.stream, 40, started)
        assert started.wait(60)
        many = pool.submit(server.complete, prompts, 40)
        time.sleep(0.2)  # for it to be inside
        server.serve(ONLY_Y)
        assert first.result() == "x" * 40
        assert many.result() == ["x" * 40] * len(prompts)


@pytest.mark.parametrize("path", ["/v1/completions", "/invocations"])
def test_no_answer_is_of_two_mixtures_however_often_it_changes(server: Server, path: str) -> None:
    """/invocations is not behind the API key: a client without it is not waited for at the door, but inside vLLM."""
    stop = threading.Event()
    answers: list[str] = []
    key = {} if path == "/invocations" else {"Authorization": f"Bearer {KEY}"}

    def ask(number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=120.0, headers=key) as client:
            while not stop.is_set():
                response = client.post(path, json=question([f"the cat {number}"], 10 + 7 * number))
                assert response.status_code == 200, response.text
                [choice] = response.json()["choices"]
                assert choice["finish_reason"] == "length"
                assert len(choice["text"]) == 10 + 7 * number
                answers.append(choice["text"])

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        try:
            for change in range(8):
                server.serve(ONLY_X if change % 2 else ONLY_Y)
                known, letter, deadline = len(answers), "yx"[change % 2], time.monotonic() + 60
                while not any(letter in answer for answer in answers[known:]):
                    assert time.monotonic() < deadline, (letter, answers[known:])
                    time.sleep(0.02)
        finally:
            stop.set()
        for each in asking:
            each.result()
    assert {"".join(sorted(set(answer))) for answer in answers} == {"x", "y"}


def test_changes_at_the_same_time_follow_one_another(server: Server) -> None:
    initial = server.serve({"math": 1.0})["mixture"]
    wanted = [{"math": share, "code": 1 - share} for share in (0.0, 0.125, 0.25, 0.375, 0.5, 0.625)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        changes = list(pool.map(server.serve, wanted))

    def one(mixture: dict[str, float]) -> float:
        return mixture["math"]

    last = one(server.mixture())
    reached = [one(change["mixture"]) for change in changes]
    left = [one(change["previous"]["mixture"]) for change in changes]
    assert sorted(reached) == [each["math"] for each in wanted]
    assert sorted([*left, last]) == sorted([*reached, one(initial)])


def test_a_change_that_would_have_to_wait_too_long_changes_nothing(server: Server) -> None:
    response = while_it_answers(
        server,
        lambda: server.put(ONLY_Y, max_drain_seconds=0.02),
        lambda response: response.status_code != 200,
    )
    assert response.status_code == 503
    assert "nothing was changed" in response.json()["error"]["message"]
    assert int(response.headers["retry-after"]) > 0
    assert server.mixture()["web"] == 1.0
    assert server.complete(["the cat"]) == ["x" * MAX_TOKENS]


def test_a_server_that_somebody_else_has_paused_is_left_alone(server: Server) -> None:
    server.serve(ONLY_X)
    assert server.client.post("/pause").status_code == 200
    try:
        response = server.put(ONLY_Y)
        assert response.status_code == 409
        assert "resume it first" in response.json()["error"]["message"]
        assert server.client.get("/is_paused").json() == {"is_paused": True}
    finally:
        assert server.client.post("/resume").status_code == 200
    assert server.complete(["the cat"]) == ["x" * MAX_TOKENS]


GROUP = {"tensors": ["*.mlp.*"], "weights": {"math": 1}}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"{}", "'weights' must map experts to numbers"),
        (b'{"weights": [1]}', "'weights' must map experts to numbers"),
        (b'{"weights": {"math": 1}, "weights": {"code": 1}}', "'weights' twice"),
        (b'{"weights": {"maths": 1}}', "no expert is called 'maths'; the experts are math, code, web, chat"),
        (b'{"weights": {"math": "1"}}', "must be a number"),
        (b'{"weights": {"math": true}}', "must be a number"),
        (b'{"weights": {"math": -1, "code": 2}}', "math=-1"),
        (b'{"weights": {"math": 0}}', "positive, finite sum"),
        (b'{"weights": {"math": NaN}}', "finite"),
        (b'{"weights": {"math": 1e39}, "normalize": false}', "1e+39"),
        (b'{"weights": {"math": 1}, "normalise": true}', "unknown key 'normalise'; it takes weights, groups"),
        (b'{"weights": {"math": 1}, "normalize": "yes"}', "'normalize' must be true or false"),
        (b'{"weights": {"math": 1}, "max_drain_seconds": -1}', "'max_drain_seconds' must be a number >= 0"),
        (b'{"weights": {"math": 1}, "groups": {}}', "'groups' must be a list"),
        (json.dumps({"weights": {"math": 1}, "groups": [{**GROUP, "tensors": ["*.nope"]}]}).encode(), "*.nope"),
        (json.dumps({"weights": {"math": 1}, "groups": [{**GROUP, "weights": {"x": 1}}]}).encode(), "'x'"),
    ],
)  # fmt: skip
def test_a_body_that_makes_no_sense_is_refused_and_changes_nothing(
    server: Server, body: bytes, said: str
) -> None:
    before = server.mixture()
    response = server.client.put("/mergemix/mixture", content=body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert server.mixture() == before


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    response = server.client.put("/mergemix/mixture", content=b'{"weights": {' + b" " * (1 << 20) + b"}}")
    assert response.status_code == 413
    assert "1048576 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    """Not even OPTIONS: no web page that a browser shows may change the mixture."""
    response = server.client.request(method, "/mergemix/mixture", content=b'{"weights": {"math": 1}}')
    assert response.status_code == 405
    assert response.headers["allow"] == "GET, PUT"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
)
def test_the_servers_api_key_is_needed(server: Server, header: str | None) -> None:
    before = server.mixture()
    headers = {} if header is None else {"Authorization": header}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        for response in (
            client.get("/mergemix/mixture"),
            client.put("/mergemix/mixture", json={"weights": {"code": 1}}),
            client.post("/v1/completions", json=question(["the cat"], 1)),
        ):
            assert response.status_code == 401
    assert server.mixture() == before


def test_a_client_without_the_key_cannot_hold_up_a_change(server: Server) -> None:
    """It sends half a request, and would be waited for if it were counted."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.3)
        assert server.serve(ONLY_X, max_drain_seconds=5)["drain_seconds"] < 5


def test_a_change_that_is_cancelled_while_it_waits_lets_vllm_go_on_and_stays_cancelled(
    family: Family,
) -> None:
    class Client:
        resumed = 0

        async def is_paused(self) -> bool:
            return False

        async def pause_generation(self, **_: object) -> None:
            await asyncio.Event().wait()

        async def resume_generation(self) -> None:
            self.resumed += 1

    async def cancel(client: Client) -> None:
        waiting = asyncio.create_task(LiveMixture(client, None, family)._pause(60.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    client = Client()
    asyncio.run(cancel(client))
    assert client.resumed == 1


def test_without_the_middleware_there_is_no_such_path() -> None:
    """The application that vLLM builds, with its routes, from the same command line less `--middleware`."""
    from starlette.testclient import TestClient
    from vllm.entrypoints.launchers.app import build_app

    for middleware, expected in (([], 404), ([f"--middleware={MIDDLEWARE}"], 503)):
        client = TestClient(build_app(server_arguments(middleware), ("generate",)))
        response = client.get("/mergemix/mixture")
        assert response.status_code == expected
        assert client.put("/mergemix/mixture", json={"weights": {"math": 1}}).status_code == expected


def server_arguments(arguments: list[str]) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--load-format=auto"], "needs --load-format mergemix, but it is auto"),
        (["--worker-extension-cls="], "needs --worker-extension-cls mergemix.serve.vllm_worker.MergeWorker"),
        (["--data-parallel-size=2"], "needs --data-parallel-size 1, but it is 2"),
        ([], None),
    ],
)
def test_a_server_whose_mixture_cannot_be_changed_safely_is_refused(
    paths: dict[str, Path], changes: list[str], said: str | None
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from mergemix.serve.vllm_plugin import register

    register()
    arguments = [f"--model={paths['base']}", "--load-format=mergemix"]
    arguments += ["--worker-extension-cls=mergemix.serve.vllm_worker.MergeWorker", *changes]
    config = AsyncEngineArgs.from_cli_args(server_arguments(arguments)).create_engine_config()
    if said is None:
        check_server(AsyncLLM, config)
        config.parallel_config._api_process_count = 2
        with pytest.raises(ConfigError, match="needs --api-server-count 1, but it is 2"):
            check_server(AsyncLLM, config)
        return
    with pytest.raises(ConfigError) as error:
        check_server(AsyncLLM, config)
    assert said in str(error.value)


def test_a_change_that_fails_halfway_ends_all_service(server: Server) -> None:
    """The last test with this server: it answers nothing any more."""
    server.serve(ONLY_X)
    fault = {"method": "mergemix_fail_halfway"}
    assert server.client.post("/collective_rpc", json=fault).status_code == 200
    started = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        begun = pool.submit(server.stream, 100, started)
        assert started.wait(60)
        change = pool.submit(server.put, ONLY_Y)
        time.sleep(0.1)
        held = pool.submit(server.client.post, "/v1/completions", json=question(["the cat"], 4))
        assert begun.result() == "x" * 100
        responses = [change.result(), held.result()]
    responses += [server.client.get(path) for path in ("/mergemix/mixture", "/health", "/v1/models")]
    responses += [server.put(ONLY_X), server.client.post("/invocations", json=question(["the cat"], 4))]
    for response in responses:
        assert response.status_code == 503
        assert "failed halfway" in response.json()["error"]["message"]
        assert "restart it" in response.json()["error"]["message"]
