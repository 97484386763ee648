import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from mergemix.evals.item_order import ItemOrder, order_items
from mergemix.evals.utility import Utility
from mergemix.search.racing import Look, Race, _critical_values

COUNTS = {"math": 200, "code": 160}
UTILITY = Utility({"math": 0.6, "code": 0.4}, offset=-0.25)
Items = dict[str, np.ndarray]


def candidates(rng: np.random.Generator, num: int, skill: float = 0.0) -> list[Items]:
    """Item scores 0 or 1 of `num` candidates; items are of very different difficulty, which all share."""
    easiness = {name: rng.normal(0.3, 2.0, count) for name, count in COUNTS.items()}
    chance = {name: 1 / (1 + np.exp(-x - skill)) for name, x in easiness.items()}
    return [{name: (rng.random(len(p)) < p).astype(float) for name, p in chance.items()} for _ in range(num)]


def as_good_as(rng: np.random.Generator, other: Items, candidate: Items) -> Items:
    """The candidate with as many answers changed, at random, as it takes to have the other's mean scores."""
    result = {}
    for name, scores in candidate.items():
        scores = scores.copy()
        missing = round(other[name].sum() - scores.sum())
        wrong = np.flatnonzero(scores == (0 if missing > 0 else 1))
        scores[rng.permutation(wrong)[: abs(missing)]] = 1 if missing > 0 else 0
        result[name] = scores
    return result


def run(race: Race, order: ItemOrder, scores: Items) -> tuple[Look, int]:
    """The look at which the candidate was stopped, or the last, and its block."""
    for block in range(order.num_blocks):
        look = race.look(block, only(order, block, scores))
        if look.stop:
            break
    return look, block


def only(order: ItemOrder, block: int, scores: Items) -> Items:
    """What is known by the end of a block: NaN elsewhere."""
    known = {name: np.full(len(values), np.nan) for name, values in scores.items()}
    for number in range(block + 1):
        for name, items in order.block(number).items():
            known[name][items] = scores[name][items]
    return known


def best_of(incumbents: list[Items]) -> Items:
    return max(incumbents, key=UTILITY)


@pytest.mark.parametrize("num_incumbents", [1, 2, 5])
@pytest.mark.parametrize("select", [True, False])
def test_one_as_good_as_the_best_is_seldom_stopped(num_incumbents: int, select: bool) -> None:
    """The hardest case there is: any candidate that is better is stopped less often."""
    stopped, trials = 0, 200
    for trial in range(trials):
        rng = np.random.default_rng((1, trial))
        *incumbents, other = candidates(rng, num_incumbents + 1)
        equal = as_good_as(rng, best_of(incumbents), other)
        order = order_items(UTILITY.weights, COUNTS, incumbents if select else (), seed=trial)
        stopped += run(Race(UTILITY, order, incumbents), order, equal)[0].stop
    # Binomial(200, 0.05) has a standard deviation of 1.5 percent. Too few would be alpha that is not used.
    assert 0.01 <= stopped / trials <= 0.09


def test_estimates_of_benchmarks_make_up_the_utility_s_and_are_exact_at_the_end() -> None:
    rng = np.random.default_rng(3)
    *incumbents, other = candidates(rng, 4)
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    race = Race(UTILITY, order, incumbents)
    for block in range(order.num_blocks):
        look = race.look(block, only(order, block, other))
        assert UTILITY({name: mean for name, (mean, _) in look.benchmarks.items()}) == look.estimate
        parts = [UTILITY.weights[name] * error for name, (_, error) in look.benchmarks.items()]
        assert math.hypot(*parts) == pytest.approx(look.standard_error)
    for name, (mean, error) in look.benchmarks.items():
        assert (mean, error) == (pytest.approx(other[name].mean()), 0)


@pytest.mark.parametrize("select", [True, False])
def test_estimates_are_unbiased_given_the_strata_and_standard_errors_are_true(select: bool) -> None:
    rng = np.random.default_rng(2)
    incumbents = candidates(rng, 4)
    candidate = {name: np.where(rng.random(len(x)) < 0.3, 0.0, x) for name, x in incumbents[0].items()}
    found = []
    for seed in range(200):
        order = order_items(UTILITY.weights, COUNTS, incumbents if select else (), seed=seed)
        race = Race(UTILITY, order, incumbents)
        found.append([race.look(block, candidate) for block in range(order.num_blocks - 1)])
    for looks in zip(*found, strict=True):
        estimates = np.array([look.estimate for look in looks])
        spread = estimates.std(ddof=1)
        assert abs(estimates.mean() - UTILITY(candidate)) < 3.5 * spread / math.sqrt(len(looks))
        claimed = math.sqrt(np.mean([look.standard_error**2 for look in looks]))
        assert 0.88 <= claimed / spread <= 1.3  # wide at first: the pseudo-observations


