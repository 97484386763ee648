"""What an engine's process and its parent say to each other, over one socket, all of it pickled.

The parent says (method, arguments). A method that returns is answered by (DONE, result), one that raises by
(FAILED, exception). One that yields lists is answered by (PART, list) any number of times first; the parent may say
CANCEL meanwhile, which ends it after its next list.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

PART, DONE, FAILED = "part", "done", "failed"
CANCEL = "cancel"
# A part is sent when there is so much of it, or the last one was sent so long ago.
PART_LENGTH = 64
PART_S = 0.05
REMEMBERED_REQUESTS = 1 << 17


class ParentGoneError(Exception):
    """Nobody listens any more."""


def send_parts(connection: Connection, lists: Generator[list[Any], None, Any]) -> Any:
    """Send the elements of what `lists` yields; returns what it returns, None where the parent cancelled it.

    While `lists` goes on, nothing waits for the parent to read: what it is too slow for is sent later.
    Raises what `lists` raises, and ParentGoneError; `lists` is closed in any case.
    """
    waiting: list[Any] = []
    sent = time.monotonic()
    try:
        while True:
            try:
                waiting += next(lists)
            except StopIteration as end:
                result = end.value
                break
            if connection.poll():
                _receive(connection)
                return None
            if len(waiting) >= PART_LENGTH or time.monotonic() - sent >= PART_S:
                while waiting and _has_room(connection):
                    _send(connection, waiting[:PART_LENGTH])
                    del waiting[:PART_LENGTH]
                sent = time.monotonic()
    finally:
        lists.close()
    for begin in range(0, len(waiting), PART_LENGTH):
        _send(connection, waiting[begin : begin + PART_LENGTH])
    return result


def _send(connection: Connection, part: list[Any]) -> None:
    try:
        connection.send((PART, part))
    except OSError as error:
        raise ParentGoneError from error


def _receive(connection: Connection) -> None:
    """What says that the parent wants no more."""
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        raise ParentGoneError from error
    assert message == CANCEL, "the parent asks nothing else meanwhile"


def _has_room(connection: Connection) -> bool:
    """Whether the socket takes a part without waiting."""
    watch = select.poll()  # select() refuses descriptors above 1023
    watch.register(connection.fileno(), select.POLLOUT)
    return bool(watch.poll(0))


class SentRequests:
    """Requests that a process was sent and remembers, so that they need not be pickled and encoded for every candidate.

    Known again by identity: they never change, and comparing thousands of texts would cost what it saves.
    """

    def __init__(self) -> None:
        self._held: dict[
            int, tuple[int, Any]
        ] = {}  # by id: its number, and the request itself, so that the id stays
        self._count = 0

    def stream(
        self, ask: Callable[..., Generator[Any, None, Any]], requests: Sequence[Any], *arguments: object
    ) -> Generator[Any, None, Any]:
        """What `ask(forget, new, numbers, *arguments)` gives. numbers: of the requests. new: those not sent yet, by
        number. forget: whether all that was sent before is to be forgotten first.
        """
        forget = len(self._held) + len(requests) > REMEMBERED_REQUESTS
        if forget:
            self._held.clear()
        new: dict[int, tuple[int, Any]] = {}
        numbers = []
        for request in requests:
            known = self._held.get(id(request)) or new.get(id(request))
            if known is None:
                known = new[id(request)] = self._count, request
                self._count += 1
            numbers.append(known[0])
        result = yield from ask(forget, dict(new.values()), numbers, *arguments)
        self._held |= new  # only now: one that cannot fit is not remembered there
        return result
