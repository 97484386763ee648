"""What every surrogate promises, checked on all of them; and what each is good at."""

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.search.surrogates import SURROGATES, Prediction, Surrogate, open_surrogate
from mergemix.search.surrogates.base import folds
from mergemix.search.surrogates.linear import Ridge
from mergemix.search.surrogates.loglinear import LogLinear

NAMES = (*SURROGATES, "auto")
Surface = dict[str, np.ndarray]


def points(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, n, k)).dirichlet(np.full(k, 0.8), n)


def logarithmic(x: np.ndarray) -> np.ndarray:
    return 3 - np.log(x + 0.02) @ np.linspace(0.2, 1.0, x.shape[1])


def quadratic(x: np.ndarray) -> np.ndarray:
    return x @ np.linspace(0, 1, x.shape[1]) + 4 * x[:, 0] * x[:, 1]


def mixing_law(x: np.ndarray) -> np.ndarray:
    return 2 + np.exp(x @ np.linspace(-2, 1, x.shape[1]))


def step(x: np.ndarray) -> np.ndarray:
    return np.where(x[:, 0] > 0.3, 1.0, 0.0) + np.where(x[:, 1] > 0.2, 0.5, 0.0)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def fitted(
    name: str, surface=logarithmic, n: int = 40, k: int = 4, noise: float = 0.0, seed: int = 0
) -> Surrogate:
    shares = points(n, k, seed)
    scores = surface(shares) + noise * np.random.default_rng(seed).normal(size=n)
    return open_surrogate(name).fit(shares, scores)


@cache
def each(surface, n: int, k: int, noise: float, seed: int = 0) -> dict[str, Surrogate]:
    """All of NAMES, fitted to the same points; the members of `auto` are what they are alone."""
    auto = fitted("auto", surface, n, k, noise, seed)
    others = {
        name: fitted(name, surface, n, k, noise, seed) for name in SURROGATES if name not in auto.members
    }
    return {**auto.members, **others, "auto": auto}


def test_the_members_of_auto_are_what_they_are_alone() -> None:
    together, more = each(logarithmic, 40, 5, 0.2), points(20, 5, seed=7)
    assert set(together) == set(NAMES)
    for name in ("trees", "gp", "loglinear", "scheffe"):
        alone = fitted(name, logarithmic, 40, 5, noise=0.2).predict(more)
        assert all(np.array_equal(a, b) for a, b in zip(alone, together[name].predict(more), strict=True))