def test_item_selection_and_prediction_make_estimates_narrower() -> None:
    """A third of the items everybody solves, a third nobody, a third one in two does."""
    rng = np.random.default_rng(3)
    chance = {name: np.resize([0.0, 1.0, 0.5], count) for name, count in COUNTS.items()}
    *incumbents, candidate = (
        {name: (rng.random(len(p)) < p).astype(float) for name, p in chance.items()} for _ in range(7)
    )

    def typical_error(pairs: list[Items], selecting: list[Items]) -> float:
        found = []
        for seed in range(20):
            order = order_items(UTILITY.weights, COUNTS, selecting, seed=seed)
            found.append(Race(UTILITY, order, pairs).look(2, candidate).standard_error)
        return float(np.mean(found))

    alone = typical_error(incumbents[:1], [])
    predicted = typical_error(incumbents, [])
    selected = typical_error(incumbents, incumbents)
    assert selected < 0.9 * predicted < 0.9 * 0.9 * alone


def test_one_that_is_clearly_worse_is_stopped_at_once_and_estimated() -> None:
    incumbents = candidates(np.random.default_rng(4), 3)
    [worse] = candidates(np.random.default_rng(4), 1, skill=-3.0)
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    look, block = run(Race(UTILITY, order, incumbents), order, worse)
    assert (look.stop, block) == (True, 0)
    assert look.estimate == pytest.approx(UTILITY(worse), abs=4 * look.standard_error)
    assert look.estimate < look.upper < UTILITY(best_of(incumbents))


def test_after_the_last_block_nothing_is_uncertain() -> None:
    *incumbents, candidate = candidates(np.random.default_rng(5), 4, skill=-1.0)
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    look = Race(UTILITY, order, incumbents).look(order.num_blocks - 1, candidate)
    assert look[:4] == (False, pytest.approx(UTILITY(candidate)), 0.0, look.estimate)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.floats(0, 0.5))
