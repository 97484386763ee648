"""Corpora: what a line becomes, what is refused and how, and the cache of token ids."""

from __future__ import annotations

import json
import os
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError, CorpusError, OutputError
from mergemix.train import corpus as corpus_module
from mergemix.train.batches import IGNORED, Batches, TokenStream
from mergemix.train.corpus import Corpus, open_corpus
from mergemix.train.documents import Document, Encoder
from mergemix.train.plan import make_plan
from tests.serve.tiny_models import tiny_tokenizer
from tests.train.files import write_lines

END = 1


def opened(path: Path, cache: Path, tokenizer: Any = None) -> Corpus:
    return open_corpus(path, tokenizer or tiny_tokenizer(bos=False), "key", cache, lambda done, total: None)


def test_documents_lie_end_to_end_with_the_end_token_between(tmp_path: Path) -> None:
    rows = [{"text": "abc the"}, {"prompt": "1+1=", "answer": "2"}, {"text": "in", "source": "somewhere"}]
    corpus = opened(write_lines(tmp_path / "c.jsonl", rows), tmp_path / "cache")
    tokenizer = tiny_tokenizer(bos=False)
    expected = [
        [*tokenizer("abc the")["input_ids"], END], [*tokenizer("1+1=2")["input_ids"], END],
        [*tokenizer("in")["input_ids"], END],
    ]  # fmt: skip
    found = [corpus.tokens[a:b].tolist() for a, b in zip(corpus.offsets, corpus.offsets[1:], strict=False)]
    assert found == expected
    assert corpus.prompts.tolist() == [0, 4, 0]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.largest == max(map(max, expected))


def test_a_prompt_has_the_tokens_that_an_engine_gives_it() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    [(ids, prompt)] = Encoder(tokenizer).encode(
        [Document("say th", "e abc")]
    )  # "the" is one token of the whole
    assert ids[:prompt] == tokenizer("say th")["input_ids"]
    assert ids[prompt:] == [*tokenizer("e abc", add_special_tokens=False)["input_ids"], END]
    [(ids, prompt)] = Encoder(tokenizer).encode([Document("say", " the abc")])
    assert ids == [*tokenizer("say the abc")["input_ids"], END]
    assert tokenizer.convert_ids_to_tokens(ids[prompt : prompt + 1]) == [" the"]


def test_begin_and_end_are_never_there_twice() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    documents = [Document("", "abc"), Document("", "<s>abc</s>")]
    assert [ids for ids, _ in Encoder(tokenizer).encode(documents)] == [
        [*tokenizer("abc")["input_ids"], END]
    ] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "\xff"}', "line 3: is not UTF-8 at byte 10"),
        (b"text", "line 3: is not JSON"),
        (b'["text"]', "line 3: a line must be a JSON object with"),
        (b'{"texts": "abc"}', "but has the keys ['texts']"),
        (b'{"prompt": "abc"}', "but has the keys ['prompt']"),
        (b'{"text": ""}', 'line 3: "text" is empty'),
        (b'{"text": " \\n "}', 'line 3: "text" is empty'),
        (b'{"prompt": "a", "answer": ""}', 'line 3: "answer" is empty'),
        (b'{"text": 7}', '"text" must be text, but is 7'),
        (b'{"text": "abc", "answer": "d"}', 'has both "text" and "answer"'),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "line 3: is not JSON"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "abc"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError) as error:
        opened(path, tmp_path / "cache")
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 400
    assert not (tmp_path / "cache").exists()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n{"text": "the"}\n')
    marked = opened(tmp_path / "c.jsonl", tmp_path / "cache")
    plain = opened(write_lines(tmp_path / "d.jsonl", [{"text": "abc"}, {"text": "the"}]), tmp_path / "cache")
    assert marked.tokens.tolist() == plain.tokens.tolist()


