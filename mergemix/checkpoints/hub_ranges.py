"""Files on the Hugging Face Hub, read by byte ranges: the bytes of one commit, or an error that says why not.

The Hub's address of a file leads to a signed link to its storage, which holds for about an hour. The link is asked for
once and used for many ranges: the Hub counts the questions of a client, its storage does not
(huggingface.co/docs/hub/rate-limits).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.hub import translated
from mergemix.checkpoints.strict_json import shown
from mergemix.errors import CheckpointError

if TYPE_CHECKING:
    from mergemix.checkpoints.ranges import RangeFile

ATTEMPTS = 6  # in a row; a longer stretch of good bytes in between starts the count anew
PROGRESS_BYTES = 1 << 20
BACKOFF_SECONDS = 1.0  # before the second attempt, and twice as long before each one after it
MAX_WAIT_SECONDS = 330.0  # rate limits are for five minutes
BUSY = frozenset({408, 425, 429})  # and 500 to 599
REFUSED = frozenset({401, 403, 404, 410})  # what storage says of a link that has expired


def open_hub_file(file: HubFile) -> RangeFile:
    """The file on the Hub, which is first asked for at the first read.

    Raises CheckpointError where HF_HUB_OFFLINE forbids any question.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"{file.path} is on the Hub, but HF_HUB_OFFLINE forbids to read it there: unset it, or use what the "
            "cache holds, without --no-download"
        )
    return HubRanges(file)


@dataclass
class _Link:
    """Where the bytes are. etag: what storage calls them, once it has answered; not the Hub's name for them."""

    url: str
    headers: Mapping[str, str]
    etag: str | None = None


class _Interrupted(Exception):
    """One attempt failed, and another may not. asked_wait: seconds, where the server gave them."""

    def __init__(self, what: str, asked_wait: float = 0.0) -> None:
        super().__init__(what)
        self.asked_wait = asked_wait


