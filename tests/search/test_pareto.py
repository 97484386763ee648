import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mergemix.mixture import Mixture
from mergemix.search import pareto
from mergemix.search.constraints import Constraints
from mergemix.search.pareto import front, observed_front, predicted_front
from mergemix.search.region import Region

NAMES = ("a", "b", "c")


def beaten(scores: np.ndarray, row: int) -> bool:
    return any((other >= scores[row]).all() and (other > scores[row]).any() for other in scores)


@given(arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(-3, 3)))
def test_the_front_is_what_nobody_beats(scores: np.ndarray) -> None:
    assert front(scores).tolist() == [not beaten(scores, row) for row in range(len(scores))]


def test_equal_mixtures_do_not_beat_each_other() -> None:
    assert front(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]])).tolist() == [True, True, False]


def test_many_mixtures_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).integers(0, 9, (101, 3)).astype(float)
    expected = [not beaten(scores, row) for row in range(101)]
    monkeypatch.setattr(pareto, "_BLOCK", 7)
    assert front(scores).tolist() == expected
    assert front(scores, np.zeros_like(scores))[np.array(expected)].all()


def test_what_is_not_clearly_beaten_stays() -> None:
    scores = np.array([[1.0, 1.0], [0.9, 0.9], [0.5, 0.9], [0.5, 0.5]])
    assert front(scores).tolist() == [True, False, False, False]
    assert front(scores, np.full((4, 2), 0.1)).tolist() == [True, True, True, False]
    apart = np.array([[1.0, 1.0], [0.87, 0.87], [0.85, 0.85]])  # the errors together are 0.1414
    assert front(apart, np.full((3, 2), 0.1)).tolist() == [True, True, False]
    one_sided = np.array([[0.0, 0.0], [0.0, 0.05], [0.0, 0.5], [0.0, 0.0]])
    assert front(scores, one_sided).tolist() == [True, False, True, False]


def test_noise_does_not_thin_the_set_of_equals() -> None:
    rng = np.random.default_rng(1)
    scores = 0.5 + 0.01 * rng.standard_normal((40, 2))
    assert front(scores).sum() < 12
    assert front(scores, np.full((40, 2), 1.645 * 0.01)).sum() > 30


def test_measured_mixtures_come_by_their_mean_and_unknown_scores_are_left_out() -> None:
    mixtures = [Mixture.one_hot(NAMES, name) for name in NAMES] + [Mixture.uniform(NAMES)]
    scores = {"x": np.array([0.9, 0.1, np.nan, 0.0]), "y": np.array([0.1, 1.0, 2.0, 0.0])}
    assert observed_front(mixtures, scores) == [1, 0]
    assert observed_front(mixtures[2:3], {"x": np.array([np.nan])}) == []
    margin = {"x": np.full(4, 0.2), "y": np.full(4, 0.2)}
    assert observed_front(mixtures, scores, margin) == [1, 0, 3]


def linear(shares: np.ndarray) -> dict[str, np.ndarray]:
    """Each capability is a domain's share: every mixture of a and b beats nobody and is not beaten."""
    return {"first": shares[:, 0], "second": shares[:, 1]}


def bowl(shares: np.ndarray) -> dict[str, np.ndarray]:
    """Best at (0.6, 0.4, 0) and at (0.2, 0.3, 0.5): what lies on the line between them is not beaten."""
    goals = {"first": np.array([0.6, 0.4, 0.0]), "second": np.array([0.2, 0.3, 0.5])}
    return {name: -((shares - goal) ** 2).sum(axis=1) for name, goal in goals.items()}


def test_the_predicted_front_of_a_known_surface() -> None:
    region = Region.simplex(NAMES)
    mixtures, scores = predicted_front(bowl, region, np.random.default_rng(0), count=12)
    assert len(mixtures) == 12
    begin, end = np.array([0.6, 0.4, 0.0]), np.array([0.2, 0.3, 0.5])
    way = (end - begin) / np.linalg.norm(end - begin)
    for mixture in mixtures:
        offset = np.array(mixture.weights) - begin
        along = offset @ way
        assert np.linalg.norm(offset - along * way) < 0.02
        assert -0.01 < along < np.linalg.norm(end - begin) + 0.01
    assert max(scores["first"]) > -1e-3
    assert max(scores["second"]) > -1e-3
    found = bowl(np.array([mixture.weights for mixture in mixtures]))
    assert found["first"] == pytest.approx(scores["first"])
    assert front(np.stack(list(scores.values()), axis=1)).all()
    means = np.mean(list(scores.values()), axis=0)
    assert (np.diff(means) <= 0).all()


def test_the_predicted_front_stays_inside_the_constraints() -> None:
    region = Constraints(max={"a": 0.3}, min={"c": 0.1}).region(NAMES)
    mixtures, _ = predicted_front(linear, region, np.random.default_rng(0))
    assert all(region.contains(mixture) for mixture in mixtures)
    assert len(set(mixtures)) == len(mixtures) > 10
    weights = np.array([mixture.weights for mixture in mixtures])
    assert weights[:, 2] == pytest.approx(0.1, abs=0.005)
    assert weights[:, 0].max() == 0.3
    assert weights[:, 1].max() == 0.9


def test_one_capability_has_one_best_mixture() -> None:
    mixtures, _ = predicted_front(
        lambda shares: {"x": shares[:, 1]}, Region.simplex(NAMES), np.random.default_rng(0)
    )
    assert mixtures == [Mixture.one_hot(NAMES, "b")]


def test_the_same_seed_gives_the_same_front() -> None:
    region = Region.simplex(("a", "b", "c", "d"))
    first, again, other = (
        predicted_front(linear, region, np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_what_rounding_to_the_grid_has_spoilt_is_left_out() -> None:
    def between(shares: np.ndarray) -> dict[str, np.ndarray]:
        """c is worth much between the points of the grid, and nothing on them."""
        off = np.abs(shares * 1e4 - np.rint(shares * 1e4)).max(axis=1) > 1e-6
        return {"x": shares[:, 0], "y": shares[:, 1] + 2 * off * shares[:, 2]}

    mixtures, scores = predicted_front(between, Region.simplex(NAMES), np.random.default_rng(0))
    assert front(np.stack(list(scores.values()), axis=1)).all()
    assert Mixture.one_hot(NAMES, "c") not in mixtures


def test_starts_compete() -> None:
    peak = np.array([0.1234, 0.4321, 0.4445])

    def needle(shares: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": (np.abs(shares - peak).max(axis=1) < 1e-9).astype(float)}

    mixtures, _ = predicted_front(needle, Region.simplex(NAMES), np.random.default_rng(0), starts=peak[None])
    assert mixtures == [Mixture(NAMES, tuple(peak.tolist()))]
