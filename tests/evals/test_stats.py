import math
from typing import get_args

import numpy as np
import pytest
from scipy.stats import t as student

from mergemix.evals import simulated, stats
from mergemix.evals.stats import (
    Method,
    engine_noise,
    indistinguishable,
    interval,
    paired_difference,
    t_quantile,
    uninformative,
)
from mergemix.evals.utility import CapabilityUtility, Utility, make_utility

UTILITY = Utility({"sums": 0.75, "mbpp": 0.25}, offset=-0.1)
Items = dict[str, np.ndarray]
both = pytest.mark.parametrize("method", get_args(Method))


def pair(
    rng: np.random.Generator, gain: float = 0.0, sizes: tuple[int, int] = (80, 40)
) -> tuple[Items, Items]:
    """Two candidates on common items; items vary much, candidates by `gain` and a little noise."""
    a, b = {}, {}
    for name, size in zip(UTILITY.weights, sizes, strict=True):
        difficulty = rng.normal(0, 3, size)
        a[name] = difficulty + rng.normal(0, 0.3, size) + gain
        b[name] = difficulty + rng.normal(0, 0.3, size)
    return a, b


@both
def test_the_interval_is_estimate_plus_minus_standard_errors(method: Method) -> None:
    a, _ = pair(np.random.default_rng(0), sizes=(900, 400))
    variance = sum(w**2 * a[name].var() / len(a[name]) for name, w in UTILITY.weights.items())
    low, high = interval(UTILITY, a, method=method, resamples=8000)
    assert (low + high) / 2 == pytest.approx(UTILITY(a), abs=0.1 * variance**0.5)
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.06)
    low, high = interval(UTILITY, a, confidence=0.5, method=method, resamples=8000)
    assert (high - low) / 2 == pytest.approx(0.674 * variance**0.5, rel=0.06)


@both
def test_intervals_cover_the_truth_as_often_as_they_say(method: Method) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    trials = 300
    for seed in range(trials):
        items = {name: (rng.random(100) < p).astype(float) for name, p in {"sums": 0.3, "mbpp": 0.8}.items()}
        low, high = interval(UTILITY, items, method=method, resamples=300, seed=seed)
        covered += low <= -0.1 + 0.75 * 0.3 + 0.25 * 0.8 <= high
    # Binomial(300, 0.95) has a standard deviation of 1.3 percent; the bootstrap is slightly narrow.
    assert 0.90 <= covered / trials <= 0.985


@both
def test_paired_intervals_cover_the_true_difference_as_often_as_they_say(method: Method) -> None:
    """Resampling the two apart would give intervals ten times too wide, which cover it always."""
    rng = np.random.default_rng(2)
    covered = 0
    trials = 300
    for seed in range(trials):
        difference = paired_difference(UTILITY, *pair(rng, gain=0.1), method=method, resamples=300, seed=seed)
        covered += difference.low <= 0.1 <= difference.high
    assert 0.90 <= covered / trials <= 0.985


def test_pairing_tells_apart_what_separate_intervals_do_not() -> None:
    better, worse = pair(np.random.default_rng(3), gain=0.3)
    assert interval(UTILITY, better)[0] < interval(UTILITY, worse)[1]
    difference = paired_difference(UTILITY, better, worse)
    assert 0 < difference.low < difference.estimate < difference.high
    assert indistinguishable(UTILITY, better, {"worse": worse}) == []
    assert indistinguishable(UTILITY, worse, {"better": better}) == []


def test_the_difference_is_that_of_the_utilities_and_antisymmetric() -> None:
    a, b = pair(np.random.default_rng(4))
    there, back = paired_difference(UTILITY, a, b), paired_difference(UTILITY, b, a)
    assert there.estimate == pytest.approx(UTILITY(a) - UTILITY(b))
    assert there == pytest.approx((-back.estimate, -back.high, -back.low))


