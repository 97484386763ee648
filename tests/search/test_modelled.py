"""What searches with a model of the utility do with noise, constraints, warm starts, and when they stop."""

import numpy as np
import pytest

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import Outcome, open_search
from mergemix.search.constraints import Constraints
from mergemix.search.modelled import ascend
from mergemix.search.posterior import UTILITY, fit_posterior, fitted_of, measured, slope_of
from mergemix.search.region import Region
from tests.search.conformance import NAMES, drive

BEST = np.array([0.5, 0.3, 0.2, 0.0])


def bowl(mixture: Mixture, best: np.ndarray = BEST) -> float:
    return -float(((np.array(mixture.weights) - best) ** 2).sum())


def noisy(seed: int, sd: float, best: np.ndarray = BEST):
    rng = np.random.default_rng(seed)
    return lambda mixture: bowl(mixture, best) + sd * float(rng.standard_normal())


def free(shares: np.ndarray) -> np.ndarray:
    return np.zeros(len(shares))


def sampled(count: int, seed: int = 0, best: np.ndarray = BEST) -> list[tuple[Mixture, Outcome]]:
    shares = np.random.default_rng(seed).dirichlet(np.ones(4), count)
    mixtures = [Region.simplex(NAMES).snap(row) for row in shares]
    return [(mixture, Outcome(bowl(mixture, best))) for mixture in mixtures]


@pytest.mark.parametrize(
    "options", [{"kind": "bo"}, {"kind": "surrogate", "surrogate": "gp"}], ids=["bo", "surrogate"]
)
def test_few_candidates_find_a_noisy_optimum(options):
    def regret(budget, **options):
        found = []
        for seed in range(4):
            search = open_search(names=NAMES, budget=budget, seed=seed, **options)
            drive(search, noisy(seed, 0.05))
            found.append(-bowl(search.recommend()[0]))
        return np.mean(found)

    assert regret(25, **options) < min(0.02, 0.7 * regret(60, kind="random"))


def test_the_best_of_a_nonlinear_utility_is_found():
    """The worst of two capabilities: where they cross, which is best for neither."""

    def outcome(mixture: Mixture) -> Outcome:
        first, second = mixture.weights[:2]
        return Outcome(min(first, second), 0.0, {"a": (first, 0.0), "b": (second, 0.0)})

    search = open_search("bo", NAMES, budget=14)
    search.objective = lambda scores: np.minimum(scores["a"], scores["b"])
    proposed = drive(search, outcome)
    assert max(min(mixture.weights[:2]) for mixture in proposed) > 0.47
    mean, sd = search.predictions[proposed[-1]]
    assert mean == pytest.approx(outcome(proposed[-1]).utility, abs=0.1)
    assert sd >= 0
    assert set(search.predictions) == set(proposed[5:])


def test_a_proposal_takes_account_of_those_under_way():
    search = open_search("bo", NAMES, budget=40, batch=4)
    search.tell([(mixture, bowl(mixture)) for mixture in search.ask()])
    batch = search.ask()
    assert len(batch) == 4
    shares = np.array([mixture.weights for mixture in batch])
    apart = np.abs(shares[:, None] - shares).sum(axis=2)[np.triu_indices(4, 1)] / 2
    assert apart.min() > 0.01


@pytest.mark.parametrize("kind", ["bo", "cma", "surrogate"])
def test_a_penalty_draws_to_the_prior(kind):
    prior = dict.fromkeys(NAMES, 0.25)
    found = []
    for penalty in (0.0, 10.0):
        region = Constraints(prior=prior, kl_penalty=penalty).region(NAMES)
        options = {"surrogate": "gp"} if kind == "surrogate" else {}
        search = open_search(kind, NAMES, budget=30, region=region, **options)
        drive(search, lambda mixture: mixture.weights[0])
        found.append(search.recommend()[0].weights[0])
    assert found[0] > 0.9
    assert found[1] < 0.4


def test_seventeen_constrained_domains():
    names = tuple("abcdefghijklmnopq")
    region = Constraints(
        max={"a": 0.2, "b": 0.3},
        min={"c": 0.05},
        pin={"d": 0.1},
        prior=dict.fromkeys(names, 1 / 17),
        kl_limit=1.0,
    ).region(names)
    best = np.linspace(0, 1, 17) / np.linspace(0, 1, 17).sum()
    search = open_search("bo", names, budget=len(region.start_points()) + 6, region=region)
    proposed = drive(search, lambda mixture: -float(((np.array(mixture.weights) - best) ** 2).sum()))
    assert all(region.contains(mixture) for mixture in proposed)
    errors = [((np.array(mixture.weights) - best) ** 2).sum() for mixture in proposed]
    assert min(errors[-6:]) < min(errors[:-6])


