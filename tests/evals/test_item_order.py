import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.evals.item_order import BLOCKS, MIN_ITEMS, MIN_STRATUM_ITEMS, ItemOrder, order_items

COUNTS = {"math": 300, "code": 120, "extra": 50}
WEIGHTS = {"math": 0.5, "code": -0.5}
Items = dict[str, np.ndarray]


def answers(rng: np.random.Generator, counts: dict[str, int] = COUNTS, num: int = 4) -> list[Items]:
    """Candidates of about the same skill: a third of the items all solve, a third none, a third some."""
    chance = {name: np.resize([0.0, 1.0, 0.5], count) for name, count in counts.items()}
    return [{name: (rng.random(len(p)) < p).astype(float) for name, p in chance.items()} for _ in range(num)]


def asked(order: ItemOrder) -> list[Items]:
    return [order.block(block) for block in range(order.num_blocks)]


@settings(deadline=None, max_examples=40)
@given(
    counts=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 90), min_size=1),
    num_full=st.integers(0, 4),
    missing=st.floats(0, 0.5),
    shares=st.sets(st.floats(0.01, 0.99), max_size=5),
    seed=st.integers(0, 2**32),
)
def test_every_item_is_asked_once(counts, num_full, missing, shares, seed) -> None:
    rng = np.random.default_rng(seed)
    full = answers(rng, counts, num_full)
    for items in full:
        for scores in items.values():
            scores[rng.random(len(scores)) < missing] = np.nan
    weights = {name: rng.normal() for name in list(counts)[: len(counts) // 2 + 1]}
    order = order_items(weights, counts, full, seed=seed, blocks=(*sorted(shares), 1))
    found = asked(order)
    for name, count in counts.items():
        everything = np.concatenate([block[name] for block in found if name in block])
        assert sorted(everything) == list(range(count))
    sizes = [sum(map(len, block.values())) for block in found]
    assert np.cumsum(sizes).tolist() == [order.num_asked(block) for block in range(order.num_blocks)]
    assert min(sizes) > 0
    least = MIN_ITEMS - len(order.strata)  # what rounding each stratum may take away
    assert order.num_blocks == 1 or sizes[0] >= least


def test_blocks_without_item_selection_hold_every_benchmark_in_proportion() -> None:
    order = order_items(WEIGHTS, COUNTS, seed=1)
    for block, share in enumerate(BLOCKS[:-1]):
        for stratum in order.strata[:2]:
            expected = max(share * 420, MIN_ITEMS) * COUNTS[stratum.benchmark] / 420
            assert stratum.asked[block] == pytest.approx(expected, abs=1)


def test_items_that_cannot_matter_come_last() -> None:
    blocks = asked(order_items(WEIGHTS, COUNTS, answers(np.random.default_rng(2)), seed=1))
    assert all(len(block["extra"]) == 0 for block in blocks[:-1])
    assert len(blocks[-1]["extra"]) == 50


def test_items_that_tell_candidates_apart_are_asked_first() -> None:
    order = order_items(WEIGHTS, COUNTS, answers(np.random.default_rng(3)), seed=1)
    for name in WEIGHTS:
        first = order.block(0)[name]
        undecided = np.mean(first % 3 == 2)  # a third of all items, and of a random sample
        assert undecided > 0.5
        for stratum in (s for s in order.strata if s.benchmark == name):
            assert stratum.asked[0] >= min(len(stratum.items), MIN_STRATUM_ITEMS)
    deviations = [s.deviation for s in order.strata if s.benchmark == "math"]
    assert deviations == sorted(deviations)
    assert deviations[0] < 0.5 * deviations[-1]


def test_a_benchmark_that_counts_more_is_asked_more() -> None:
    full = answers(np.random.default_rng(4), {"a": 400, "b": 400})

    def share_of_a(weights: dict[str, float]) -> float:
        block = order_items(weights, {"a": 400, "b": 400}, full, seed=1).block(1)
        return len(block["a"]) / (len(block["a"]) + len(block["b"]))

    assert share_of_a({"a": 0.5, "b": 0.5}) == pytest.approx(0.5, abs=0.1)
    assert share_of_a({"a": -0.75, "b": 0.25}) == pytest.approx(0.75, abs=0.1)


def test_items_of_a_stratum_are_equally_likely_to_be_asked() -> None:
    full = answers(np.random.default_rng(5), {"a": 60})
    order = order_items({"a": 1.0}, {"a": 60}, full, seed=0)
    expected = {i: s.asked[0] / len(s.items) for s in order.strata for i in s.items.tolist()}
    times = np.zeros(60)
    seeds = 800
    for seed in range(seeds):
        times[order_items({"a": 1.0}, {"a": 60}, full, seed=(7, seed)).block(0)["a"]] += 1
    for item, chance in expected.items():
        # 5 standard deviations: over 60 items by chance once in 30,000 runs, and the seeds are fixed
        assert abs(times[item] / seeds - chance) <= 5 * (chance * (1 - chance) / seeds) ** 0.5 + 1e-12


def test_the_order_depends_on_the_seed_alone() -> None:
    full = answers(np.random.default_rng(6))

    def drawn(seed: int | tuple[int, ...], names: tuple[str, ...] = ("math", "code", "extra")) -> str:
        order = order_items(WEIGHTS, {name: COUNTS[name] for name in names}, full, seed=seed)
        return repr({s.benchmark: s.items.tolist() for s in order.strata if s.benchmark in WEIGHTS})

    assert drawn((1, 2)) == drawn((1, 2)) != drawn((1, 3))
    assert drawn(1) == drawn(1, ("math", "code"))


def test_candidates_that_all_score_the_same_select_nothing() -> None:
    same = {name: np.zeros(count) for name, count in COUNTS.items()}
    order = order_items(WEIGHTS, COUNTS, [same, same, same], seed=1)
    assert [s.benchmark for s in order.strata] == ["math", "code", "extra"]


def test_a_suite_of_few_items_is_one_block() -> None:
    assert order_items({"a": 1.0}, {"a": 12}, seed=1).num_blocks == 1


@pytest.mark.parametrize("blocks", [(), (0.1,), (0.2, 0.1, 1), (0, 1), (0.5, 1, 1), (0.5, 2)])
def test_blocks_must_be_ascending_shares(blocks: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"but are {blocks}")):
        order_items(WEIGHTS, COUNTS, seed=1, blocks=blocks)


def test_a_benchmark_must_count() -> None:
    with pytest.raises(ValueError, match="must count a benchmark"):
        order_items({"other": 1.0}, COUNTS, seed=1)