def test_identical_candidates_differ_by_exactly_0_and_are_indistinguishable() -> None:
    a, _ = pair(np.random.default_rng(5))
    copy = {name: values.copy() for name, values in a.items()}
    assert paired_difference(UTILITY, a, copy) == (0.0, 0.0, 0.0)
    assert indistinguishable(UTILITY, a, {"copy": copy}, noise_floor=0.0) == ["copy"]


def test_a_constant_difference_is_distinguishable_unless_within_the_noise_floor() -> None:
    a, _ = pair(np.random.default_rng(6))
    shifted = {name: values - 0.125 for name, values in a.items()}
    assert indistinguishable(UTILITY, a, {"shifted": shifted}, noise_floor=0.1) == []
    assert indistinguishable(UTILITY, a, {"shifted": shifted}, noise_floor=0.126) == ["shifted"]
    assert indistinguishable(UTILITY, shifted, {"a": a}, noise_floor=0.126) == ["a"]


def test_indistinguishable_decides_as_each_paired_difference_and_keeps_the_order() -> None:
    rng = np.random.default_rng(7)
    best, _ = pair(rng)
    others = {
        key: {name: values + rng.normal(0, 0.3, len(values)) - loss for name, values in best.items()}
        for key, loss in {("z", 1): 0.0, ("a", 2): 0.04, ("m", 3): 0.06, ("b", 4): 1.0}.items()
    }
    expected = []
    for key, other in others.items():
        difference = paired_difference(UTILITY, best, other)
        if difference.low <= 0 <= difference.high:
            expected.append(key)
    assert indistinguishable(UTILITY, best, others) == expected
    assert 0 < len(expected) < len(others)
    assert indistinguishable(UTILITY, best, {}) == []


def test_items_are_resampled_within_their_benchmark() -> None:
    """Benchmarks on quite different scales, each constant: any resample has the same utility."""
    items = {"sums": np.full(7, 0.5), "mbpp": np.full(3, -40.0)}
    assert interval(UTILITY, items) == pytest.approx((UTILITY(items), UTILITY(items)))


def test_benchmarks_that_do_not_count_change_nothing() -> None:
    a, _ = pair(np.random.default_rng(8))
    assert interval(UTILITY, {**a, "extra": np.array([np.nan])}) == interval(UTILITY, a)


def test_the_same_seed_gives_the_same_bootstrap_interval() -> None:
    a, b = pair(np.random.default_rng(9))

    def bootstrap(seed: int) -> list[object]:
        return [
            interval(UTILITY, a, method="bootstrap", seed=seed),
            paired_difference(UTILITY, a, b, method="bootstrap", seed=seed),
        ]

    assert bootstrap(1) == bootstrap(1)
    assert all(x != y for x, y in zip(bootstrap(1), bootstrap(2), strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 16 * 80 * 7])
