"""Valid headers are read as the safetensors library wrote them; every attack ends in one CheckpointError."""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mergemix.checkpoints import header, strict_json
from mergemix.checkpoints.files import HubFile
from mergemix.checkpoints.header import MAX_TENSORS, read_header, read_hub_header
from mergemix.errors import CheckpointError
from tests.checkpoints.hub_stand_in import COMMIT, StandInHub, connect, serve


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# name: (header as an object or raw bytes, data bytes, words that the message must hold)
ATTACKS: dict[str, tuple[object, int, tuple[str, ...]]] = {
    "not json": (b"{not json", 0, ("not valid JSON",)),
    "not utf-8": (b'{"\xff": 1}', 0, ("UTF-8",)),
    "not an object": (b"[1, 2]", 0, ("begin with '{'",)),
    "leading space": (b' {"a": 1}', 0, ("begin with '{'",)),
    "empty": (b"", 0, ("begin with '{'",)),
    "deep nesting": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0, ("nested too deeply",)),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, ("nested too deeply",)),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        ("'a'", "twice"),
    ),
    "duplicate key": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        ("'dtype'", "twice"),
    ),
    "lone surrogate": (
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        ("valid Unicode",),
    ),
    "metadata number": ({"__metadata__": {"step": 3}}, 0, ("strings only", "'step'", "3")),
    "metadata list": ({"__metadata__": []}, 0, ("__metadata__", "object")),
    "entry number": ({"a": 3}, 0, ("'a'", "exactly dtype, shape and data_offsets")),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 0, ("'a'", "exactly")),
    "additional key": ({"a": entry() | {"strides": [1]}}, 8, ("'a'", "exactly", "strides")),
    "unknown dtype": ({"a": entry("F33")}, 8, ("'a'", "dtype must be one of", "F33")),
    "dtype list": ({"a": entry(["F32"])}, 8, ("'a'", "dtype must be one of")),
    "shape number": ({"a": entry(shape=2)}, 8, ("'a'", "shape")),
    "negative size": ({"a": entry(shape=[-2])}, 8, ("'a'", "shape", "-2")),
    "boolean size": ({"a": entry(shape=[2, True])}, 8, ("'a'", "shape", "True")),
    "float size": ({"a": entry(shape=[2.0])}, 8, ("'a'", "shape", "2.0")),
    "infinite size": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', 8, ("'a'", "shape")),
    "huge size": ({"a": entry(shape=[2**63])}, 8, ("'a'", "shape")),
    "integer of 10000 digits": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}',
        8,
        (),
    ),
    "size overflow": ({"a": entry(shape=[2**33, 2**33])}, 8, ("'a'", "overflows")),
    "size overflow to zero": ({"a": entry(shape=[2**62, 2**62, 0], offsets=(0, 0))}, 0, ("'a'", "overflows")),
    "offsets of one": ({"a": entry(offsets=[8])}, 8, ("'a'", "data_offsets")),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, 8, ("'a'", "data_offsets", "-8")),
    "offsets boolean": ({"a": entry("U8", [1], [False, True])}, 1, ("'a'", "data_offsets")),
    "offsets float": ({"a": entry(offsets=[0, 8.0])}, 8, ("'a'", "data_offsets")),
    "offsets huge": ({"a": entry(offsets=[0, 2**64])}, 8, ("'a'", "data_offsets")),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, 8, ("'a'", "end before they begin")),
    "bytes too few": ({"a": entry(offsets=[0, 4])}, 4, ("'a'", "takes 8 bytes", "4 bytes")),
    "bytes too many": ({"a": entry(offsets=[0, 12])}, 12, ("'a'", "takes 8 bytes", "12 bytes")),
    "half a byte": ({"a": entry("F4", [3], [0, 1])}, 1, ("'a'", "takes 1.5 bytes")),
    "hole at the start": ({"a": entry(offsets=[8, 16])}, 16, ("'a'", "hole", "the header")),
    "hole": ({"a": entry(), "b": entry(offsets=[16, 24])}, 24, ("'b'", "hole", "'a'")),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, ("'b'", "overlaps", "'a'")),
    "same bytes": ({"a": entry(), "b": entry()}, 8, ("'b'", "overlaps", "'a'")),
    "truncated data": ({"a": entry()}, 7, ("truncated",)),
    "no data": ({"a": entry()}, 0, ("truncated",)),
    "trailing data": ({"a": entry()}, 9, ("1 bytes after its last tensor",)),
    "trailing data without tensors": ({}, 1, ("1 bytes after its last tensor",)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_in_words(tmp_path: Path, attack: str) -> None:
    header, num_bytes, words = ATTACKS[attack]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = write_raw(tmp_path / "model.safetensors", raw, b"\0" * num_bytes)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message
    assert len(message) < 1000


NO_SAFETENSORS = [
    (b"", "length"),
    (b"\1\2\3", "length"),
    (struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "at most 100000000"),
    (struct.pack("<Q", 3) + b"{}", "truncated"),
    (b"PK\3\4 a zip file, as torch.save writes it", "at most"),
    (b"version https://git-lfs.github.com/spec/v1\n", "at most"),
]


@pytest.mark.parametrize(("content", "words"), NO_SAFETENSORS)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_header(path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    root = tmp_path_factory.mktemp("hub")
    hub = StandInHub("org/attacks", root, {"main": COMMIT}, storage=True)
    with serve(hub), pytest.MonkeyPatch.context() as patch:
        connect(hub, root / "cache", patch)
        yield hub


def test_a_remote_file_is_refused_in_the_words_for_a_local_one(hub: StandInHub) -> None:
    raws = [
        header if isinstance(header, bytes) else json.dumps(header).encode()
        for header, _, _ in ATTACKS.values()
    ]
    sizes = [num_bytes for _, num_bytes, _ in ATTACKS.values()]
    attacks = [
        struct.pack("<Q", len(raw)) + raw + b"\0" * size for raw, size in zip(raws, sizes, strict=True)
    ]
    path = hub.root / "model.safetensors"
    for content in (*attacks, *(content for content, _ in NO_SAFETENSORS)):
        path.write_bytes(content)
        file = HubFile(hub.repo, COMMIT, path.name, len(content), hashlib.sha256(content).hexdigest())
        messages = []
        for place, read in ((path, lambda: read_header(path)), (file.path, lambda: read_hub_header(file))):  # noqa: B023
            with pytest.raises(CheckpointError) as caught:
                read()
            messages.append(str(caught.value).replace(str(place), "the file"))
        assert messages[0] == messages[1]


def test_a_directory_or_nothing_at_the_path_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="not a file"):
            read_header(path)


def test_a_million_tensors_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(b'"%d":%b' % (number, empty) for number in range(1_000_000)) + b"}"
    path = write_raw(tmp_path / "model.safetensors", raw)
    # Parsing them would take seconds and gigabytes.
    monkeypatch.setattr(strict_json.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match=rf"'{{' 1000001 times; .*for {MAX_TENSORS} tensors"):
        read_header(path)


@pytest.mark.parametrize("value", [b"[],", b"{},", b'"",', b'"a":0,'])
def test_many_small_values_are_refused_before_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes
) -> None:
    path = write_raw(tmp_path / "model.safetensors", b'{"a":[' + value * 4_000_000 + b"]}")
    monkeypatch.setattr(strict_json.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match=r"400000[01] times; at most"):
        read_header(path)


