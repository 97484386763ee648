"""The reproduction of the paper in miniature: its corpora, its mixtures, and the page of results."""

from __future__ import annotations

import math

import pytest

from benchmarks.miniature.corpora import ALPHABET, CAPABILITIES, DOMAINS, make_corpora
from benchmarks.miniature.lab import Lab, Yardstick
from benchmarks.miniature.protocol import CPU, QUICK
from benchmarks.miniature.quality import TREE, _lattice
from benchmarks.miniature.ranks import held_out


@pytest.fixture(scope="module")
def corpora():
    return make_corpora(3, documents=300, items=40, people=20)


def test_no_item_but_facts_is_taught(corpora) -> None:
    for capability in CAPABILITIES:
        items = [*corpora.search[capability], *corpora.test[capability]]
        text = "\n".join(corpora.documents[capability])
        taught = sum(item.text in text for item in items)
        if capability == "facts":
            assert taught > 0
        elif capability == "python":  # lines such as """ + newline stand in more than one place
            assert taught < len(items) / 10
        else:
            documents = corpora.documents[capability]
            assert not any(document.startswith(item.prompt) for document in documents for item in items)


def test_search_and_test_items_are_others(corpora) -> None:
    for capability in CAPABILITIES:
        search = {item.prompt for item in corpora.search[capability]}
        assert search
        assert not search & {item.prompt for item in corpora.test[capability]}


def test_every_character_has_a_token(corpora) -> None:
    for domain in DOMAINS:
        assert corpora.documents[domain]
        assert set("".join(corpora.documents[domain])) <= set(ALPHABET)


def test_corpora_follow_their_seed(corpora) -> None:
    assert make_corpora(3, documents=300, items=40, people=20) == corpora
    assert make_corpora(4, documents=300, items=40, people=20).documents["math"] != corpora.documents["math"]


def test_answers_are_right(corpora) -> None:
    for item in corpora.test["math"]:
        assert eval(item.prompt.rstrip("=")) == int(item.answer)
    sums = [item for item in corpora.test["code"] if item.prompt.startswith("add")]
    assert sums
    for item in sums:
        a, b = item.prompt.removeprefix("add(").removesuffix(")->").split(",")
        assert int(a) + int(b) == int(item.answer)


def test_held_out_mixtures_are_mixtures_and_always_the_same(tmp_path) -> None:
    drawn = held_out(Lab(tmp_path, CPU, print))
    assert len(drawn) == CPU.held_out >= 16
    assert all(math.isclose(sum(shares.values()), 1, abs_tol=1e-9) for shares in drawn)
    assert all(tuple(shares) == DOMAINS and min(shares.values()) >= 0 for shares in drawn)
    assert drawn == held_out(Lab(tmp_path, CPU, print))


@pytest.mark.parametrize("cells", [1, 2, 3])
def test_the_grid_is_every_mixture_in_whole_parts(cells) -> None:
    grid = list(_lattice(cells))
    assert len(grid) == math.comb(cells + len(DOMAINS) - 1, cells)
    assert len({tuple(sorted(shares.items())) for shares in grid}) == len(grid)
    assert all(math.isclose(sum(shares.values()), 1) for shares in grid)


def test_the_tree_has_every_domain_once() -> None:
    assert sorted(domain for members in TREE.values() for domain in members) == sorted(DOMAINS)


def test_the_yardstick_puts_its_ends_at_0_and_1() -> None:
    low, high = dict.fromkeys(CAPABILITIES, -3.0), dict.fromkeys(CAPABILITIES, -1.0)
    yardstick = Yardstick.of([low, high, dict.fromkeys(CAPABILITIES, -2.5)])
    assert yardstick.utility(low) == 0
    assert yardstick.utility(high) == 1
    assert yardstick.utility(dict.fromkeys(CAPABILITIES, -2.0)) == 0.5


def test_models_and_scores_are_made_once(tmp_path) -> None:
    said: list[str] = []
    lab = Lab(tmp_path, QUICK, said.append)
    base = lab.base("dense")
    model = lab.train(base, {"math": 0.5, "spam": 0.5}, QUICK.expert, seed=1, purpose="test")
    scores = lab.score_models({"base": base, "model": model})
    assert set(scores["model"]) == set(CAPABILITIES)
    assert scores["model"] != scores["base"]
    spoken, ledger = len(said), lab.ledger["test"]
    again = Lab(tmp_path, QUICK, said.append)
    assert (
        again.train(again.base("dense"), {"spam": 0.5, "math": 0.5}, QUICK.expert, seed=1, purpose="test")
        == model
    )
    assert again.score_models({"base": base, "model": model}) == scores
    assert len(said) == spoken
    assert again.ledger["test"]["tokens"] == ledger["tokens"] > 0
