"""A stand-in for the Hugging Face Hub on loopback: NOT the Hub, only the endpoints that a download uses.

It answers HEAD and GET of /ORG/NAME/resolve/REVISION/FILE and GET of /api/models/ORG/NAME[/revision/REVISION]
and /api/models/ORG/NAME/tree/COMMIT as huggingface_hub 2.4 expects them, keeps a log of requests, can drop
one connection halfway, and can change while a client is between two requests.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandInHub:
    """One repository. revisions: commits by name. log: (method, path, Range header). drop: a file, once.

    after_info: called once, when the first answer on the list of files stands but has not left yet.
    """

    repo: str
    root: Path
    revisions: dict[str, str]
    gated: bool = False
    drop: str | None = None
    after_info: Callable[[], None] | None = None
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit means; None when there is none."""
        return self.revisions.get(revision, revision if revision in self.revisions.values() else None)

    def fetched(self) -> set[str]:
        """The files whose contents were asked for."""
        prefix = f"/{self.repo}/resolve/"
        return {
            path.removeprefix(prefix).split("/", 1)[1]
            for method, path, _ in self.log
            if method == "GET" and path.startswith(prefix)
        }


@contextmanager
def serve(*hubs: StandInHub) -> Iterator[None]:
    """Serve the repositories on one free port of the loopback interface until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            named = [
                hub for hub in hubs if f"{path}/".startswith((f"/api/models/{hub.repo}/", f"/{hub.repo}/"))
            ]
            if not named:
                return self.fail(401, "RepoNotFound")
            hub = named[0]
            hub.log.append((self.command, path, self.headers.get("Range")))
            if path == f"/api/models/{hub.repo}" or path.startswith(f"/api/models/{hub.repo}/revision/"):
                self.info(hub, path)
            elif path.startswith(f"/api/models/{hub.repo}/tree/"):
                self.tree(hub)
            else:
                if hub.gated:
                    return self.fail(403, "GatedRepo")
                revision, _, file = path.removeprefix(f"/{hub.repo}/resolve/").partition("/")
                self.resolve(hub, revision, file)

        def tree(self, hub: StandInHub) -> None:
            files = sorted(path for path in hub.root.rglob("*") if path.is_file())
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(hub.root)),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in files
            ]
            self.reply(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

        def info(self, hub: StandInHub, path: str) -> None:
            commit = hub.commit(path.rpartition("/")[2]) if "/revision/" in path else hub.commit("main")
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            names = sorted(str(path.relative_to(hub.root)) for path in hub.root.rglob("*") if path.is_file())
            info = {"id": hub.repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            after, hub.after_info = hub.after_info, None
            if after:
                after()  # before the answer leaves, so that the client's next question meets the new state
            self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def resolve(self, hub: StandInHub, revision: str, file: str) -> None:
            commit = hub.commit(revision)
            if commit is None:
                return self.fail(404, "RevisionNotFound")
            if not (hub.root / file).is_file():
                return self.fail(404, "EntryNotFound")
            content = (hub.root / file).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            begin = 0
            if self.headers.get("Range"):
                begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            drop = self.command == "GET" and hub.drop == file
            if drop:
                hub.drop = None
            self.reply(206 if begin else 200, content[begin:], headers, drop)

        def fail(self, status: int, code: str) -> None:
            self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def reply(self, status: int, body: bytes, headers: dict[str, str], drop: bool = False) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if drop else body)
            if drop:
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for hub in hubs:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
