"""The corpora: the same for a seed, and no benchmark answer that can be had by heart where it should be computed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.demo.corpora import CAPABILITIES, DOMAINS, World, make_corpora
from mergemix.demo.tokenizer import BOS, EOS, UNKNOWN, VOCABULARY, build_tokenizer, encode_document

SIZES = {"documents": 3000, "items": 40, "people": 30}


def test_the_seed_alone_decides():
    assert make_corpora(3, **SIZES) == make_corpora(3, **SIZES)
    one, other = make_corpora(3, **SIZES), make_corpora(4, **SIZES)
    assert all(one.documents[domain] != other.documents[domain] for domain in DOMAINS)
    assert all(one.search[capability] != other.search[capability] for capability in CAPABILITIES)


@given(seed=st.integers(0, 1000), items=st.integers(1, 40))
@settings(max_examples=5)
def test_search_and_test_ask_different_things(seed, items):
    corpora = make_corpora(seed, documents=1, items=items, people=30)
    for capability in CAPABILITIES:
        prompts = [item.prompt for item in corpora.search[capability] + corpora.test[capability]]
        assert len(corpora.search[capability]) == len(corpora.test[capability]) == items
        assert len(set(prompts)) == 2 * items


@pytest.mark.parametrize("capability", ["math", "code", "language"])
def test_skills_are_asked_with_prompts_that_no_corpus_holds(capability):
    corpora = make_corpora(0, **SIZES)
    told = set(corpora.documents[capability])
    assert not any(item.text in told for item in corpora.search[capability] + corpora.test[capability])


def test_every_fact_that_is_asked_was_told():
    corpora = make_corpora(0, **SIZES)
    told = set(corpora.documents["facts"])
    assert all(item.text in told for item in corpora.search["facts"] + corpora.test["facts"])


def test_answers_are_right():
    corpora = make_corpora(0, **SIZES)
    for item in corpora.search["math"]:
        assert str(eval(item.prompt.removesuffix("="))) == item.answer
    words = {"rev": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}
    for item in corpora.search["code"]:
        name, _, word = item.prompt.removesuffix(")->").partition("(")
        assert sorted(word) == sorted(item.answer)
        assert name not in words or words[name](word) == item.answer
    for item in corpora.search["language"]:
        subject_is_plural = item.prompt.split()[1].endswith("s")
        assert item.answer.endswith("s.") != subject_is_plural


def test_a_world_states_three_facts_of_each_person():
    world = World(0, people=30)
    assert len({item.prompt for item in world.known}) == len(world.known) == 90


def test_tokens_are_characters_and_come_back_as_text():
    tokenizer = build_tokenizer(max_length=64)
    corpora = make_corpora(0, **SIZES)
    for domain in DOMAINS:
        for text in corpora.documents[domain][:50]:
            ids = tokenizer(text)["input_ids"]
            assert ids == encode_document(text)[:-1]
            assert len(ids) == 1 + len(text)
            assert VOCABULARY[UNKNOWN] not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer("A")["input_ids"] == [VOCABULARY[BOS], VOCABULARY[UNKNOWN]]