def test_resampling_in_small_chunks_of_memory(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    a, b = pair(np.random.default_rng(10))
    whole = paired_difference(UTILITY, a, b, method="bootstrap")
    monkeypatch.setattr(stats, "_CHUNK_BYTES", chunk_bytes)
    assert paired_difference(UTILITY, a, b, method="bootstrap") == pytest.approx(whole, abs=0.02)


def test_candidates_on_different_items_are_not_compared() -> None:
    a, b = pair(np.random.default_rng(11))
    with pytest.raises(ValueError, match="must have answered the same items of 'mbpp'"):
        paired_difference(UTILITY, a, {**b, "mbpp": b["mbpp"][1:]})


@both
def test_only_common_items_are_compared(method: Method) -> None:
    """Items that only one has a score for would move the estimate by much, and must not."""
    a, b = pair(np.random.default_rng(12))
    common = {name: slice(5, len(values) - 3) for name, values in a.items()}
    expected = paired_difference(
        UTILITY,
        {name: a[name][part] for name, part in common.items()},
        {name: b[name][part] for name, part in common.items()},
        method=method,
    )
    for name in UTILITY.weights:
        a[name][:5], b[name][:5] = 100.0, np.nan
        a[name][-3:], b[name][-3:] = np.nan, -100.0
    assert paired_difference(UTILITY, a, b, method=method) == expected
    assert np.isfinite(interval(UTILITY, a, method=method)).all()
    with pytest.raises(ValueError, match="a score for an item of 'mbpp' in common"):
        paired_difference(UTILITY, a, {**b, "mbpp": np.full(40, np.nan)}, method=method)


def test_few_items_give_wide_intervals_and_one_gives_no_bound() -> None:
    """With 2 + 2 items of the same spread a normal quantile would cover 78 % instead of 95 %."""
    utility, rng = Utility({"x": 0.5, "y": 0.5}, 0.0), np.random.default_rng(13)
    covered = 0
    for _ in range(1000):
        low, high = interval(utility, {"x": rng.normal(size=2), "y": rng.normal(size=2)})
        assert math.isfinite(low)
        assert math.isfinite(high)
        covered += low <= 0 <= high
    assert covered >= 930
    assert interval(utility, {"x": np.array([1.0]), "y": rng.normal(size=9)}) == (-math.inf, math.inf)


@pytest.mark.parametrize("freedom", [1, 2, 3.7, 12, 49.9, 50.1, 400, 1e5, 1e7])
@pytest.mark.parametrize("probability", [0.001, 0.4, 0.5, 0.9, 0.975, 0.99999])
def test_quantiles_of_student_s_t(probability: float, freedom: float) -> None:
    expected = student.ppf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=5e-6, abs=1e-9)
    assert t_quantile(0.975, math.inf) == pytest.approx(1.959964, abs=1e-6)


def noisy(rng: np.random.Generator, items: Items, share: float) -> Items:
    """The items with a share of the answers flipped."""
    return {name: np.where(rng.random(len(x)) < share, 1 - x, x) for name, x in items.items()}


def test_the_engine_noise_is_the_spread_of_repeated_evaluations() -> None:
    rng = np.random.default_rng(14)
    truth = {name: (rng.random(300) < 0.5).astype(float) for name in UTILITY.weights}
    pairs = [(noisy(rng, truth, 0.05), noisy(rng, truth, 0.05)) for _ in range(400)]
    moved = [UTILITY(a) - UTILITY(b) for a, b in pairs]
    noise = engine_noise(UTILITY, pairs)
    assert noise is not None
    assert noise.standard_error == pytest.approx(np.std(moved), rel=0.1)
    assert noise.largest == pytest.approx(np.abs(moved).max())
    assert noise.flipped == pytest.approx(2 * 0.05 * 0.95, rel=0.1)
    one = engine_noise(UTILITY, pairs[:1])
    assert one is not None
    assert one.standard_error == pytest.approx(np.std(moved), rel=0.35)
    assert one.floor() >= max(one.largest, 1.95 * one.standard_error)
    assert np.mean([abs(m) <= one.floor() for m in moved]) > 0.85


def test_an_engine_that_answers_the_same_twice_has_no_noise() -> None:
    a, _ = pair(np.random.default_rng(15))
    assert engine_noise(UTILITY, []) is None
    noise = engine_noise(UTILITY, [(a, a)])
    assert noise == (0.0, 0.0, 0.0)
    assert noise is not None
    assert noise.floor() == 0.0


def test_noise_that_cancels_in_the_mean_still_counts() -> None:
    """As many items gained as lost: the utilities are equal, by luck."""
    a = {name: np.tile([0.0, 1.0], 50) for name in UTILITY.weights}
    noise = engine_noise(UTILITY, [(a, {name: 1 - x for name, x in a.items()})])
    assert noise is not None
    assert noise.largest == 0
    assert noise.floor() > 0.1