def test_one_that_is_nowhere_worse_is_never_stopped(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    [incumbent] = candidates(rng, 1)
    better = {name: np.where(rng.random(len(x)) < share, 1.0, x) for name, x in incumbent.items()}
    order = order_items(UTILITY.weights, COUNTS, seed=seed)
    look, block = run(Race(UTILITY, order, [incumbent]), order, better)
    assert (look.stop, block) == (False, order.num_blocks - 1)


@pytest.mark.parametrize("num_incumbents", [1, 3])
def test_equal_differences_on_a_few_items_are_not_taken_for_certainty(num_incumbents: int) -> None:
    """The candidate is worse by the same little on each item so far: no variance at all, and no certainty either."""
    incumbents = [candidates(np.random.default_rng(13), 1)[0]] * num_incumbents
    order = order_items(UTILITY.weights, COUNTS, seed=1)
    look = Race(UTILITY, order, incumbents).look(0, {name: x - 0.003 for name, x in incumbents[0].items()})
    assert look.estimate == pytest.approx(UTILITY(incumbents[0]) - 0.003)
    assert look.standard_error > 0.001
    assert not look.stop


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_a_spread_of_zero_so_far_is_not_certain_to_stay_so(level: float) -> None:
    """Nobody has ever scored anything else on any item."""
    everyone = {name: np.full(count, level) for name, count in COUNTS.items()}
    order = order_items(UTILITY.weights, COUNTS, [everyone] * 3, seed=1)
    for incumbents in ([everyone], [everyone] * 3):
        look = Race(UTILITY, order, incumbents).look(0, everyone)
        assert look.standard_error > 0.002
        assert not look.stop


def test_only_items_that_were_asked_count() -> None:
    *incumbents, candidate = candidates(np.random.default_rng(6), 4)
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    race = Race(UTILITY, order, incumbents)
    for block in range(order.num_blocks):
        assert race.look(block, only(order, block, candidate)) == race.look(block, candidate)


def test_items_that_failed_are_left_out() -> None:
    """Of the candidate or of an incumbent; and a benchmark that failed wholly is as it was predicted."""
    rng = np.random.default_rng(7)
    *incumbents, candidate = candidates(rng, 4)
    whole = Race(UTILITY, order_items(UTILITY.weights, COUNTS, incumbents, seed=1), incumbents)
    for items in (*incumbents, candidate):
        for scores in items.values():
            scores[rng.random(len(scores)) < 0.1] = np.nan
    for items in incumbents:
        items["math"][:5] = np.nan  # nobody has these
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    race = Race(UTILITY, order, incumbents)
    looks = [race.look(block, candidate) for block in range(order.num_blocks)]
    assert np.isfinite([look[:4] for look in looks]).all()
    assert looks[-1].standard_error == 0
    assert looks[-1].estimate == pytest.approx(UTILITY(candidate), abs=0.02)
    assert race.best == pytest.approx(whole.best, abs=0.05)
    nothing = {**candidate, "math": np.full(COUNTS["math"], np.nan)}
    assert np.isfinite([race.look(block, nothing)[:4] for block in range(order.num_blocks)]).all()


def test_a_benchmark_of_few_items_is_one_block_and_stops_nobody() -> None:
    utility = Utility({"few": 1.0}, 0.0)
    counts = {"few": 20}
    rng = np.random.default_rng(0)
    order = order_items(utility.weights, counts, [{"few": np.ones(20)}], seed=1)
    race = Race(utility, order, [{"few": np.ones(20)}])
    look = race.look(order.num_blocks - 1, {"few": rng.random(20) * 0.1})
    assert not look.stop


def test_what_is_taken_off_counts_in_the_race() -> None:
    """One that is worse on the items, but costs less, is not stopped; one that costs more is."""
    *incumbents, candidate = candidates(np.random.default_rng(5), 4, skill=-1.0)
    best = best_of(incumbents)
    order = order_items(UTILITY.weights, COUNTS, [best], seed=1)
    gap = UTILITY(best) - UTILITY(as_good_as(np.random.default_rng(1), candidate, best))
    free, dear = ({"costs": [gap + 0.3], "cost": cost} for cost in (0.0, gap + 0.9))
    assert not run(Race(UTILITY, order, [best], **free), order, candidate)[0].stop
    assert run(Race(UTILITY, order, [best], **dear), order, candidate)[0].stop


def test_where_lower_is_better_the_one_with_more_is_stopped() -> None:
    utility = Utility({"loss": -1.0}, 0.0)
    rng = np.random.default_rng(8)
    hardness = rng.gamma(2.0, 1.0, 300)
    incumbents = [{"loss": hardness + rng.normal(0, 0.1, 300)} for _ in range(3)]
    order = order_items(utility.weights, {"loss": 300}, incumbents, seed=1)
    race = Race(utility, order, incumbents)
    assert race.look(0, {"loss": hardness + 0.5}).stop
    assert not race.look(0, {"loss": hardness - 0.5}).stop


def test_the_offset_and_the_order_of_incumbents_change_no_decision() -> None:
    *incumbents, candidate = candidates(np.random.default_rng(9), 5)
    order = order_items(UTILITY.weights, COUNTS, incumbents, seed=1)
    moved = Utility(UTILITY.weights, 10.0)
    for block in range(order.num_blocks):
        here = Race(UTILITY, order, incumbents).look(block, candidate)
        there = Race(moved, order, incumbents[::-1]).look(block, candidate)
        assert here.stop == there.stop
        assert there.estimate - here.estimate == pytest.approx(10.25)


def test_a_benchmark_without_weight_is_not_looked_at() -> None:
    *incumbents, candidate = candidates(np.random.default_rng(10), 4)
    utility = Utility({"math": 1.0}, 0.0)
    order = order_items(utility.weights, COUNTS, incumbents, seed=1)
    nothing = {**candidate, "code": np.full(COUNTS["code"], np.nan)}
    looks = [
        [Race(utility, order, incumbents).look(block, items) for block in range(order.num_blocks)]
        for items in (candidate, nothing)
    ]
    assert looks[0] == looks[1]


def test_each_look_spends_an_equal_part_of_alpha() -> None:
    """Against a simulated Brownian motion."""
    information, alpha = np.array([1.0, 2.1, 2.5, 9.0]), 0.08
    levels = np.array(_critical_values(tuple(information), alpha))
    steps = np.random.default_rng(11).normal(size=(400_000, 4)) * np.sqrt(np.diff(information, prepend=0))
    below = np.cumsum(steps, axis=1) / np.sqrt(information) < norm.ppf(levels)
    first = below.argmax(axis=1)[below.any(axis=1)]
    assert np.bincount(first) / len(steps) == pytest.approx(np.full(4, alpha / 4), rel=0.03)
    assert levels[0] == pytest.approx(alpha / 4)
    assert _critical_values((1.0,), 0.05) == pytest.approx((0.05,))


def test_a_race_needs_incumbents_and_an_alpha() -> None:
    order = order_items(UTILITY.weights, COUNTS, seed=1)
    with pytest.raises(ValueError, match="needs an incumbent"):
        Race(UTILITY, order, [])
    with pytest.raises(ValueError, match=r"between 0 and 0\.5, but is 0\.5"):
        Race(UTILITY, order, candidates(np.random.default_rng(12), 1), alpha=0.5)
