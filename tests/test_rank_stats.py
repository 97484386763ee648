"""Rank statistics against scipy, known values, and simulations whose truth is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergemix.rank_stats import (
    MAX_WIDTH,
    MIN_REFERENCES,
    RESAMPLES,
    agreement,
    bootstrap,
    ceiling,
    correlations,
    drawn_means,
    effective_seeds,
    kendall,
    perfect_order_limit,
    rank_agreement,
    regret,
    spearman,
    spearman_brown,
    top_overlap,
)

# Few different values: ties are what implementations differ in.
TIED = arrays(np.float64, st.tuples(st.just(2), st.integers(3, 12)), elements=st.integers(0, 4).map(float))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For many studies: fewer draws in each."""
    monkeypatch.setattr(agreement, "RESAMPLES", 300)
    monkeypatch.setattr(correlations, "PERMUTATIONS", 20)


def normal_scores(rng: np.random.Generator, n: int, rho: float) -> tuple[np.ndarray, np.ndarray]:
    x, y = rng.normal(size=(2, n))
    return x, rho * x + math.sqrt(1 - rho * rho) * y


def retested(rng: np.random.Generator, n: int, seeds: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """True scores of variance 1, (n,), and runs with noise of that variance, (n, seeds)."""
    truth = rng.normal(size=n)
    return truth, truth[:, None] + math.sqrt(noise) * rng.normal(size=(n, seeds))


def test_a_published_example() -> None:
    # IQ and hours of television a week: rho = -29 / 165 (Wikipedia, Spearman's rank correlation coefficient).
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110.0])
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17.0])
    assert float(spearman(iq, hours)) == pytest.approx(-29 / 165)
    assert kendall(iq, hours) == pytest.approx(-1 / 9)


@given(TIED)
def test_correlations_are_those_of_scipy(pair: np.ndarray) -> None:
    a, b = pair
    varies = a.std() > 0 and b.std() > 0
    expected = scipy.stats.spearmanr(a, b).statistic if varies else math.nan
    assert float(spearman(a, b)) == pytest.approx(expected, nan_ok=True)
    row = correlations.kendall_rows(a[None], b[None])[0]
    assert row == pytest.approx(scipy.stats.kendalltau(a, b).statistic if varies else math.nan, nan_ok=True)


@given(TIED, st.data())
def test_pairs_with_nan_are_left_out(pair: np.ndarray, data: st.DataObject) -> None:
    a, b = pair
    known = np.array(data.draw(st.lists(st.booleans(), min_size=len(a), max_size=len(a))))
    with_nan = np.where(known, a, np.nan)
    expected = float(spearman(a[known], b[known])) if known.any() else math.nan
    assert float(spearman(with_nan, b)) == pytest.approx(expected, nan_ok=True)
    assert float(spearman(b, with_nan)) == pytest.approx(expected, nan_ok=True)