def test_correcting_for_the_number_of_comparisons_keeps_equals_together() -> None:
    """Of 40 candidates that differ by chance alone, one or two look different, unless it is corrected for."""
    rng = np.random.default_rng(16)
    plain = corrected = 0
    for _ in range(20):
        best, _ = pair(rng)
        others = {k: {name: x + rng.normal(0, 0.3, len(x)) for name, x in best.items()} for k in range(40)}
        plain += 40 - len(indistinguishable(UTILITY, best, others))
        corrected += 40 - len(indistinguishable(UTILITY, best, others, correct=True))
    assert plain >= 15
    assert corrected <= 5


CAPABILITIES = {"math": ["sums"], "code": ["mbpp"]}


def nonlinear(spec: str, **references: dict[str, float]) -> CapabilityUtility:
    utility = make_utility(CAPABILITIES, spec, **references)
    assert isinstance(utility, CapabilityUtility)
    return utility


def yes_or_no(rng: np.random.Generator, right: tuple[float, float], size: int) -> tuple[Items, Items]:
    """Two equal candidates on items of which some are harder; right: the chance of each benchmark."""
    a, b = {}, {}
    for name, p in zip(("sums", "mbpp"), right, strict=True):
        hard = rng.random(size) * 0.4 - 0.2
        a[name], b[name] = ((rng.random(size) < p + hard).astype(float) for _ in range(2))
    return a, b


@pytest.mark.parametrize("right", [(0.5, 0.5), (0.4, 0.75)])
@pytest.mark.parametrize("spec", ["worst", "math; code >= 0.5"])
@both
def test_intervals_of_utilities_that_are_not_linear_cover_the_truth(
    method: Method, spec: str, right: tuple[float, float]
) -> None:
    """At a kink, where both capabilities are the lowest or the floor is met exactly, and away from it."""
    utility, rng = nonlinear(spec), np.random.default_rng(20)
    truth = float(utility.of_means({"sums": np.array([right[0]]), "mbpp": np.array([right[1]])})[0])
    alone = paired = 0
    trials = 150
    for seed in range(trials):
        a, b = yes_or_no(rng, right, 100)
        low, high = interval(utility, a, method=method, resamples=300, seed=seed)
        alone += low <= truth <= high
        difference = paired_difference(utility, a, b, method=method, resamples=300, seed=seed)
        paired += difference.low <= 0 <= difference.high
    # Binomial(150, 0.95) has a standard deviation of 1.8 percent.
    assert 0.89 <= alone / trials < 1
    assert paired / trials >= 0.90


def test_a_linear_utility_written_as_a_formula_has_about_the_same_interval_by_simulation() -> None:
    """What is simulated must agree with what is computed where both can be."""
    linear = make_utility(CAPABILITIES, "math")
    formula = nonlinear("max(math, -10 * code)")  # math, in every draw
    a, b = ({n: np.abs(x) for n, x in items.items()} for items in pair(np.random.default_rng(21)))
    assert interval(formula, a) == pytest.approx(interval(linear, a), rel=0.1)
    exact, drawn = paired_difference(linear, a, b), paired_difference(formula, a, b)
    assert drawn.estimate == pytest.approx(exact.estimate)
    few = {"sums": a["sums"][:3], "mbpp": a["mbpp"]}
    assert interval(formula, few, resamples=20000)[1] == pytest.approx(interval(linear, few)[1], rel=0.15)


def test_drawn_means_vary_as_means_of_so_many_items_do() -> None:
    """Student's t of n - 1 degrees has the variance (n - 1) / (n - 3) of a standard normal; two vary together."""
    rng = np.random.default_rng(23)
    num = 9
    a = rng.normal(1, 2, num)
    scores = np.stack([a, 0.5 * a + rng.normal(0, 1, num)])
    [noise] = simulated._t_noise(2, (num,), 200_000, 0)
    drawn = simulated._t_means(scores, *noise)
    assert drawn.mean(axis=1) == pytest.approx(scores.mean(axis=1), abs=0.01)
    assert np.cov(drawn) == pytest.approx(np.cov(scores) / num * (num - 1) / (num - 3), rel=0.04)