@pytest.mark.parametrize("name", NAMES)
class TestEverySurrogate:
    def test_ranks_a_smooth_surface(self, name: str) -> None:
        more = points(200, 4, seed=9)
        assert rank_correlation(fitted(name).predict(more).mean, logarithmic(more)) > 0.8

    def test_predictions_have_one_value_a_mixture_and_positive_spread(self, name: str) -> None:
        found = fitted(name, noise=0.1).predict(points(7, 4, seed=3))
        assert found.mean.shape == found.sd.shape == found.noise_sd.shape == (7,)
        assert (found.sd > 0).all()
        assert (found.noise_sd >= 0).all()
        low, high = found.interval(0.9)
        narrow_low, narrow_high = found.surface_interval(0.9)
        assert (low <= narrow_low).all()
        assert (narrow_high <= high).all()

    def test_the_mean_alone_is_the_same_mean(self, name: str) -> None:
        model, more = fitted(name, noise=0.1), points(9, 4, seed=3)
        np.testing.assert_allclose(model.mean(more), model.predict(more).mean, rtol=1e-12)

    def test_same_input_same_bits(self, name: str) -> None:
        more = points(9, 4, seed=3)
        first, second = (fitted(name, noise=0.1).predict(more) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    def test_fit_leaves_its_own_object_and_data_alone(self, name: str) -> None:
        shares = points(20, 3)
        scores = logarithmic(shares)
        copies = shares.copy(), scores.copy()
        model = open_surrogate(name)
        before = dict(model.__dict__)
        assert model.fit(shares, scores) is not model
        assert model.__dict__ == before
        assert np.array_equal(shares, copies[0])
        assert np.array_equal(scores, copies[1])

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_units_of_the_score_do_not_matter(self, name: str, scale: float) -> None:
        shares, more = points(30, 3), points(20, 3, seed=5)
        scores = quadratic(shares) + 0.1 * np.random.default_rng(0).normal(size=30)
        plain = open_surrogate(name).fit(shares, scores).predict(more)
        scaled = open_surrogate(name).fit(shares, 5 * scale + scale * scores).predict(more)
        np.testing.assert_allclose(scaled.mean, 5 * scale + scale * plain.mean, rtol=0, atol=0.1 * scale)
        np.testing.assert_allclose(scaled.sd, scale * plain.sd, rtol=0.5)

    def test_equal_scores_are_predicted_to_stay_equal(self, name: str) -> None:
        model = open_surrogate(name).fit(points(20, 3), np.full(20, 0.7))
        assert any("all 20 scores are equal" in warning for warning in model.warnings)
        found = model.predict(points(5, 3, seed=4))
        np.testing.assert_allclose(found.mean, 0.7)
        assert np.isfinite(np.array(found.interval())).all()

    @pytest.mark.parametrize("n", range(1, 13))
    def test_too_few_points_give_a_simpler_model_and_say_so(self, name: str, n: int) -> None:
        shares = points(n, 5)
        model = open_surrogate(name).fit(shares, quadratic(shares))
        if n < model.needs(5):
            assert any(
                f"{name} needs at least {model.needs(5)} different mixtures" in text
                for text in model.warnings
            )
        else:
            assert not model.warnings
        found = model.predict(points(6, 5, seed=2))
        assert all(np.isfinite(part).all() for part in (*found[:3], *found.interval()))
        assert model.held_out.mean.shape == (n,)

    def test_one_mixture_measured_again_and_again(self, name: str) -> None:
        scores = np.random.default_rng(0).normal(size=15)
        found = open_surrogate(name).fit(np.full((15, 3), 1 / 3), scores).predict(np.full((1, 3), 1 / 3))
        assert found.mean[0] == pytest.approx(scores.mean(), abs=0.2)
        low, high = found.interval(0.9)
        assert 1.5 < high[0] - low[0] < 8

    def test_held_out_points_are_predicted_without_them(self, name: str) -> None:
        """Scores of pure noise cannot be predicted, whatever a model remembers of them."""
        shares = points(60, 4)
        scores = np.random.default_rng(3).normal(size=60)
        model = open_surrogate(name).fit(shares, scores)
        assert abs(rank_correlation(model.held_out.mean, scores)) < 0.35

    def test_known_noise_is_heard(self, name: str) -> None:
        """A third of the scores are nonsense, and known to be: the others count."""
        shares, more = points(60, 3), points(100, 3, seed=6)
        rng = np.random.default_rng(1)
        bad = np.arange(60) % 3 == 0
        scores = quadratic(shares) + np.where(bad, 5.0, 0.02) * rng.normal(size=60)
        noise_var = np.where(bad, 25.0, 0.02**2)
        told = open_surrogate(name).fit(shares, scores, noise_var).predict(more).mean
        untold = open_surrogate(name).fit(shares, scores).predict(more).mean
        errors = [np.sqrt(np.mean((found - quadratic(more)) ** 2)) for found in (told, untold)]
        assert errors[0] < (0.9 if name == "lightgbm" else 0.7) * errors[1]  # one tree smooths nothing

    def test_wrong_shapes_and_numbers(self, name: str) -> None:
        model, shares = open_surrogate(name), points(10, 3)
        for bad in (np.zeros(9), np.zeros((10, 1)), np.full(10, np.nan)):
            with pytest.raises(ValueError, match="must be"):
                model.fit(shares, bad)
        with pytest.raises(ValueError, match="noise_var"):
            model.fit(shares, np.arange(10.0), np.full(10, -1.0))
        with pytest.raises(ValueError, match="scores"):
            model.fit(np.empty((0, 3)), np.empty(0))


@pytest.mark.parametrize("surface", [logarithmic, quadratic, mixing_law, step])
@pytest.mark.parametrize("k", [2, 6])
def test_auto_is_about_as_good_as_the_best(surface, k: int) -> None:
    more = points(300, k, seed=8)
    ranks = {
        name: rank_correlation(model.predict(more).mean, surface(more))
        for name, model in each(surface, 50, k, 0.05).items()
    }
    assert ranks["auto"] > max(ranks.values()) - 0.04, ranks


@pytest.mark.parametrize("name", NAMES)
def test_ninety_percent_intervals_hold_about_ninety_percent(name: str) -> None:
    inside = []
    for seed in range(4):
        more = points(200, 5, seed=100 + seed)
        truth = logarithmic(more) + 0.2 * np.random.default_rng(50 + seed).normal(size=200)
        low, high = each(logarithmic, 40, 5, 0.2, seed)[name].predict(more).interval(0.9)
        inside.append(np.mean((low <= truth) & (truth <= high)))
    assert 0.83 < np.mean(inside) < 0.985, inside


def test_auto_takes_each_for_what_it_is_good_at() -> None:
    assert fitted("auto", step, 60, 3).weights["trees"] > 0.3
    assert fitted("auto", lambda x: x @ [1, 2, 3] + 5 * x[:, 0] * x[:, 1], 40, 3).weights["trees"] == 0


def test_the_law_of_data_mixing_is_recognised() -> None:
    shares = points(60, 4)
    for sign in (1, -1):
        model = LogLinear().fit(shares, sign * mixing_law(shares))
        assert "exp(linear in the shares)" in model.form
        more = points(50, 4, seed=2)
        np.testing.assert_allclose(model.predict(more).mean, sign * mixing_law(more), rtol=0.05)
    assert "log(1 + share / 0.0" in LogLinear().fit(shares, logarithmic(shares)).form


def test_a_ridge_s_spread_is_that_of_least_squares_where_the_penalty_is_small() -> None:
    rng = np.random.default_rng(4)
    features = rng.normal(size=(200, 3)) * [1.0, 3.0, 0.2]
    ridge = Ridge.fit(features, features @ [1.0, -2.0, 9.0] + 0.1 * rng.normal(size=200))
    more = rng.normal(size=(20, 3))
    missing = max(ridge.sd**2 - ridge.noise_sd**2, 0.0)
    unusual = (ridge.predict(more).sd ** 2 - missing / 2) / ridge.noise_sd**2
    centred, off = features - features.mean(axis=0), more - features.mean(axis=0)
    expected = (off @ np.linalg.inv(centred.T @ centred) * off).sum(axis=1) + 1 / 200
    np.testing.assert_allclose(unusual, expected, rtol=0.05)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="auto, lightgbm, trees, gp, loglinear, scheffe, but is 'forest'"):
        open_surrogate("forest")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(0, 3), st.integers(1, 5))