def test_rows_are_correlated_one_by_one() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 9))
    assert spearman(a, b) == pytest.approx([float(spearman(x, y)) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("n", [4, 5, 6])
def test_p_is_the_share_of_orders_that_agree_as_well(n: int) -> None:
    found = rank_agreement(np.arange(n), np.arange(n) ** 2.0)
    assert found["p"] == pytest.approx(1 / math.factorial(n))
    swapped = np.arange(n, dtype=float)
    swapped[[0, 1]] = 1, 0
    orders = np.array(list(itertools.permutations(range(n))), dtype=float)
    as_good = sum(scipy.stats.spearmanr(order, np.arange(n)).statistic for order in orders)
    assert as_good == pytest.approx(0, abs=1e-9), "all orders together cancel"
    expected = scipy.stats.permutation_test(
        (swapped,), lambda x: scipy.stats.spearmanr(x, np.arange(n)).statistic,
        permutation_type="pairings", alternative="greater", n_resamples=10**4,
    )  # fmt: skip
    assert rank_agreement(swapped, np.arange(n))["p"] == pytest.approx(expected.pvalue)


def test_p_of_many_references_is_simulated() -> None:
    a, b = normal_scores(np.random.default_rng(3), 20, 0.4)
    expected = scipy.stats.spearmanr(a, b, alternative="greater").pvalue
    assert rank_agreement(a, b)["p"] == pytest.approx(expected, abs=0.02)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("n", "rho"), [(9, 0.9), (16, 0.5), (16, 0.9)])
def test_intervals_hold_the_truth(n: int, rho: float) -> None:
    rng, studies = np.random.default_rng(n), 120
    truth = 6 / math.pi * math.asin(rho / 2)
    tau = 2 / math.pi * math.asin(rho)
    held = tau_held = 0
    for number in range(studies):
        found = rank_agreement(*normal_scores(rng, n, rho), seed=number)
        held += found["interval"][0] <= truth <= found["interval"][1]
        tau_held += found["kendall_interval"][0] <= tau <= found["kendall_interval"][1]
    assert held >= 0.9 * studies
    assert tau_held >= 0.9 * studies


@pytest.mark.parametrize(("bias", "corrected"), [(0.5, 0.5), (-0.5, -0.5), (2.0, 1.0)])
def test_intervals_are_corrected_for_the_bias_of_the_median(bias: float, corrected: float) -> None:
    """Draws that lie too high by `bias` mean an estimate that does too; more than one deviation is not believed."""
    drawn = bias + scipy.stats.norm.ppf((np.arange(400_000) + 0.5) / 400_000)
    low, high = bias - 2 * corrected - 1.96, bias - 2 * corrected + 1.96
    assert bootstrap.interval(0.0, drawn) == pytest.approx([min(low, 0), max(high, 0)], abs=0.01)
    drawn[: 400_000 // 10] = np.nan
    assert bootstrap.interval(0.0, drawn) is None, "too many draws without a value"


@pytest.mark.parametrize("n", [5, 9, 16])
def test_complete_agreement_is_not_certainty(n: int) -> None:
    limit = perfect_order_limit(n)
    x, y = normal_scores(np.random.default_rng(1), 20_000 * n, 2 * math.sin(math.pi * limit / 6))
    order = np.take_along_axis(y.reshape(-1, n), np.argsort(x.reshape(-1, n), axis=1), axis=1)
    assert (np.diff(order, axis=1) > 0).all(axis=1).mean() == pytest.approx(0.025, abs=0.006)
    for scores, expected in ((np.arange(n), [limit, 1]), (-np.arange(n), [-1, -limit])):
        found = rank_agreement(scores, np.arange(n))
        assert found["interval"] == pytest.approx(expected)
        assert -1 <= found["kendall_interval"][0] < found["kendall_interval"][1] <= 1
        assert found["conclusive"] == (n > 5)


def test_too_few_references_are_said_to_be() -> None:
    few = rank_agreement(np.arange(4), np.arange(4))
    assert not few["conclusive"]
    assert f"4 references are too few: fewer than {MIN_REFERENCES}" in few["inconclusive"]
    a, b = normal_scores(np.random.default_rng(5), 12, 0.0)
    assert "cannot tell the correlation from chance" in rank_agreement(a, b)["inconclusive"]
    a, b = normal_scores(np.random.default_rng(6), 16, 0.7)
    wide = rank_agreement(a, b)
    assert wide["interval"][0] > 0
    assert wide["interval"][1] - wide["interval"][0] > MAX_WIDTH
    assert "too uncertain" in wide["inconclusive"]
    assert "train more references; about" in wide["inconclusive"]
    a, b = normal_scores(np.random.default_rng(2), 60, 0.8)
    assert rank_agreement(a, b)["inconclusive"] is None
    assert rank_agreement(-a, b)["conclusive"], "that it ranks the wrong way round is a conclusion too"
    flat = rank_agreement(np.zeros(9), np.arange(9))
    assert flat["spearman"] is None
    assert "nothing to rank" in flat["inconclusive"]


def test_the_number_that_is_asked_for_is_about_enough() -> None:
    needed = agreement._needed(0.6)
    widths = []
    for number in range(6):
        a, b = normal_scores(np.random.default_rng(number), needed, 0.62)
        low, high = rank_agreement(a, b)["interval"]
        widths.append(high - low)
    assert np.median(widths) == pytest.approx(MAX_WIDTH, abs=0.1)


def test_what_a_choice_costs() -> None:
    trained = np.array([0.5, 0.9, 0.7, 0.3])
    assert regret(np.array([1, 2, 3, 0.0]), trained) == {
        "regret": pytest.approx(0.2), "relative_regret": pytest.approx(0.2 / 0.3), "choice": 2, "best": 1,
    }  # fmt: skip
    assert regret(np.array([1, 3, 3, 0.0]), trained)["regret"] == pytest.approx(0.1), "ties: their mean"
    assert regret(trained, trained)["regret"] == 0
    assert regret(np.arange(3.0), np.ones(3))["relative_regret"] is None


def test_the_top_sets() -> None:
    a, b = np.array([5, 4, 3, 2, 1.0]), np.array([4, 1, 5, 2, 3.0])
    assert top_overlap(a, b, 1) == 0
    assert top_overlap(a, b, 2) == 0.5
    assert top_overlap(a, b, 3) == pytest.approx(2 / 3)
    assert top_overlap(a, b, 5) == 1
    with pytest.raises(ValueError, match="1 to 5 members"):
        top_overlap(a, b, 6)


@settings(deadline=None, max_examples=30)
@given(TIED, st.data())
def test_ties_belong_to_a_top_set_by_lot(pair: np.ndarray, data: st.DataObject) -> None:
    a, b = pair
    size = data.draw(st.integers(1, len(a)))
    rng = np.random.default_rng(0)
    draws = 2000
    lots = [np.lexsort((rng.random((draws, len(x))), np.tile(x, (draws, 1))))[:, -size:] for x in (a, b)]
    common = [len(set(one) & set(other)) for one, other in zip(*map(np.ndarray.tolist, lots), strict=True)]
    assert top_overlap(a, b, size) == pytest.approx(np.mean(common) / size, abs=0.05)


def test_reliability_of_a_longer_test() -> None:
    assert float(spearman_brown(np.float64(0.6), 2)) == pytest.approx(0.75)
    assert float(spearman_brown(np.float64(0.75), 0.5)) == pytest.approx(0.6)
    assert effective_seeds(np.array([[1, 2, 3], [1, np.nan, np.nan]])) == pytest.approx(1.5)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_ceiling_is_the_known_one(seeds: int, noise: float) -> None:
    truth, runs = retested(np.random.default_rng(seeds), 4000, seeds, noise)
    found = ceiling(runs)
    assert found is not None
    assert found["seed_to_seed"] == pytest.approx(1 / (1 + noise), abs=0.05)
    assert found["reliability"] == pytest.approx(1 / (1 + noise / seeds), abs=0.04)
    assert found["ceiling"] == pytest.approx(float(spearman(truth, runs.mean(axis=1))), abs=0.03)
    assert found["seed_deviation"] == pytest.approx(math.sqrt(noise), rel=0.1)
    half = seeds // 2
    assert found["halves"] == pytest.approx(1 / (1 + noise / half), abs=0.05)


def test_seeds_may_be_missing() -> None:
    rng = np.random.default_rng(0)
    _, runs = retested(rng, 5000, 4, 1.0)
    runs[rng.random(5000) < 0.5, 2:] = np.nan  # half of them have two seeds: the mean of 1 / seeds is 3 / 8
    found = ceiling(runs)
    assert found is not None
    assert found["reliability"] == pytest.approx(1 / (1 + 3 / 8), abs=0.05)
    single = np.where(
        np.arange(5000)[:, None] < MIN_REFERENCES - 1, runs, runs[:, :1] * [1, np.nan, np.nan, np.nan]
    )
    assert ceiling(single) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("rho", [0.7, 1.0])
def test_the_corrected_correlation_is_that_without_noise(rho: float) -> None:
    rng = np.random.default_rng(4)
    truth, runs = retested(rng, 200, 2, 0.8)
    proxy = rho * truth + math.sqrt(1 - rho * rho) * rng.normal(size=200)
    found = rank_agreement(proxy, runs)
    assert found["spearman"] < rho - 0.05
    assert found["corrected"]["spearman"] == pytest.approx(rho, abs=0.07)
    low, high = found["corrected"]["interval"]
    assert low < rho < high < low + 0.25
    low, high = found["ceiling"]["interval"]
    assert low < 1 / math.sqrt(1.4) < high


def test_seeds_that_do_not_agree_have_no_ceiling() -> None:
    runs = np.array([[1, 9], [2, 8], [3, 7], [4, 6], [5, 5], [6, 4.0]])
    found = rank_agreement(np.arange(6), runs)
    assert found["ceiling"]["seed_to_seed"] == -1
    assert found["ceiling"]["ceiling"] is None
    assert found["corrected"] is None


def test_items_are_a_second_source_of_doubt() -> None:
    rng = np.random.default_rng(6)
    proxy, trained = normal_scores(rng, 20, 0.6)
    noise = rng.normal(0, 0.5, size=(2, 2000, 20))
    alone = rank_agreement(proxy, trained)
    both = rank_agreement(proxy, trained, redraws=(proxy + noise[0], (trained + noise[1])[:, :, None]))
    assert both["spearman"] == alone["spearman"]
    for key in ("interval", "kendall_interval"):
        (low, high), (low_of_both, high_of_both) = alone[key], both[key]
        assert low_of_both < low - 0.02, "more doubt, and not more confidence as the noise of draws fades"
        assert high_of_both > high + 0.02
        assert high_of_both <= 1
    exact = rank_agreement(
        proxy, trained, redraws=(np.tile(proxy, (2000, 1)), np.tile(trained, (2000, 1))[..., None])
    )
    assert exact["interval"] == pytest.approx(alone["interval"]), "draws that change nothing"


@settings(deadline=None, max_examples=8)
@given(st.permutations(range(9)), st.integers(0, 5))
def test_only_ranks_count_and_not_the_order_of_the_references(order: list[int], seed: int) -> None:
    a, b = normal_scores(np.random.default_rng(seed), 9, 0.7)

    def ranks(found: dict[str, Any]) -> list[Any]:
        return [found["spearman"], found["kendall"], found["top"]["overlap"], found["relative_regret"]]

    first = rank_agreement(a, b)
    assert ranks(rank_agreement(a[order], b[order])) == pytest.approx(ranks(first))
    again = rank_agreement(np.exp(3 * a), b)
    assert {k: v for k, v in again.items() if k != "offset"} == {
        k: v for k, v in first.items() if k != "offset"
    }


def test_the_offset() -> None:
    found = rank_agreement(np.array([0.5, 0.6, 0.9]), np.array([[0.3, 0.5], [0.4, 0.6], [0.8, 0.8]]))
    assert found["offset"] == {"mean": pytest.approx(0.1), "spread": pytest.approx(0, abs=1e-12)}
    assert found["seeds"] == 2


def test_shapes_and_holes_are_refused() -> None:
    with pytest.raises(ValueError, match="n >= 2"):
        rank_agreement(np.arange(3), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="finite"):
        rank_agreement(np.array([1, np.nan]), np.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        rank_agreement(np.arange(2), np.array([[1, 1], [np.nan, np.nan]]))
    with pytest.raises(ValueError, match="redraws"):
        rank_agreement(np.arange(3), np.arange(3), redraws=(np.zeros((5, 2)), np.zeros((5, 3, 1))))


def test_means_of_drawn_items() -> None:
    rng = np.random.default_rng(0)
    scores = 3 + rng.normal(size=(3, 50))
    scores[0, :5] = np.nan
    drawn = drawn_means(scores, rng)
    assert drawn.shape == (RESAMPLES, 3)
    assert drawn.mean(axis=0) == pytest.approx(np.nanmean(scores, axis=1), abs=0.02)
    assert drawn[:, 1].std() == pytest.approx(scores[1].std() / math.sqrt(50), rel=0.1)
    expected = np.corrcoef(scores[1], scores[2])[0, 1]
    assert np.corrcoef(drawn[:, 1], drawn[:, 2])[0, 1] == pytest.approx(expected, abs=0.1), (
        "the same items for all"
    )