def test_as_many_tensors_as_are_accepted_may_have_metadata_and_many_dimensions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = b'"t":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]},'
    raw = b'{"__metadata__":{"config":"' + b"{[:," * 99_990 + b'"},' + tensor * MAX_TENSORS + b'"":{}}'
    monkeypatch.setattr(strict_json.json, "loads", lambda *_, **__: {})
    assert strict_json.parse_object(raw, "a header") == {}


def test_more_tensors_than_are_accepted_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_TENSORS", 2)
    path = write_raw(tmp_path / "model.safetensors", json.dumps({name: {} for name in "abc"}).encode())
    with pytest.raises(CheckpointError, match="3 tensors; at most 2"):
        read_header(path)


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
]  # fmt: skip
TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES)),
    max_size=8,
)


@settings(deadline=None)
@given(specs=TENSORS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_what_the_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, specs: dict, metadata: dict
) -> None:
    path = tmp_path_factory.mktemp("header") / "model.safetensors"
    tensors = {
        name: torch.randint(0, 2, shape, dtype=torch.uint8).to(dtype)
        for name, (shape, dtype) in specs.items()
    }
    save_file(tensors, path, metadata=metadata or None)
    content = path.read_bytes()
    found = read_header(path)
    assert {info.name for info in found} == set(tensors)
    for info in found:
        tensor = tensors[info.name]
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.nbytes
        data = bytearray(content[info.offset : info.offset + info.nbytes])
        if data:
            assert torch.equal(torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape), tensor)


VALID = save({"weight": torch.ones(3, 2), "bias": torch.zeros(4, dtype=torch.bfloat16)}, {"format": "pt"})


@settings(deadline=None, max_examples=300)
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(VALID) - 1),
            st.integers(0, 3),
            st.one_of(
                st.binary(max_size=3), st.sampled_from([b"-", b"0", b"9", b'"', b"[", b"}", b"e9", b","])
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_file_is_read_or_refused_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    damaged = bytearray(VALID)
    for position, removed, inserted in edits:
        damaged[position : position + removed] = inserted
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    path.write_bytes(damaged)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in tensors) == len(damaged) - 8 - struct.unpack("<Q", damaged[:8])[0]