def test_token_ids_with_gaps(tmp_path: Path) -> None:
    """Few tokens with large ids must not be cut to 16 bits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"abc": 70_000, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    corpus = opened(write_lines(tmp_path / "c.jsonl", [{"text": "abc"}]), tmp_path / "cache", tokenizer)
    assert corpus.tokens.tolist() == [70_000, 1]


def test_corpora_without_anything(tmp_path: Path) -> None:
    for content in (b"", b"\n \n"):
        (tmp_path / "c.jsonl").write_bytes(content)
        with pytest.raises(CorpusError, match="holds no documents"):
            opened(tmp_path / "c.jsonl", tmp_path / "cache")
    with pytest.raises(CorpusError, match=r"cannot read the corpus .*: No such file"):
        opened(tmp_path / "d.jsonl", tmp_path / "cache")
    with pytest.raises(CorpusError, match=r"cannot read the corpus .*: Is a directory"):
        opened(tmp_path, tmp_path.parent / "cache")


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token"):
        opened(write_lines(tmp_path / "c.jsonl", [{"text": "abc"}]), tmp_path / "cache", tokenizer)


def test_a_corpus_is_tokenised_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "abc"}])
    first = opened(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_tokenise", None)  # not called
        again = opened(path, tmp_path / "cache")
    assert again.tokens.tolist() == first.tokens.tolist()
    assert again.digest == first.digest
    os.utime(path, ns=(1, 1))
    assert opened(path, tmp_path / "cache").digest == first.digest
    write_lines(path, [{"text": "abd"}])
    os.utime(path, ns=(1, 1))
    changed = opened(write_lines(path, [{"text": "abd"}]), tmp_path / "cache")
    assert changed.tokens.tolist() != first.tokens.tolist()
    assert changed.digest != first.digest


def test_a_corpus_is_read_in_groups_of_bounded_size(tmp_path: Path, monkeypatch: Any) -> None:
    rows = [{"text": f"abc {n} the"} for n in range(100)]
    path = write_lines(tmp_path / "c.jsonl", rows)
    whole = opened(path, tmp_path / "one")
    monkeypatch.setattr(corpus_module, "GROUP_DOCUMENTS", 7)
    sizes: list[int] = []
    encode = Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, group: (sizes.append(len(group)), encode(self, group))[1]
    )
    done: list[int] = []
    grouped = open_corpus(
        path, tiny_tokenizer(bos=False), "key", tmp_path / "two", lambda d, t: done.append(d)
    )
    assert sizes == [7] * 14 + [2]
    assert done[-1] == path.stat().st_size
    assert grouped.tokens.tolist() == whole.tokens.tolist()
    assert grouped.offsets.tolist() == whole.offsets.tolist()


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "abc"}])
    encode = Encoder.encode

    def meanwhile(self: Encoder, group: Any) -> Any:
        with path.open("a") as file:
            file.write('{"text": "more"}\n')
        return encode(self, group)

    monkeypatch.setattr(Encoder, "encode", meanwhile)
    with pytest.raises(CorpusError, match="was changed while it was read"):
        opened(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_leaves_no_cache(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "abc"}] * 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot write"):
            opened(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "cache").exists()
    assert opened(path, tmp_path / "cache").documents == 2000


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """23 documents of 2 to 60 tokens, every fourth of them mostly a prompt."""
    root = tmp_path_factory.mktemp("uneven")
    rows: list[dict[str, str]] = []
    for n in range(23):
        letters = "".join(chr(97 + (n * k) % 26) for k in range(1 + n * 17 % 58))
        rows.append({"prompt": letters, "answer": "zz"} if n % 4 == 0 else {"text": letters})
    return opened(write_lines(root / "c.jsonl", rows), root / "cache")


def documents_of(corpus: Corpus) -> list[tuple[tuple[int, ...], int]]:
    bounds = zip(corpus.offsets, corpus.offsets[1:], corpus.prompts, strict=False)
    return [(tuple(corpus.tokens[a:b].tolist()), int(p)) for a, b, p in bounds]


def test_an_epoch_holds_every_document_once_and_every_epoch_is_another_order(uneven: Corpus) -> None:
    size = len(uneven.tokens)
    expected = sorted(ids for ids, _ in documents_of(uneven))
    orders = []
    for backwards in (False, True):
        stream = TokenStream(uneven, "math", 5, backwards=backwards)
        for epoch in range(3):
            ids, _ = stream.read(epoch * size, size)
            ends = np.flatnonzero(ids == END) + 1
            order = [tuple(part.tolist()) for part in np.split(ids, ends)[:-1]]
            assert sorted(order) == expected
            orders.append(order)
    for i, one in enumerate(orders):
        assert all(one != other for other in orders[:i])
    assert [order[::-1] for order in orders[:3]] == orders[3:]
    other = TokenStream(uneven, "code", 5, backwards=False).read(0, size)[0]
    assert other.tolist() != TokenStream(uneven, "math", 5, backwards=False).read(0, size)[0].tolist()


@settings(deadline=None, max_examples=100)
@given(begin=st.integers(0, 3000), counts=st.lists(st.integers(1, 900), min_size=1, max_size=6))
def test_reading_in_parts_is_reading_at_once(uneven: Corpus, begin: int, counts: list[int]) -> None:
    stream = TokenStream(uneven, "math", 0, backwards=False)
    parts, place = [], begin
    for count in counts:
        parts.append(stream.read(place, count))
        place += count
    whole = TokenStream(uneven, "math", 0, backwards=False).read(begin, sum(counts))
    for index in range(2):
        assert np.concatenate([part[index] for part in parts]).tolist() == whole[index].tolist()


def test_prompts_are_not_learned(uneven: Corpus) -> None:
    ids, learned = TokenStream(uneven, "math", 0, backwards=False).read(0, len(uneven.tokens))
    begins = [0, *(np.flatnonzero(ids == END) + 1).tolist()]
    prompts = dict(documents_of(uneven))
    assert sum(prompts.values()) > 50
    for begin, end in pairwise(begins):
        prompt = prompts[tuple(ids[begin:end].tolist())]
        assert learned[begin:end].tolist() == [False] * prompt + [True] * (end - begin - prompt)


def test_batches_go_on_anywhere_and_targets_are_the_next_tokens(uneven: Corpus) -> None:
    plan = make_plan(
        {"a": 0.7, "b": 0.3}, steps=9, batch=3, sequence_length=20, general={"a": 1.0}, general_share=0.3
    )
    corpora = {"a": uneven, "b": uneven}
    batches = Batches(plan, corpora, seed=1)
    whole = [batches.next() for _ in range(9)]
    for step in range(9):
        resumed = Batches(plan, corpora, seed=1, step=step).next()
        assert all((one == other).all() for one, other in zip(resumed, whole[step], strict=True))
    for ids, targets in whole:
        known = targets[:, :-1] != IGNORED
        assert (targets[:, :-1][known] == ids[:, 1:][known]).all()
        assert (targets[:, -1] == IGNORED).all()
    assert 0 < sum((targets != IGNORED).sum() for _, targets in whole) < 9 * 3 * 19


def test_general_sequences_are_the_same_for_every_mixture(uneven: Corpus) -> None:
    def general(shares: dict[str, float]) -> dict[int, list[int]]:
        plan = make_plan(
            shares, steps=8, batch=4, sequence_length=16, general={"a": 0.6, "b": 0.4}, general_share=0.5
        )
        batches = Batches(plan, {"a": uneven, "b": uneven}, seed=1)
        rows = np.concatenate([batches.next()[0] for _ in range(8)])
        found = {}
        for place, kind in enumerate(plan.kinds):
            count = sum(n for source, n in plan.recipes[kind] if plan.sources[source].general)
            if count:
                found[place] = rows[place, :count].tolist()
        return found

    one, other = general({"a": 1.0}), general({"a": 0.2, "b": 0.8})
    assert one == other
    assert len(one) == 16


def test_the_meta_data_is_not_trusted_blindly(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [{"text": "abc"}])
    opened(path, tmp_path / "cache")
    [meta] = (tmp_path / "cache").glob("*/meta.json")
    (meta.parent / "tokens.bin").write_bytes(b"\0\0")
    assert json.loads(meta.read_text())["dtype"] == "uint16"
    with pytest.raises(ConfigError, match="is damaged; remove it"):
        opened(path, tmp_path / "cache")