@pytest.mark.parametrize("kind", ["bo", "cma", "surrogate"])
def test_the_best_mixtures_of_an_earlier_study_come_early(kind):
    hints = sampled(30)
    search = open_search(kind, NAMES, budget=12)
    search.learn([*hints, (hints[0][0], Outcome(None))], same=False)
    search.tell([(mixture, bowl(mixture)) for mixture in search.ask()])
    ranked = sorted(hints, key=lambda pair: -pair[1].utility)
    assert search.ask() == [mixture for mixture, _ in ranked[:3]]


def test_a_like_surface_helps_and_a_misleading_one_hardly_hurts():
    def regret(hints):
        found = []
        for seed in range(3):
            search = open_search("bo", NAMES, budget=16, seed=seed)
            search.learn(hints, same=False)
            proposed = drive(search, noisy(seed, 0.02))
            found.append(min(-bowl(mixture) for mixture in proposed))
        return np.mean(found)

    like = [(mixture, Outcome(5 + 3 * outcome.utility)) for mixture, outcome in sampled(40)]
    unlike = [(mixture, Outcome(-outcome.utility)) for mixture, outcome in sampled(40)]
    alone = regret([])
    assert regret(like) < alone + 0.002
    assert regret(unlike) < alone + 0.02


def test_what_is_known_of_the_same_surface_counts_as_data():
    search = open_search("bo", NAMES, budget=7)
    search.learn(sampled(40), same=True)
    proposed = drive(search, bowl)
    assert max(bowl(mixture) for mixture in proposed[5:]) > -0.003
    again = set(proposed[5:]) & {mixture for mixture, _ in sampled(40)}
    assert again == {max(sampled(40), key=lambda pair: pair[1].utility)[0]}, "only the best is measured again"


def test_it_stops_when_no_gain_is_left_to_be_seen():
    search = open_search("bo", NAMES, budget=200)
    proposed = drive(search, lambda mixture: mixture.weights[0])
    assert "no_gain" in search.stop()
    assert 25 <= len(proposed) < 60
    assert max(mixture.weights[0] for mixture in proposed) == 1


def test_it_stops_when_the_interval_is_as_narrow_as_asked():
    counts = []
    for interval in (0.1, 0.004):
        search = open_search("bo", NAMES, budget=120, interval=interval)
        counts.append(len(drive(search, noisy(0, 0.02))))
        assert "interval" in search.stop()
        assert 1.645 * search.recommend()[2] < 1.5 * interval
    assert 25 == counts[0] < counts[1] < 120, (
        "of fewer than 20 candidates beside the start points no model is sure"
    )
    with pytest.raises(ConfigError, match="must be above 0, but is 0"):
        open_search("bo", NAMES, budget=60, interval=0)


@pytest.mark.parametrize("surrogate", ["auto", "lightgbm", "gp", "scheffe"])
def test_every_surrogate_takes_a_few_points(surrogate):
    search = open_search("surrogate", NAMES, budget=9, surrogate=surrogate)
    proposed = drive(search, bowl)
    assert len(set(proposed)) == 9
    assert set(search.predictions) == set(proposed[7:])
    assert search.identity["surrogate"] == surrogate


def test_half_of_the_budget_is_the_design():
    search = open_search("surrogate", NAMES, budget=21, surrogate="gp")
    search.tell([(mixture, bowl(mixture)) for mixture in search.ask()])
    design = search.ask()
    assert len(design) == 8
    search.tell([(mixture, bowl(mixture)) for mixture in design])
    first = search.ask()
    assert len(first) == 2
    assert np.mean([bowl(mixture) for mixture in first]) > np.max([bowl(mixture) for mixture in design])


def test_failures_are_not_tried_again_and_again():
    """All of a corner fails, and it is where the surface points to."""

    def outcome(mixture: Mixture) -> float | None:
        return None if mixture.weights[0] > 0.5 else mixture.weights[0]

    search = open_search("bo", NAMES, budget=30)
    proposed = drive(search, outcome)
    assert sum(outcome(mixture) is None for mixture in proposed) < 15
    assert max(mixture.weights[0] for mixture in proposed if mixture.weights[0] <= 0.5) > 0.45


