"""A stand-in for the Hugging Face Hub on loopback: NOT the Hub, only the endpoints that reading it uses.

It answers HEAD and GET of /ORG/NAME/resolve/REVISION/FILE, byte ranges included, and GET of
/api/models/ORG/NAME[/revision/REVISION] and /api/models/ORG/NAME/tree/COMMIT as huggingface_hub 2.4 expects them.
Weights can be redirected to a storage of their own, under signed links. It keeps a log of requests, can go wrong
in the ways of `Fault`, and can change while a client is between two requests.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """How one answer goes wrong.

    status: the answer's; 200 has the whole file, an error no body. headers: others than the true ones; None: left
    out. body: what is sent instead of the true one, whatever the headers promise. drop_after: bytes of the body
    after which the connection ends. stall: then it stays open, silent, until the client leaves.
    """

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: Callable[[bytes], bytes] = lambda body: body
    drop_after: int | None = None
    stall: bool = False


@dataclass
class Request:
    """What was asked of a hub. file: whose contents; None: the API. host, range: the headers Host and Range."""

    method: str
    path: str
    file: str | None
    host: str
    range: str | None
    authorized: bool


@dataclass
class StandInHub:
    """One repository. revisions: commits by name. faults: of the next GETs of a file's contents, by its name.

    link_faults: as `faults`, of HEAD, which asks where they are. storage: weights are redirected to another host
    (localhost for 127.0.0.1), where `signature` lets one in. after_info: called once, when the first answer on
    the list of files stands but has not left yet.
    """

    repo: str
    root: Path
    revisions: dict[str, str]
    gated: bool = False
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    link_faults: dict[str, list[Fault]] = field(default_factory=dict)
    storage: bool = False
    signature: str = "first"
    after_info: Callable[[], None] | None = None
    log: list[Request] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means; None when there is none."""
        return self.revisions.get(revision, revision if revision in self.revisions.values() else None)

    def fetched(self) -> set[str]:
        """The files whose contents were asked for, in whole or in part."""
        return {request.file for request in self.log if request.method == "GET" and request.file}

    def requests(self, method: str, file: str) -> list[Request]:
        """Those for a file, in order."""
        return [request for request in self.log if (request.method, request.file) == (method, file)]


@contextmanager
def serve(*hubs: StandInHub) -> Iterator[None]:
    """Serve the repositories on one free port of the loopback interface until the end of the block."""
    handler = type("Handler", (_Handler,), {"hubs": hubs})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    for hub in hubs:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def connect(hub: StandInHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Point this process's huggingface_hub, and all that was imported from it, at the served `hub`."""
    import huggingface_hub
    from huggingface_hub import constants

    huggingface_hub.close_session()  # it keeps the proxies of the time when it was opened
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """Clients that leave early are what tests are about: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are written apart: without this, the client's delayed acknowledgement costs 40 ms each time.
    disable_nagle_algorithm = True
    hubs: tuple[StandInHub, ...]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        hub = next((hub for hub in self.hubs if f"/{hub.repo}/" in f"{path}/"), None)
        if hub is None:
            return self.fail(401, "RepoNotFound")
        named = re.match(r"/storage/[^/]+/[^/]+/(.+)|/[^/]+/[^/]+/resolve/[^/]+/(.+)", path)
        file = (named[1] or named[2]) if named else None
        asked, host = self.headers.get("Range"), str(self.headers.get("Host"))
        authorized = self.headers.get("Authorization") is not None
        hub.log.append(Request(self.command, path, file, host, asked, authorized))
        if path.startswith(f"/storage/{hub.repo}/"):
            if address.query != hub.signature:
                return self.reply(403, b"", {})
            file = path.removeprefix(f"/storage/{hub.repo}/")
            content = (hub.root / file).read_bytes()
            return self.content(hub, file, content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})
        if path == f"/api/models/{hub.repo}" or path.startswith(f"/api/models/{hub.repo}/revision/"):
            return self.info(hub, path, "blobs=" in address.query.lower())
        if path.startswith(f"/api/models/{hub.repo}/tree/"):
            return self.json([{"type": "file", "path": name, **about} for name, about in _files(hub).items()])
        if hub.gated:
            return self.fail(403, "GatedRepo")
        revision, _, file = path.removeprefix(f"/{hub.repo}/resolve/").partition("/")
        self.resolve(hub, revision, file)

    def info(self, hub: StandInHub, path: str, metadata: bool) -> None:
        commit = hub.commit(path.rpartition("/")[2]) if "/revision/" in path else hub.commit("main")
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        siblings: list[dict[str, Any]] = [{"rfilename": name} for name in _files(hub)]
        if metadata:
            siblings = [
                {"rfilename": name, "blobId": about["oid"], **about} for name, about in _files(hub).items()
            ]
        after, hub.after_info = hub.after_info, None
        if after:
            after()  # before the answer leaves, so that the client's next question meets the new state
        self.json({"id": hub.repo, "sha": commit, "siblings": siblings})

    def resolve(self, hub: StandInHub, revision: str, file: str) -> None:
        commit = hub.commit(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        if not (hub.root / file).is_file():
            return self.fail(404, "EntryNotFound")
        content = (hub.root / file).read_bytes()
        headers = {"X-Repo-Commit": commit}
        if hub.storage and file.endswith(".safetensors"):
            port = self.connection.getsockname()[1]
            headers |= {
                "X-Linked-ETag": f'"{_etag(file, content)}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"http://localhost:{port}/storage/{hub.repo}/{file}?{hub.signature}",
            }
            return self.reply(302, b"", headers, _next(hub.link_faults, file))
        self.content(hub, file, content, headers | {"ETag": f'"{_etag(file, content)}"'})

    def content(self, hub: StandInHub, file: str, content: bytes, headers: dict[str, str]) -> None:
        """The file, or the part of it that was asked for."""
        fault = _next(hub.faults if self.command == "GET" else hub.link_faults, file)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or fault.status == 200:
            return self.reply(200, content, headers, fault)
        begin, end = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if begin >= len(content):
            return self.reply(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.reply(206, content[begin:end], headers, fault)

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def reply(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        fault = fault or Fault()
        status = fault.status or status
        if status >= 400:
            body = b""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), **fault.headers}.items():
            if value is not None:
                self.send_header(key, value)
        if fault != Fault() and fault.drop_after is None:
            self.send_header("Connection", "close")  # or the client might meet the end in its next question
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(fault.body(body)[: fault.drop_after])
        if fault.stall:
            self.rfile.read(1)  # nothing comes: it ends when the client leaves
        if fault != Fault():
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


def _next(faults: dict[str, list[Fault]], file: str) -> Fault:
    """The next fault of the file's answers; none in the end."""
    waiting = faults.get(file)
    return waiting.pop(0) if waiting else Fault()


def _etag(file: str, content: bytes) -> str:
    """As the Hub: the SHA-256 of a file in Git LFS, which weights are, or else git's id (here of the same length)."""
    return (hashlib.sha256 if file.endswith(".safetensors") else hashlib.sha1)(content).hexdigest()


def _files(hub: StandInHub) -> dict[str, dict[str, Any]]:
    """What the API tells of each file, by name."""
    files = {}
    for path in sorted(path for path in hub.root.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(hub.root)), path.read_bytes()
        files[name] = {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            sha256 = _etag(name, content)
            files[name]["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(content), "pointerSize": 134}
    return files