class HubRanges:
    """A RangeFile on the Hub, used by several threads at once. Each answer is checked to be of the same file."""

    descriptor: int | None = None

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._interrupted = threading.Event()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the file's bytes from `offset` on; fewer, and 0, only at its end.

        Interrupted reads go on at the byte they reached, up to ATTEMPTS times.
        Raises CheckpointError when these do not suffice, or an answer is not what was asked for.
        """
        view = view.cast("B")
        count = max(0, min(len(view), self._file.nbytes - offset))
        done = failures = resumed_at = 0
        while done < count:
            try:
                for piece in self._pieces(offset + done, offset + count):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
            except _Interrupted as interruption:
                if done - resumed_at >= PROGRESS_BYTES:
                    failures = 0
                failures, resumed_at = failures + 1, done
                self._wait(failures, interruption)
        return count

    def check_unchanged(self) -> None:
        """Raise CheckpointError unless the Hub has the file as it was. Asks once: later answers are all checked."""
        failures = 0
        while True:
            try:
                self._current_link()
                return
            except _Interrupted as interruption:
                failures += 1
                self._wait(failures, interruption)

    def forget(self, offset: int, nbytes: int) -> None:
        """Nothing to do: no byte is kept."""

    def interrupt(self) -> None:
        """End the waits between attempts: their reads fail."""
        self._interrupted.set()

    def close(self) -> None:
        """Nothing to do: connections are huggingface_hub's, and shared."""

    def _pieces(self, begin: int, end: int) -> Iterator[bytes]:
        """The bytes [begin, end) as they arrive, by one request."""
        from huggingface_hub import constants, errors, get_session

        link = self._current_link()
        wanted = {**link.headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        session = get_session()
        left = end - begin
        try:
            with session.stream(
                "GET", link.url, headers=wanted, timeout=timeout, follow_redirects=True
            ) as response:
                self._check_answer(response, link, begin, end)
                for piece in response.iter_raw():
                    left -= len(piece)
                    if left < 0:
                        raise self._wrong(f"sent more than the {end - begin} bytes that were asked for")
                    yield piece
        except errors.HTTPError as error:
            raise _Interrupted(f"the connection failed ({_words(error)})") from error
        if left:
            raise self._wrong(f"ended {left} bytes before the end of the {end - begin} that it promised")

    def _check_answer(self, response: Any, link: _Link, begin: int, end: int) -> None:
        """Refuse an answer (httpx's) before its body is read, unless it is the range of the very same file."""
        status, headers = response.status_code, response.headers
        if status in BUSY or status >= 500:
            raise _Interrupted(f"the server answered with status {status}", _asked_wait(headers))
        if status in REFUSED:
            with self._lock:
                if self._link is link:
                    self._link = None
            raise _Interrupted(f"the server answered with status {status}")
        if status != 206:
            raise self._wrong(
                f"has status {status} where 206, a part of the file, was asked for: the server or a proxy before "
                "it does not give byte ranges"
            )
        promised, expected = headers.get("Content-Range"), f"bytes {begin}-{end - 1}/{self._file.nbytes}"
        if promised is None or promised.strip().lower() != expected:
            raise self._wrong(f"has the range {shown(promised)}, but {expected!r} was asked for")
        length = headers.get("Content-Length")
        if length is not None and length.strip() != str(end - begin):
            raise self._wrong(f"has a length of {shown(length)} bytes for a range of {end - begin}")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._wrong(f"is encoded as {shown(headers['Content-Encoding'])}, though not asked to be")
        with self._lock:
            etag = _plain(headers.get("ETag"))
            link.etag = link.etag or etag
            if etag != link.etag:
                raise self._changed(f"its ETag was {shown(link.etag)} and is {shown(etag)}")

    def _current_link(self) -> _Link:
        with self._lock:
            if self._link is None:
                self._link = self._ask()
            return self._link

    def _ask(self) -> _Link:
        """Ask the Hub where the file's bytes are, and whether it is still the same file."""
        from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        file = self._file
        url = hf_hub_url(file.repo, file.name, revision=file.commit)
        with translated(f"{file.repo}@{file.commit}"):
            try:
                found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except errors.EntryNotFoundError as error:
                raise CheckpointError(
                    f"{file.path} is not on the Hub any more; start again, with another revision"
                ) from error
            except errors.HTTPError as error:
                response = getattr(error, "response", None)
                if response is None:
                    raise _Interrupted(f"the connection failed ({_words(error)})") from error
                if response.status_code in BUSY or response.status_code >= 500:
                    asked = _asked_wait(response.headers)
                    raise _Interrupted(
                        f"the Hub answered with status {response.status_code}", asked
                    ) from error
                raise
        for what, was, now in (
            ("commit", file.commit, found.commit_hash),
            ("ETag", file.etag, found.etag),
            ("size", file.nbytes, file.nbytes if found.size is None else found.size),
        ):
            if was != now:
                raise self._changed(f"its {what} was {shown(was)} and is {shown(now)}")
        headers = build_hf_headers()
        if urlsplit(found.location)[:2] != urlsplit(url)[:2]:
            headers.pop("authorization", None)  # a token for the Hub is no business of its storage
        return _Link(found.location, headers)

    def _wait(self, failures: int, interruption: _Interrupted) -> None:
        """Wait before the next attempt; raise CheckpointError where there is none."""
        if failures == ATTEMPTS:
            raise CheckpointError(
                f"{self._file.path} cannot be read from the Hub: {ATTEMPTS} attempts in a row failed, the last as "
                f"{interruption}; nothing was written: check the network and run the same command again"
            ) from interruption
        seconds = max(BACKOFF_SECONDS * 2 ** (failures - 1), interruption.asked_wait)
        if seconds > MAX_WAIT_SECONDS:
            raise CheckpointError(
                f"{self._file.path} cannot be read from the Hub: {interruption} and asks to wait {seconds:.0f} "
                "seconds; nothing was written: run the same command again after that time"
            ) from interruption
        sleep(seconds, self._interrupted)
        if self._interrupted.is_set():
            raise CheckpointError(f"the read of {self._file.path} was interrupted") from interruption

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path} cannot be read from the Hub: the answer {what}; nothing was written: run the same "
            "command again, or without --no-download"
        )

    def _changed(self, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path} was changed on the Hub after it was opened ({how}): where its tensors lie is no "
            "longer known; nothing was written: start again"
        )


def sleep(seconds: float, interrupted: threading.Event) -> None:
    """Wait, but not longer than until `interrupted` is set."""
    interrupted.wait(seconds)


def _asked_wait(headers: Mapping[str, str]) -> float:
    """The seconds to wait that an answer names, in Retry-After (RFC 9110) or the Hub's RateLimit; 0 for none."""
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if limit := re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", "")):
        return float(limit[1])
    try:
        until = parsedate_to_datetime(after)
    except ValueError:
        return 0.0
    return (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


def _plain(etag: str | None) -> str | None:
    return etag and etag.removeprefix("W/").strip('"')


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
