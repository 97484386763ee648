"""The held-out split: every item on one side, twins on the same one, the seed decides which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.evals.split import split_items
from mergemix.evals.suite import Benchmark, Score, Suite
from mergemix.serve.engine import Generate, Generated, Output, Request


class Listed:
    """A benchmark that asks what it is given."""

    capability, metric, higher_is_better, source = "words", "accuracy", False, "listed"

    def __init__(self, name: str, prompts: list[str]) -> None:
        self.name = name
        self.prompts = prompts
        self.item_ids = tuple(f"{name}-{index}" for index in range(len(prompts)))

    def requests(self, index: int) -> list[Request]:
        return [Generate(self.prompts[index], 4, temperature=1.0, seed=index)]

    def score(self, index: int, outputs: list[Output]) -> Score:
        [output] = outputs
        assert isinstance(output, Generated)
        return Score(float(output.text == self.prompts[index]), output.text)

    def report(self, scores: list[Score]) -> dict[str, float]:
        return {"whole": 1.0}

    def fingerprint(self) -> str:
        return repr(self.prompts)


def prompts_of(benchmark: Benchmark) -> list[str]:
    return [
        request.prompt
        for index in range(len(benchmark.item_ids))
        for request in benchmark.requests(index)
        if isinstance(request, Generate) and isinstance(request.prompt, str)
    ]


@given(
    prompts=st.lists(st.text(max_size=3), min_size=2, max_size=40).filter(lambda texts: len(set(texts)) > 1),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 5),
)
def test_every_item_is_on_one_side_and_twins_on_the_same(prompts: list[str], share: float, seed: int) -> None:
    whole = Listed("b", prompts)
    try:
        [kept], [held] = split_items([whole], share, seed)
    except ConfigError:  # all the different items that there are were needed for the share
        assert len(set(prompts)) < len(prompts) or share * len(prompts) >= len(prompts) - 0.5
        return
    assert sorted((*kept.item_ids, *held.item_ids)) == sorted(whole.item_ids)
    assert not set(prompts_of(kept)) & set(prompts_of(held))
    assert len(held.item_ids) >= max(round(share * len(prompts)), 1)
    assert len({kept.fingerprint(), held.fingerprint(), whole.fingerprint()}) == 3
    assert (kept.name, kept.capability, kept.higher_is_better) == ("b", "words", False)
    assert kept.report([]) == {}


def test_a_subset_asks_and_scores_its_own_items() -> None:
    kept, held = split_items([Listed("b", list("abcdefghij"))], 0.3, 0)
    assert len(held[0].item_ids) == 3
    for side in (kept, held):
        suite = Suite(side)
        batch = suite.batch()
        texts = [request.prompt for request in batch.requests if isinstance(request, Generate)]
        results = batch.grade((place, Generated(str(text), 1)) for place, text in enumerate(texts))
        assert [result.score for result in results] == [1.0] * suite.num_items
        assert [result.item for result in results] == list(side[0].item_ids)
        assert suite.directions == {"b": -1}


def test_the_seed_decides_and_the_order_of_the_items_does_not() -> None:
    letters = [chr(97 + i) for i in range(26)]
    held = {seed: set(prompts_of(split_items([Listed("b", letters)], 0.5, seed)[1][0])) for seed in range(4)}
    assert len({frozenset(texts) for texts in held.values()}) == 4
    assert set(prompts_of(split_items([Listed("b", letters[::-1])], 0.5, 0)[1][0])) == held[0]


def test_a_benchmark_of_one_item_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="two different ones or more, but 'b' has 1"):
        split_items([Listed("b", ["same", "same", "same"])], 0.3, 0)