def test_common_standard_errors_are_no_noise_between_candidates():
    evidence = [(mixture, Outcome(0.0, 0.3)) for mixture, _ in sampled(4)]
    evidence[2] = evidence[2][0], Outcome(0.0, 0.5, partial=True)
    assert measured(evidence, None).noise[UTILITY].round(9).tolist() == [0, 0, 0.16, 0]


def test_capabilities_are_modelled_where_they_are_known():
    plain = sampled(5)
    detailed = [(m, Outcome(1.0, 0.0, {"a": (2.0, 0.1), "b": (3.0, 0.1)})) for m, _ in sampled(6, seed=1)]
    partly = [(m, Outcome(1.0, 0.0, {"a": (2.0, 0.1)})) for m, _ in sampled(2, seed=2)]
    assert set(measured([*plain, *detailed], max).scores) == {"a", "b"}
    assert len(measured([*plain, *detailed], max)) == 6
    some = measured([*plain, *detailed, *partly], max)
    assert {name: len(some.of(name)[0]) for name in some.scores} == {"a": 8, "b": 6}
    assert np.isfinite(np.concatenate(some.of("b"), axis=None)).all()
    assert set(measured([*plain, *detailed], None).scores) == {UTILITY}
    assert set(measured(plain, max).scores) == {UTILITY}
    assert len(measured([], max)) == 0


def test_what_is_expected_of_a_utility_of_several_is_that_of_one():
    """Of a single capability, drawing gives what the formulas give."""
    evidence = sampled(12)
    both = [(m, Outcome(o.utility, 0.0, {"a": (o.utility, 0.0)})) for m, o in evidence]
    exact = fit_posterior(evidence, None, free)
    drawn = fit_posterior(both, lambda scores: scores["a"], free)
    at = np.random.default_rng(3).dirichlet(np.ones(4), 50)
    for one, other in zip(exact.moments(at), drawn.moments(at), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    best = float(exact.moments(at)[0].max())
    gains = exact.expected_improvement(at, best)
    np.testing.assert_allclose(drawn.expected_improvement(at, best), gains, atol=0.05 * gains.max())
    assert drawn.noise_sd(at) == pytest.approx(exact.noise_sd(at), rel=1e-6)
    pending = at[:2]
    assert (drawn.given(pending).moments(pending)[1] < drawn.moments(pending)[1]).all()
    np.testing.assert_allclose(exact.given(pending).moments(at)[0], exact.moments(at)[0], atol=1e-6)
    worst = min(outcome.utility for _, outcome in evidence)
    np.testing.assert_allclose(exact.failed(pending).moments(pending)[0], worst, rtol=0.2)


def test_models_are_the_same_whatever_is_remembered():
    evidence = sampled(20)
    memory: dict = {}
    for count in (17, 18, 19, 20):
        remembered = fit_posterior(evidence[:count], None, free, memory=memory)
    fresh = fit_posterior(evidence, None, free, memory={})
    at = np.random.default_rng(0).dirichlet(np.ones(4), 30)
    np.testing.assert_array_equal(remembered.moments(at), fresh.moments(at))
    assert [fitted_of(n) for n in (1, 11, 12, 13, 40, 100)] == [1, 11, 12, 12, 36, 96]


def test_a_slope_is_shrunk_by_its_uncertainty():
    rng = np.random.default_rng(0)
    guess = rng.normal(size=30)
    assert slope_of(guess, 2 * guess) == pytest.approx(2)
    assert 1.5 < slope_of(guess, 2 * guess + 0.5 * rng.normal(size=30)) < 2.2
    assert slope_of(guess, -guess) == 0
    assert slope_of(guess, 0.01 * guess + rng.permutation(guess)) < 0.2
    assert slope_of(np.ones(30), guess) == 0
    assert slope_of(guess[:3], guess[:3]) == 0


@pytest.mark.parametrize("best", [[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
def test_ascend_comes_near_the_maximum_from_anywhere(best):
    points, values = ascend(
        lambda x: -((x - best) ** 2).sum(axis=1),
        Region.simplex(NAMES),
        np.random.default_rng(0),
        np.eye(4)[3:],
    )
    assert np.abs(points[0] - best).max() < 0.02
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(points.sum(axis=1), 1)
    assert points.min() >= 0
