import math

import numpy as np
import pytest

from mergemix.evals.utility_spec import Objective, capability_objective
from mergemix.mixture import LayerGroup, Mixture
from mergemix.search import decision as module
from mergemix.search.base import Outcome
from mergemix.search.constraints import Constraints
from mergemix.search.decision import decide
from mergemix.search.region import Region

NAMES = ("a", "b", "c")
CAPABILITIES = ["first", "second"]
ERROR = 0.002
Observations = list[tuple[Mixture, Outcome]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model in place of several: fits are not what is tested here."""
    monkeypatch.setattr(module, "FEW", 0)


def surface(shares: np.ndarray) -> dict[str, np.ndarray]:
    """`first` is best at a 0.7, b 0.3; `second` grows with c."""
    goal = np.array([0.7, 0.3, 0.0])
    return {"first": 0.8 - ((shares - goal) ** 2).sum(axis=-1), "second": 0.3 + 0.4 * shares[..., 2]}


def observations(objective: Objective, count: int = 24, seed: int = 0, error: float = ERROR) -> Observations:
    rng = np.random.default_rng(seed)
    region = Region.simplex(NAMES)
    mixtures = [*region.start_points(), *(region.snap(s) for s in rng.dirichlet(np.ones(3), size=count))]
    found = []
    for mixture in mixtures:
        scores = {
            name: (float(value + error * rng.standard_normal()), error)
            for name, value in surface(np.array(mixture.weights)).items()
        }
        utility = float(objective({name: np.array([value]) for name, (value, _) in scores.items()})[0])
        found.append((mixture, Outcome(utility, error, scores)))
    return found


def distance(mixture: Mixture, goal: tuple[float, ...]) -> float:
    return float(np.abs(np.array(mixture.weights) - goal).sum() / 2)


def test_the_predicted_optimum_is_that_of_the_surface() -> None:
    objective = capability_objective("first", CAPABILITIES)
    decision = decide(NAMES, observations(objective), objective)
    assert distance(decision.best.mixture, (0.7, 0.3, 0.0)) < 0.05
    assert decision.best.utility == pytest.approx(0.8, abs=0.01)
    low, high = decision.best.interval
    assert low < 0.8 < high < low + 0.05
    assert decision.points == 28
    assert decision.unconstrained == decision.best
    assert decision.prices == ()
    assert set(decision.best.capabilities) == {"first", "second"}
    second, low, high = decision.best.capabilities["second"]
    assert second == pytest.approx(0.3, abs=0.02)
    assert second - low == pytest.approx(high - second)
    assert high > second


def test_constraints_hold_and_have_a_price() -> None:
    objective = capability_objective("first", CAPABILITIES)
    region = Constraints(max={"a": 0.4, "c": 0.9}, min={"c": 0.2}).region(NAMES)
    decision = decide(NAMES, observations(objective), objective, region)
    best = decision.best.mixture
    assert region.contains(best)
    assert distance(best, (0.4, 0.4, 0.2)) < 0.02
    assert distance(decision.unconstrained.mixture, (0.7, 0.3, 0.0)) < 0.05
    prices = {price.text: price for price in decision.prices}
    assert set(prices) == {"max a=0.4", "min c=0.2"}
    assert [price.price for price in decision.prices] == sorted(
        (p.price for p in decision.prices), reverse=True
    )

    def value(*shares: float) -> float:
        return float(surface(np.array(shares))["first"])

    here = value(0.4, 0.4, 0.2)
    assert prices["max a=0.4"].price == pytest.approx(value(0.6, 0.2, 0.2) - here, abs=0.008)
    assert prices["min c=0.2"].price == pytest.approx(value(0.4, 0.45, 0.15) - here, abs=0.004)
    assert prices["min c=0.2"].utility == pytest.approx(decision.best.utility + prices["min c=0.2"].price)
    assert not region.contains(prices["max a=0.4"].mixture)


def test_floors_are_met_by_what_is_predicted() -> None:
    objective = capability_objective("first; second >= 0.4", CAPABILITIES)
    decision = decide(NAMES, observations(objective), objective)
    assert decision.best.shortfalls == {}
    assert decision.best.mixture.as_dict()["c"] == pytest.approx(0.25, abs=0.02)
    assert decision.best.capabilities["second"][0] >= 0.4
    out_of_reach = capability_objective("first; second >= 0.9", CAPABILITIES)
    best = decide(NAMES, observations(out_of_reach), out_of_reach).best
    assert best.mixture == Mixture.one_hot(NAMES, "c")
    assert best.shortfalls == pytest.approx({"second >= 0.9": 0.2}, abs=0.01)
    assert best.describe()["shortfalls"] == best.shortfalls


def test_a_kink_is_found() -> None:
    """The lowest capability: the best mixture is where both are the same."""
    objective = capability_objective("min(first, second + 0.2)", CAPABILITIES)
    best = decide(NAMES, observations(objective), objective).best
    first, second = (best.capabilities[name][0] for name in CAPABILITIES)
    assert first == pytest.approx(second + 0.2, abs=0.005)
    low, high = best.interval
    assert low <= best.utility <= high


def test_intervals_of_predictions_cover_new_measurements() -> None:
    objective = capability_objective("first=1,second=2", CAPABILITIES)
    covered = surface_covered = trials = 0
    rng = np.random.default_rng(0)
    for seed in range(3):
        found = decide(NAMES, observations(objective, seed=seed, error=0.02), objective)
        for shares in rng.dirichlet(np.ones(3), size=40):
            mixture = Region.simplex(NAMES).snap(shares)
            truth = {
                n: v + 0.02 * rng.standard_normal() for n, v in surface(np.array(mixture.weights)).items()
            }
            utility = float(objective({name: np.array([value]) for name, value in truth.items()})[0])
            forecast = found.models.forecast(mixture)
            covered += forecast.interval[0] <= utility <= forecast.interval[1]
            exact = {name: np.array([v]) for name, v in surface(np.array(mixture.weights)).items()}
            surface_covered += abs(forecast.utility - float(objective(exact)[0])) <= 2 * forecast.surface
            trials += 1
    assert covered / trials > 0.88
    assert surface_covered / trials > 0.85


def test_the_penalty_counts_in_the_choice_and_not_in_the_utility() -> None:
    objective = capability_objective("first", CAPABILITIES)
    evidence = observations(objective)
    region = Constraints(prior={"a": 1, "b": 1, "c": 1}, kl_penalty=10.0).region(NAMES)
    decision = decide(NAMES, evidence, objective, region)
    assert distance(decision.best.mixture, (1 / 3, 1 / 3, 1 / 3)) < 0.05
    assert decision.best.utility > 0.5
    assert decision.best.penalty == pytest.approx(
        float(region.penalty(np.array([decision.best.mixture.weights]))[0])
    )
    assert distance(decision.unconstrained.mixture, (0.7, 0.3, 0.0)) < 0.05
    assert decision.unconstrained.penalty == 0


def test_the_same_evidence_gives_the_same_decision() -> None:
    objective = capability_objective("worst", CAPABILITIES)
    evidence = observations(objective, count=8)
    assert (
        decide(NAMES, evidence, objective, seed=3).describe()
        == decide(NAMES, evidence, objective, seed=3).describe()
    )


def test_what_is_no_measured_mixture_of_data_is_left_out() -> None:
    objective = capability_objective("first", CAPABILITIES)
    evidence = observations(objective, count=8)
    group = LayerGroup(("*",), (1.0, 0.0, 0.0))
    best = Outcome(9.0, 0.1, {"first": (9.0, 0.1), "second": (9.0, 0.1)})
    more = [
        (Mixture(NAMES, (0.2, 0.3, 0.5), (group,)), best),
        (Mixture.base_only(NAMES), best),
        (Mixture(NAMES, (0.1, 0.4, 0.5)), Outcome(None)),
        (Mixture(("a", "b", "d"), (0.2, 0.3, 0.5)), best),
    ]
    decision = decide(NAMES, [*evidence, *more], objective)
    assert decision.describe() == decide(NAMES, evidence, objective).describe()
    with pytest.raises(ValueError, match="needs a measured mixture"):
        decide(NAMES, more, objective)


def test_without_capabilities_the_utility_itself_is_modelled() -> None:
    objective = capability_objective("first", CAPABILITIES)
    bare = [(mixture, Outcome(outcome.utility)) for mixture, outcome in observations(objective)]
    for given in (None, objective):
        decision = decide(NAMES, bare, given)
        assert distance(decision.best.mixture, (0.7, 0.3, 0.0)) < 0.05
        assert list(decision.models.kinds) == ["utility"]


def test_stopped_candidates_teach_less() -> None:
    """A candidate far off the surface, with an error to match, moves the optimum less than an exact one."""
    objective = capability_objective("first", CAPABILITIES)
    evidence = observations(objective)
    lie = Mixture(NAMES, (0.0, 0.4, 0.6))

    def predicted(error: float) -> float:
        outcome = Outcome(1.3, error, {"first": (1.3, error), "second": (0.5, error)}, partial=True)
        return decide(NAMES, [*evidence, (lie, outcome)], objective).models.forecast(lie).utility

    truth = float(surface(np.array(lie.weights))["first"])
    assert abs(predicted(1.0) - truth) < 0.3 * abs(predicted(ERROR) - truth)


def test_few_measurements_give_a_simpler_model_and_say_so() -> None:
    objective = capability_objective("first", CAPABILITIES)
    decision = decide(NAMES, observations(objective, count=0)[:2], objective)
    assert decision.points == 2
    assert any(warning.startswith("first: ") for warning in decision.warnings)
    assert decision.describe()["warnings"] == list(decision.warnings)
    equal = [
        (mixture, Outcome(0.5, 0.0, {"first": (0.5, 0.0), "second": (0.5, 0.0)}))
        for mixture, _ in observations(objective)
    ]
    flat = decide(NAMES, equal, objective)
    assert flat.best.utility == pytest.approx(0.5)
    assert flat.warnings


def test_many_measurements_are_fitted_by_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = capability_objective("first", CAPABILITIES)
    evidence = observations(objective)
    monkeypatch.setattr(module, "FEW", len(evidence) - 1)
    alone = decide(NAMES, evidence, objective).models.kinds
    monkeypatch.setattr(module, "FEW", len(evidence))
    decision = decide(NAMES, evidence, objective)
    assert set(alone.values()) == {"a Gaussian process on warped shares"}
    assert not set(decision.models.kinds.values()) & set(alone.values())
    assert distance(decision.best.mixture, (0.7, 0.3, 0.0)) < 0.05


def test_a_utility_without_finite_values_somewhere_is_maximised_elsewhere() -> None:
    objective = capability_objective("sqrt(second - 0.5)", CAPABILITIES)
    evidence = observations(capability_objective("first", CAPABILITIES))
    decision = decide(NAMES, evidence, objective)
    assert decision.best.mixture == Mixture.one_hot(NAMES, "c")
    assert math.isfinite(decision.best.utility)
    nowhere = decide(NAMES, evidence, capability_objective("sqrt(second - 5)", CAPABILITIES))
    described = nowhere.describe()["predicted"]
    assert described["utility"] is None
    assert described["interval"] == [None, None]
