"""The mixture of a running OpenAI server, read and changed over HTTP; there only where the operator asks for it:

    vllm serve BASE --load-format mergemix --model-loader-extra-config '{"experts": {...}, "weights": {...}}' \
        --worker-extension-cls mergemix.serve.vllm_worker.MergeWorker \
        --middleware mergemix.serve.vllm_endpoint.MixtureEndpoint

    GET /mergemix/mixture      what is served
    PUT /mergemix/mixture      {"weights": {"math": 0.3, "code": 0.7}}: serve that instead

An answer never comes of mixed weights: a change waits until the requests in flight are answered, while new ones wait
for the change. It is docs/serving.md that says what is guaranteed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from mergemix.errors import MergeMixError
from mergemix.serve.vllm_live import LiveMixture, Refused, still_busy

log = logging.getLogger(__name__)

PATH = "/mergemix/mixture"
METHODS = ("GET", "PUT")
MAX_BODY_BYTES = 1 << 20
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # these make no model compute

Message = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class MixtureEndpoint:
    """ASGI middleware for vLLM's `--middleware`, around everything that the server answers.

    When it cannot do its work (no MergeWorker, several API servers, swaps that are not right with this model) the
    server does not start, and says why.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.gate = Gate()
        self.live: LiveMixture | None = None
        self.tokens: list[bytes] = []  # digests of the API keys; none: everybody may

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
            return
        try:
            await self._serve(scope, receive, send)
        except Refused as refusal:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1011, "reason": "no mixture is served"})
                return
            error = {"message": str(refusal), "type": "mergemix", "code": refusal.status}
            await respond(send, refusal.status, {"error": error}, refusal.headers)

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        if self._path(scope) == PATH and scope["type"] == "http":
            await respond(send, 200, await self._answer(scope, receive))
        # Requests without the key are not waited for: they are refused further in, or reach nothing that it protects.
        elif scope["type"] == "http" and scope["method"] not in SAFE_METHODS and self._authorized(scope):
            async with self.gate.inside():
                self._usable()
                await self.app(scope, receive, send)
        else:
            self._usable()
            await self.app(scope, receive, send)

    async def _start(self, scope: Any, receive: Receive, send: Send) -> None:
        """Once, before the server answers anything: prove that swaps are right, or keep it from starting."""
        first = [await receive()]
        try:
            state = scope["app"].state
            self.tokens = api_keys(state.args)
            self.live = await LiveMixture.open(state.engine_client, state.vllm_config)
        except (
            Exception
        ) as error:  # whatever it is, a server that was to have the endpoint must not run without
            reason = (
                str(error)
                if isinstance(error, MergeMixError | Refused)
                else f"{type(error).__name__}: {error}"
            )
            log.error("the endpoint %s cannot be served: %s", PATH, reason)
            await send({"type": "lifespan.startup.failed", "message": f"{PATH}: {reason}"})
            return

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, again, send)

    async def _answer(self, scope: Any, receive: Receive) -> dict[str, Any]:
        if scope["method"] not in METHODS:
            raise Refused(
                405, f"{PATH} takes {' and '.join(METHODS)}, not {scope['method']}", allow=", ".join(METHODS)
            )
        if not self._authorized(scope):
            raise Refused(
                401, "the server's API key is needed: Authorization: Bearer KEY", www_authenticate="Bearer"
            )
        live = self._usable()
        if scope["method"] == "GET":
            return {**live.as_dict(), **(await live.current()).describe()}
        change = live.parse(await read_body(scope, receive))
        async with live.lock:  # one change after the other
            self._usable()
            begin = time.perf_counter()
            async with self.gate.closed(change.max_drain_s):
                return await live.change(change, begin)

    def _usable(self) -> LiveMixture:
        if self.live is None:
            raise Refused(503, "the server has not started")
        if self.live.failure is not None:
            raise Refused(503, self.live.failure)
        return self.live

    def _authorized(self, scope: Any) -> bool:
        """Whether the request bears one of the server's API keys; compared in constant time."""
        if not self.tokens:
            return True
        given = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        digest = hashlib.sha256(token).digest()
        right = [secrets.compare_digest(digest, each) for each in self.tokens]
        return scheme.lower() == b"bearer" and any(right)

    @staticmethod
    def _path(scope: Any) -> str:
        return scope["path"].removeprefix(scope.get("root_path", ""))


class Gate:
    """Counts the requests that are being answered, and can be closed: those that come then wait."""

    def __init__(self) -> None:
        self._inside = 0
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        while not self._open.is_set():  # again: it may have been closed since
            await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self, patience_s: float) -> AsyncIterator[None]:
        """Let nobody in, and wait until nobody is inside. Raises Refused when that takes too long."""
        self._open.clear()
        try:
            try:
                async with asyncio.timeout(patience_s):
                    await self._empty.wait()
            except TimeoutError:
                raise still_busy(patience_s, f"{self._inside} requests are") from None
            yield
        finally:
            self._open.set()


def api_keys(args: Any) -> list[bytes]:
    """SHA-256 digests of the server's API keys: --api-key, else VLLM_API_KEY, as vLLM itself takes them."""
    given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    keys: Iterable[Any] = [given] if isinstance(given, str) else given
    return [hashlib.sha256(key.encode()).digest() for key in keys if key]


async def read_body(scope: Any, receive: Receive) -> bytes:
    """The whole body. Raises Refused when it is larger than MAX_BODY_BYTES, or the client went away."""
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client went away before its request was complete")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
        if sum(map(len, parts)) > MAX_BODY_BYTES:
            raise Refused(413, f"the request's body must not exceed {MAX_BODY_BYTES} bytes")
    return b"".join(parts)


async def respond(send: Send, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
    body = json.dumps(content).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **(headers or {}),
    }
    encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