def test_every_point_is_held_out_once_and_repeats_together(n: int, seed: int, repeats: int) -> None:
    shares = np.repeat(points(n, 3), repeats, axis=0)
    shares = shares[np.random.default_rng(seed).permutation(len(shares))]
    held_once = np.zeros(len(shares), int)
    for kept, held in folds(shares, seed):
        held_once[held] += 1
        assert len(kept) + len(held) == len(shares)
        assert not {row.tobytes() for row in shares[kept]} & {row.tobytes() for row in shares[held]}
    assert (held_once == (1 if n > 1 else 0)).all()


def test_intervals_are_student_s() -> None:
    found = Prediction(np.zeros(1), np.full(1, 3.0), np.full(1, 4.0), 5.0)
    assert found.interval(0.9)[1] == pytest.approx(5 * 2.015, rel=1e-3)
    assert found.surface_interval(0.9)[0] == pytest.approx(-3 * 2.015, rel=1e-3)


def test_another_process_gives_the_same_bits() -> None:
    program = (
        "import numpy as np\nfrom mergemix.search.surrogates import open_surrogate\n"
        "x = np.random.default_rng(0).dirichlet(np.ones(3), 30)\n"
        "f = open_surrogate('auto').fit(x, np.sin(5 * x[:, 0]) + x[:, 1])\n"
        "print(f.predict(x[:5] * 0.5 + 0.5 / 3).mean.tobytes().hex())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 30)
    here = open_surrogate("auto").fit(shares, np.sin(5 * shares[:, 0]) + shares[:, 1])
    assert there.strip() == here.predict(shares[:5] * 0.5 + 0.5 / 3).mean.tobytes().hex()


def test_trees_of_very_unequal_weights_are_grown() -> None:
    """Scores of stopped candidates beside whole ones: LightGBM failed here while leaves might weigh nothing."""
    thousandths = [
        [200, 200, 200, 200], [1000, 0, 0, 0], [0, 1000, 0, 0], [0, 0, 1000, 0], [0, 0, 0, 1000], [0, 0, 0, 0],
        [597, 0, 223, 180], [567, 0, 223, 210], [545, 0, 225, 230], [707, 0, 293, 0], [699, 0, 301, 0],
        [689, 0, 293, 18],
        [655, 0, 300, 45], [666, 0, 310, 24], [693, 0, 307, 0], [693, 0, 307, 0], [692, 0, 308, 0], [686, 0, 314, 0],
        [701, 0, 291, 0], [699, 0, 293, 0], [701, 0, 291, 0], [703, 0, 291, 0], [701, 0, 293, 0], [703, 0, 291, 0],
        [706, 0, 290, 0], [706, 0, 289, 0],
    ]  # fmt: skip
    shares = np.array([[*row, 1000 - sum(row)] for row in thousandths]) / 1000
    scores = np.array([
        -0.227, 1.0, -2.065, -0.665, -1.116, -0.563, 0.606, 0.543, 0.519, 0.77, 0.752, 0.74, 0.697, 0.713, 0.751, 0.728,
        0.745, 0.734, 0.755, 0.755, 0.769, 0.755, 0.754, 0.772, 0.762, 0.76,
    ])  # fmt: skip
    whole = [0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 16]
    noise = np.where(np.isin(np.arange(26), whole), 0.006, 0.675)
    for seed in range(10):
        for name in ("trees", "lightgbm"):
            fitted = open_surrogate(name).fit(shares, scores, noise, seed=seed)
            assert np.isfinite(fitted.predict(shares).mean).all()
