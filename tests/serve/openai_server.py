"""A real vLLM OpenAI server in processes of its own, and a client of it, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
KEY = "a-secret"
MAX_TOKENS = 8
START_S = 500.0  # three processes that import vLLM, on a machine that may be busy


class Server:
    """A vLLM server in a session of its own, and a client that has its key."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--port={port}", *arguments]
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "GOMP_SPINCOUNT": "1000",
            "VLLM_SERVER_DEV_MODE": "1",  # /pause, and /collective_rpc to set a fault
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        }
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self.client = httpx.Client(
            base_url=self.url, timeout=120.0, headers={"Authorization": f"Bearer {KEY}"}
        )

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        pytest.fail(f"the server did not start: {self.log.read_text()[-3000:]}")

    def close(self) -> None:
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def put(self, weights: object, **more: object) -> httpx.Response:
        return self.client.put("/mergemix/mixture", json={"weights": weights, **more})

    def serve(self, weights: dict[str, float], **more: object) -> dict[str, Any]:
        """Change the mixture; returns what the endpoint answered."""
        response = self.put(weights, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def mixture(self) -> dict[str, Any]:
        response = self.client.get("/mergemix/mixture")
        assert response.status_code == 200, response.text
        return response.json()["mixture"]

    def complete(
        self, prompts: Sequence[str], max_tokens: int = MAX_TOKENS, path: str = "/v1/completions"
    ) -> list[str]:
        """Greedy answers to a single HTTP request."""
        response = self.client.post(path, json=question(prompts, max_tokens))
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert {choice["finish_reason"] for choice in choices} <= {"length", "stop"}
        return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def stream(self, max_tokens: int, started: threading.Event) -> str:
        """One answer, token by token; `started` is set when its first token has come."""
        asked = {**question(["the cat"], max_tokens), "stream": True}
        text = ""
        with self.client.stream("POST", "/v1/completions", json=asked) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    started.set()
        return text


def question(prompts: Sequence[str], max_tokens: int) -> dict[str, Any]:
    return {
        "model": "served",
        "prompt": list(prompts),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