@both
def test_pairing_counts_for_utilities_that_are_not_linear_too(method: Method) -> None:
    better, worse = pair(np.random.default_rng(3), gain=0.5)
    utility = nonlinear("worst")
    assert interval(utility, better, method=method)[0] < interval(utility, worse, method=method)[1]
    assert paired_difference(utility, better, worse, method=method).low > 0
    assert indistinguishable(utility, better, {"worse": worse}, method=method) == []
    orders = ((better, worse), (worse, better))
    there, back = (paired_difference(utility, *order, method=method) for order in orders)
    assert there == pytest.approx((-back.estimate, -back.high, -back.low), rel=0.1)


def test_identical_candidates_differ_by_exactly_0_under_any_utility() -> None:
    a, _ = pair(np.random.default_rng(5))
    assert paired_difference(nonlinear("worst"), a, dict(a)) == (0.0, 0.0, 0.0)


def test_only_common_items_count_under_any_utility() -> None:
    a, b = pair(np.random.default_rng(12))
    utility = nonlinear("worst")
    expected = paired_difference(
        utility, {n: x[5:-3] for n, x in a.items()}, {n: x[5:-3] for n, x in b.items()}
    )
    for name in a:
        a[name][:5], b[name][:5] = 100.0, np.nan
        a[name][-3:], b[name][-3:] = np.nan, -100.0
    assert paired_difference(utility, a, b) == expected
    assert np.isfinite(interval(utility, a)).all()


def test_where_a_utility_has_no_finite_value_nothing_is_known() -> None:
    a, _ = pair(np.random.default_rng(22))
    root = nonlinear("sqrt(math)")
    below = {name: scores - 50 for name, scores in a.items()}
    assert root(below) == -math.inf
    assert interval(root, below) == (-math.inf, math.inf)
    assert paired_difference(root, a, below)[1:] == (-math.inf, math.inf)
    single = {"sums": a["sums"][:1], "mbpp": a["mbpp"]}
    assert interval(nonlinear("worst"), single) == (-math.inf, math.inf)


def test_the_engine_noise_of_a_utility_that_is_not_linear() -> None:
    rng = np.random.default_rng(14)
    utility = nonlinear("worst")
    truth = {name: (rng.random(300) < p).astype(float) for name, p in {"sums": 0.5, "mbpp": 0.8}.items()}
    pairs = [(noisy(rng, truth, 0.05), noisy(rng, truth, 0.05)) for _ in range(100)]
    moved = [utility(a) - utility(b) for a, b in pairs]
    noise = engine_noise(utility, pairs)
    assert noise is not None
    assert noise.standard_error == pytest.approx(np.std(moved), rel=0.2)
    assert noise.largest == pytest.approx(np.abs(moved).max())
    assert noise.flipped == pytest.approx(2 * 0.05 * 0.95, rel=0.15)
    assert engine_noise(utility, [(truth, truth)]) == (0.0, 0.0, 0.0)


def test_benchmarks_that_tell_nothing_apart() -> None:
    a = {"same": np.array([0.0, 1.0]), "mean": np.array([0.0, 1.0, 1.0]), "tells": np.array([0.0, 1.0])}
    b = {"same": np.array([0.0, 1.0]), "mean": np.array([1.0, 1.0, 0.0]), "tells": np.array([1.0, 1.0])}
    assert uninformative([a, b]) == {
        "same": "all candidates score the same on every item",
        "mean": "all candidates have the same mean score",
    }
    assert uninformative([a]) == uninformative([]) == {}
    nan = np.nan
    failed = {"same": np.array([nan, 1.0]), "mean": np.array([nan, 0.0, 1.0]), "tells": np.full(2, nan)}
    assert set(uninformative([a, failed])) == {"same"}
