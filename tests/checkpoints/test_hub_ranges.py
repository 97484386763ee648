"""Ranges of a file on a stand-in Hub, through the real huggingface_hub client: the right bytes, or an error."""

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemix.checkpoints import hub_ranges
from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.hub_ranges import ATTEMPTS, open_hub_file
from mergemix.errors import CheckpointError
from tests.checkpoints.hub_stand_in import COMMIT, Fault, StandInHub, connect, serve

NAME = "model.safetensors"
CONTENT = random.Random(0).randbytes(50_000)
FILE = HubFile("org/expert", COMMIT, NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
SHOWN = f"org/expert@{COMMIT[:12]}/{NAME}"


@pytest.fixture(params=[False, True], ids=["hub", "storage"])
def storage(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def hub(tmp_path: Path, storage: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / NAME).write_bytes(CONTENT)
    hub = StandInHub("org/expert", tmp_path / "repo", {"main": COMMIT}, storage=storage)
    with serve(hub):
        connect(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between attempts."""
    seconds: list[float] = []
    monkeypatch.setattr(hub_ranges, "sleep", lambda wait, interrupted: seconds.append(wait))
    return seconds


def read(offset: int = 100, nbytes: int = 20_000) -> bytes:
    buffer = bytearray(b"\xaa" * nbytes)
    assert open_hub_file(FILE).read_into(memoryview(buffer), offset) == nbytes
    return bytes(buffer)


def refused(*words: str) -> None:
    """Reading must fail with one message that has these words, the file, and what became of the output."""
    with pytest.raises(CheckpointError) as caught:
        read()
    for word in (SHOWN, "nothing was written", *words):
        assert word in str(caught.value)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    offset=st.integers(0, len(CONTENT) + 10),
    nbytes=st.integers(0, 2000),
    drops=st.lists(st.integers(0, 2000), max_size=2),
)
def test_any_range_is_read_into_the_place_given(
    hub: StandInHub, waits: list[float], offset: int, nbytes: int, drops: list[int]
) -> None:
    hub.faults[NAME] = [Fault(drop_after=count) for count in drops]
    buffer = bytearray(b"\xaa" * (nbytes + 20))
    expected = CONTENT[offset : offset + nbytes]
    assert open_hub_file(FILE).read_into(memoryview(buffer)[10 : 10 + nbytes], offset) == len(expected)
    assert buffer == b"\xaa" * 10 + expected + b"\xaa" * (10 + nbytes - len(expected))


def test_many_threads_share_a_file_and_one_link(hub: StandInHub) -> None:
    file = open_hub_file(FILE)
    offsets = list(range(0, len(CONTENT), 997))

    def part(offset: int) -> bytes:
        buffer = bytearray(997)
        return bytes(buffer[: file.read_into(memoryview(buffer), offset)])

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(part, offsets)) == CONTENT
    file.check_unchanged()
    file.close()
    assert len(hub.requests("HEAD", NAME)) == 1
    assert len(hub.requests("GET", NAME)) == len(offsets)


def test_the_token_goes_to_the_hub_only(
    hub: StandInHub, storage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert read() == CONTENT[100:20_100]
    assert [request.authorized for request in hub.log] == [True, not storage]
    assert hub.log[1].host.startswith("localhost" if storage else "127.0.0.1")


@pytest.mark.parametrize("after", [0, 1, 12_345, 19_999])
def test_a_dropped_connection_goes_on_at_the_byte_it_reached(
    hub: StandInHub, waits: list[float], after: int
) -> None:
    hub.faults[NAME] = [Fault(drop_after=after), Fault(drop_after=0)]
    assert read() == CONTENT[100:20_100]
    ranges = [request.range for request in hub.requests("GET", NAME)]
    assert ranges == ["bytes=100-20099", *[f"bytes={100 + after}-20099"] * 2]
    assert waits == [1, 2]


def test_a_silent_connection_is_given_up(
    hub: StandInHub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults[NAME] = [Fault(drop_after=500, stall=True)]
    assert read() == CONTENT[100:20_100]
    assert [request.range for request in hub.requests("GET", NAME)][1] == "bytes=600-20099"


def test_waits_double_and_servers_can_ask_for_longer_ones(hub: StandInHub, waits: list[float]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    hub.faults[NAME] = [
        Fault(status=503, headers={"Retry-After": "7"}),
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "2"}),
        Fault(status=429, headers={"RateLimit": '"resolvers";r=0;t=55'}),
        Fault(status=500, headers={"Retry-After": date}),
    ]
    assert read() == CONTENT[100:20_100]
    assert waits[:4] == [7, 2, 4, 55]
    assert 90 < waits[4] <= 100


def test_a_server_that_asks_for_an_hour_is_not_waited_for(hub: StandInHub, waits: list[float]) -> None:
    hub.faults[NAME] = [Fault(status=429, headers={"Retry-After": "3600"})]
    refused("status 429", "asks to wait 3600 seconds")
    assert waits == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=503), "status 503"),
        (Fault(drop_after=0), "the connection failed"),
        (Fault(status=403), "status 403"),
    ],
)
def test_attempts_end(hub: StandInHub, waits: list[float], fault: Fault, words: str) -> None:
    hub.faults[NAME] = [fault] * ATTEMPTS
    refused(words, f"{ATTEMPTS} attempts in a row failed", "check the network")
    assert waits == [1, 2, 4, 8, 16]
    assert read() == CONTENT[100:20_100], "the next attempt would have been good"


def test_attempts_are_counted_anew_after_a_long_good_stretch(
    hub: StandInHub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_ranges, "PROGRESS_BYTES", 1000)
    hub.faults[NAME] = [Fault(drop_after=1000)] * (ATTEMPTS + 2)
    assert read() == CONTENT[100:20_100]
    assert waits == [1] * (ATTEMPTS + 2)
    hub.faults[NAME] = [Fault(drop_after=999)] * ATTEMPTS
    refused("attempts in a row")


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


UNSIZED = {"Content-Length": None, "Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=200), ["status 200 where 206"]),
        (Fault(status=418), ["status 418 where 206"]),
        (Fault(headers={"Content-Range": None}), ["range None"]),
        (Fault(headers={"Content-Range": "bytes 0-19999/50000"}), ["bytes 0-19999/50000", "bytes 100-20099/50000"]),
        (Fault(headers={"Content-Range": "bytes 100-20099/50001"}), ["bytes 100-20099/50001"]),
        (Fault(headers={"Content-Length": "20001"}, body=lambda body: body + b"x"), ["length of '20001'", "20000"]),
        (Fault(headers={"Content-Length": "19999"}), ["length of '19999' bytes for a range of 20000"]),
        (Fault(headers=UNSIZED, body=lambda body: chunked(body + b"x")), ["more than the 20000 bytes"]),
        (Fault(headers=UNSIZED, body=lambda body: chunked(body[:-1])), ["ended 1 bytes before the end"]),
        (Fault(headers={"Content-Encoding": "gzip"}), ["encoded as 'gzip'"]),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_refused_at_once(
    hub: StandInHub, waits: list[float], fault: Fault, words: list[str]
) -> None:
    hub.faults[NAME] = [fault]
    refused("cannot be read from the Hub", *words)
    assert waits == []


def test_a_file_that_changes_midway_is_refused(hub: StandInHub, waits: list[float]) -> None:
    hub.faults[NAME] = [Fault(drop_after=5000), Fault(headers={"ETag": '"other"'})]
    refused("was changed on the Hub", "ETag", "other")
    # As truncated, and as replaced by one of the same size, which the Hub tells when it is asked again.
    file = open_hub_file(FILE)
    file.check_unchanged()
    (hub.root / NAME).write_bytes(CONTENT[:-1])
    for offset, words in ((100, "has the range"), (len(CONTENT) - 1, "has status 416")):
        with pytest.raises(CheckpointError, match=words):
            file.read_into(memoryview(bytearray(10)), offset)
    refused("was changed on the Hub", "ETag")
    (hub.root / NAME).write_bytes(CONTENT[::-1])
    refused("was changed on the Hub", "ETag")
    (hub.root / NAME).write_bytes(CONTENT)
    for other, words in ((replace(FILE, nbytes=50_001), "size"), (replace(FILE, etag="e"), "ETag")):
        with pytest.raises(CheckpointError, match=f"changed on the Hub.*its {words} was"):
            open_hub_file(other).check_unchanged()


def test_a_server_that_is_not_at_the_commit_is_refused(hub: StandInHub) -> None:
    hub.link_faults[NAME] = [Fault(headers={"X-Repo-Commit": COMMIT[::-1]})]
    refused("its commit was", COMMIT[::-1])
    hub.link_faults[NAME] = [Fault(headers={"X-Repo-Commit": None})]
    refused("its commit was", "None")


@pytest.mark.parametrize("storage", [True], indirect=True)
def test_an_expired_link_is_asked_for_again(hub: StandInHub, waits: list[float]) -> None:
    file = open_hub_file(FILE)
    buffer = bytearray(10)
    for signature in ("first", "second"):
        hub.signature = signature
        file.read_into(memoryview(buffer), 5)
        assert buffer == CONTENT[5:15]
    assert len(hub.requests("HEAD", NAME)) == 2
    hub.signature = "third"
    hub.gated = True
    with pytest.raises(CheckpointError, match="access to this repository must be requested"):
        file.read_into(memoryview(buffer), 5)


def test_the_question_for_the_link_is_repeated_too(hub: StandInHub, waits: list[float]) -> None:
    hub.link_faults[NAME] = [Fault(status=503, headers={"Retry-After": "9"}), Fault(status=429)]
    assert read() == CONTENT[100:20_100]
    hub.link_faults[NAME] = [Fault(status=502)]
    open_hub_file(FILE).check_unchanged()
    assert waits == [9, 2, 1]
    hub.link_faults[NAME] = [Fault(status=503)] * ATTEMPTS
    with pytest.raises(CheckpointError, match="attempts in a row"):
        open_hub_file(FILE).check_unchanged()


def test_what_is_gone_or_closed_is_told_as_of_downloads(hub: StandInHub) -> None:
    (hub.root / NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{SHOWN} is not on the Hub any more"):
        read()
    with pytest.raises(CheckpointError, match="neither a local directory nor a repository"):
        open_hub_file(replace(FILE, repo="org/absent")).check_unchanged()
    with pytest.raises(CheckpointError, match="no such branch, tag or commit"):
        open_hub_file(replace(FILE, commit=COMMIT[::-1])).check_unchanged()
    hub.gated = True
    with pytest.raises(CheckpointError, match="hf auth login"):
        read()


def test_without_a_network_the_error_says_so(
    hub: StandInHub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9/{repo_id}/{revision}/{filename}"  # the discard port: nothing listens
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    refused("the connection failed", "check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"{SHOWN} .*HF_HUB_OFFLINE.*--no-download"):
        read()
    assert hub.log == []
