"""A host without vLLM, for tests of how an engine's process and its parent talk: started as vllm_host is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from mergemix.errors import ConfigError
from mergemix.serve.vllm_host import end_with_parent, open_connection, serve

Lists = Generator[list[Any], None, Any]


class StreamingHost:
    def __init__(self) -> None:
        self.closed = 0

    def echo(self, value: object) -> object:
        return value

    def closings(self) -> int:
        """How many endless streams were ended."""
        return self.closed

    def numbers(self, lists: list[list[int]]) -> Lists:
        yield from lists
        return len(lists)

    def wait_for(self, file: str) -> Lists:
        """A list, and another one when the file is there."""
        yield ["first"]
        while not Path(file).exists():
            time.sleep(0.01)
            yield []
        yield ["second"]

    def endless(self) -> Lists:
        try:
            while True:
                yield [1]
                time.sleep(0.01)
        finally:
            self.closed += 1

    def much(self, count: int, file: str) -> Lists:
        """Far more than a socket holds. The file is there when the last list was made."""
        for index in range(count):
            yield [(index, "x" * 1000)] * 10
        Path(file).touch()

    def fails(self, how: str) -> Lists:
        yield [1]
        time.sleep(0.1)
        yield [2]
        if how == "rule":
            raise ConfigError("a rule")
        if how == "bug":
            raise ZeroDivisionError("a bug")
        os._exit(7)

    def stop(self) -> None:
        pass


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]))
    serve(open_connection(int(sys.argv[1])), StreamingHost())
    os._exit(0)
