import numpy as np
import pytest

from mergemix.evals import stats
from mergemix.evals.stats import indistinguishable, interval, paired_difference
from mergemix.evals.utility import Utility

UTILITY = Utility({"sums": 0.75, "mbpp": 0.25}, offset=-0.1)
Items = dict[str, np.ndarray]


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


def test_the_interval_agrees_with_the_analytic_one() -> None:
    a, _ = pair(np.random.default_rng(0), sizes=(900, 400))
    variance = sum(w**2 * a[name].var() / len(a[name]) for name, w in UTILITY.weights.items())
    low, high = interval(UTILITY, a, resamples=8000)
    assert (low + high) / 2 == pytest.approx(UTILITY(a), abs=0.1 * variance**0.5)
    assert (high - low) / 2 == pytest.approx(1.96 * variance**0.5, rel=0.06)
    low, high = interval(UTILITY, a, confidence=0.5, resamples=8000)
    assert (high - low) / 2 == pytest.approx(0.674 * variance**0.5, rel=0.06)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    trials = 300
    for seed in range(trials):
        items = {name: (rng.random(100) < p).astype(float) for name, p in {"sums": 0.3, "mbpp": 0.8}.items()}
        low, high = interval(UTILITY, items, resamples=300, seed=seed)
        covered += low <= -0.1 + 0.75 * 0.3 + 0.25 * 0.8 <= high
    # Binomial(300, 0.95) has a standard deviation of 1.3 percent; the bootstrap is slightly narrow.
    assert 0.90 <= covered / trials <= 0.985


def test_paired_intervals_cover_the_true_difference_as_often_as_they_say() -> None:
    """Resampling the two apart would give intervals ten times too wide, which cover it always."""
    rng = np.random.default_rng(2)
    covered = 0
    trials = 300
    for seed in range(trials):
        difference = paired_difference(UTILITY, *pair(rng, gain=0.1), resamples=300, seed=seed)
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


def test_the_same_seed_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(np.random.default_rng(9))
    assert interval(UTILITY, a, seed=1) == interval(UTILITY, a, seed=1)
    assert interval(UTILITY, a, seed=1) != interval(UTILITY, a, seed=2)
    assert paired_difference(UTILITY, a, b, seed=1) == paired_difference(UTILITY, a, b, seed=1)


@pytest.mark.parametrize("chunk_bytes", [1, 24 * 80 * 7])
def test_intervals_in_small_chunks_of_memory(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    a, b = pair(np.random.default_rng(10))
    whole = paired_difference(UTILITY, a, b)
    monkeypatch.setattr(stats, "_CHUNK_BYTES", chunk_bytes)
    assert paired_difference(UTILITY, a, b) == pytest.approx(whole, abs=0.02)


def test_candidates_on_different_items_are_not_compared() -> None:
    a, b = pair(np.random.default_rng(11))
    with pytest.raises(ValueError, match="must have answered the same items of 'mbpp'"):
        paired_difference(UTILITY, a, {**b, "mbpp": b["mbpp"][1:]})
