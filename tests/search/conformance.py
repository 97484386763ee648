"""What every search promises, tested on each of them by a subclass that names its kind."""

import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import Outcome, Search, open_search, snap, start_points
from mergemix.search.constraints import Constraints
from mergemix.search.region import Region

Objective = Callable[[Mixture], float | None]

NAMES = ("math", "code", "web", "sft")
PRIOR = Mixture(NAMES, (0.1, 0.2, 0.3, 0.4))


# The executors differ because each search's test class inherits the same test functions.
several = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.differing_executors])
constrained = settings(several, max_examples=5, suppress_health_check=list(HealthCheck))


def bumpy(mixture: Mixture) -> float:
    """A score with several local maxima, so that CMA-ES does not settle within the tests' budgets."""
    target = np.array([0.55, 0.25, 0.2, 0.0][: len(mixture.weights)])
    offset = np.array(mixture.weights) - target
    return float(np.cos(9 * offset).sum() - 4 * offset @ offset)


def drive(search: Search, objective: Objective = bumpy) -> list[Mixture]:
    """Run a search to its end; what it proposed, in order."""
    proposed: list[Mixture] = []
    while not search.stop():
        batch = search.ask()
        proposed += batch
        search.tell([(mixture, objective(mixture)) for mixture in batch])
    return proposed


class Pool:
    """Several engines, of which any may be the next to finish; none ever waits while there is budget."""

    def __init__(self, search: Search, workers: int, order: random.Random) -> None:
        self.search, self.workers, self.order = search, workers, order

    def drive(self, evaluate: Callable[[Mixture], Outcome]) -> list[Mixture]:
        told: list[Mixture] = []
        while not self.search.stop():
            waiting = self.search.ask(self.workers)
            left = self.search.budget - len(told)
            stopped = not self.search.stop() and len(waiting) < min(self.workers, left)
            assert not stopped or self.search._reasons, "an engine waits for others"
            assert waiting, "there is something to do, or the search says why not"
            mixture = self.order.choice(waiting)
            self.search.tell([(mixture, evaluate(mixture))])
            told.append(mixture)
        return told


def detailed(mixture: Mixture) -> Outcome:
    """Capabilities and noise, a third of the candidates stopped early, some of them failed."""
    number = int(1e4 * sum((k + 1) * weight for k, weight in enumerate(mixture.weights)))
    if number % 7 == 0:
        return Outcome(None)
    skills = {"a": bumpy(mixture), "b": mixture.weights[0]}
    stderr = 0.05 if number % 3 else 0.2
    found = {name: (value + stderr * np.sin(number), stderr) for name, value in skills.items()}
    return Outcome(
        float(mean_of({n: v for n, (v, _) in found.items()})), stderr / 2**0.5, found, number % 3 == 0
    )


def mean_of(scores: Mapping[str, Any]) -> Any:
    return sum(scores.values()) / len(scores)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Constraints on up to 17 domains that can be met: those that a mixture drawn first satisfies."""
    k = draw(st.integers(2, 17))
    names = tuple("abcdefghijklmnopq"[:k])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inside = np.array(snap(names, rng.dirichlet(np.full(k, draw(st.sampled_from([0.2, 1.0, 5.0]))))).weights)
    slack = draw(st.sampled_from([0.0, 0.02, 0.3]))
    chosen = [name for name in names if draw(st.booleans())]
    share = dict(zip(names, inside.tolist(), strict=True))
    limited = {
        "max": {name: min(round(share[name] + slack, 4), 1.0) for name in chosen[::2]},
        "min": {name: max(round(share[name] - slack, 4), 0.0) for name in chosen[1::2]},
    }
    if draw(st.booleans()):
        prior = (inside + 1 / k) / 2
        limited |= {
            "prior": dict(zip(names, prior.tolist(), strict=True)),
            "kl_limit": 0.4,
            "kl_penalty": 0.1,
        }
    return Constraints(**limited).region(names)


class SearchConformance:
    kind: str
    budget = 30  # of most tests; what costs more per proposal has less
    long_budget = 40
    longest_budget = 60
    options: Mapping[str, Any] = MappingProxyType({})
    seeded = True  # proposals depend on the seed
    groups: tuple[tuple[str, ...], ...] = ()  # layer groups
    continues = True  # a larger budget continues the proposals of a smaller one

    def open(self, budget: int | None = None, seed: int = 0, names=NAMES, **options: Any) -> Search:
        budget = budget or self.budget
        options = {"groups": self.groups, **self.options, **options}
        return open_search(self.kind, names, budget=budget, seed=seed, **options)

    @several
    @given(st.integers(2, 7), st.integers(0, 2**32), st.integers(0, 40))
    def test_proposals_are_distinct_mixtures_within_the_budget(self, k, seed, extra):
        extra = min(extra, self.long_budget - 8)
        names = tuple("abcdefg"[:k])
        search = self.open(budget=k + 1 + extra, seed=seed, names=names)
        proposed = drive(search, lambda mixture: float(np.sin(37 * np.array(mixture.weights)).sum()))
        assert len(set(proposed)) == len(proposed) <= k + 1 + extra
        for mixture in proposed:
            assert mixture.names == names
            for weights in (mixture.weights, *(group.weights for group in mixture.groups)):
                assert snap(names, weights).weights == weights  # raises off the simplex; equal on its grid

    @pytest.mark.parametrize("prior", [None, PRIOR])
    def test_start_points_come_first(self, prior):
        starts = start_points(NAMES, prior)
        assert drive(self.open(prior=prior))[: len(starts)] == starts

    def test_the_budget_may_be_just_the_start_points(self):
        search = self.open(budget=5)
        assert drive(search) == start_points(NAMES)
        assert "budget" in search.stop()
        assert search.ask() == []

    def test_same_seed_same_proposals(self):
        assert drive(self.open(seed=3)) == drive(self.open(seed=3))

    def test_different_seeds_differ(self):
        runs = [drive(self.open(seed=seed)) for seed in (0, 1, 2)]
        assert (runs[0] != runs[1] and runs[1] != runs[2] and runs[0] != runs[2]) == self.seeded

    def test_same_proposals_in_another_process(self):
        code = (
            "from tests.search.conformance import drive, NAMES; from mergemix.search import open_search;"
            f"print(drive(open_search({self.kind!r}, NAMES, budget={self.budget}, seed=5, groups={self.groups!r}, "
            f"**{dict(self.options)!r})))"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == repr(drive(self.open(seed=5)))

    def test_global_random_numbers_are_neither_used_nor_disturbed(self):
        expected = drive(self.open())
        np.random.seed(1)
        random.seed(1)
        before = np.random.get_state(legacy=False), random.getstate()
        assert drive(self.open()) == expected
        np.testing.assert_equal((np.random.get_state(legacy=False), random.getstate()), before)

    @several
    @given(st.randoms(use_true_random=False))
    def test_results_may_come_in_any_order_one_by_one(self, order):
        search = self.open()
        proposed = []
        while not search.stop():
            batch = search.ask()
            proposed += batch
            for mixture in order.sample(batch, len(batch)):
                search.tell([(mixture, bumpy(mixture))])
        assert proposed == drive(self.open())

    @several
    @given(st.integers(0, 30), st.integers(0, 3))
    def test_a_cut_run_replayed_from_stored_results_proposes_the_same(self, cut, failing):
        def objective(mixture: Mixture) -> float | None:
            return None if failing and hash(mixture.weights) % 5 < failing else bumpy(mixture)

        whole = drive(self.open(), objective)
        stored = {mixture: objective(mixture) for mixture in whole[:cut]}
        resumed, paid = self.open(), []

        def stored_or_paid(mixture: Mixture) -> float | None:
            if mixture not in stored:
                paid.append(mixture)
            return stored[mixture] if mixture in stored else objective(mixture)

        assert drive(resumed, stored_or_paid) == whole
        assert paid == whole[cut:]

    def test_a_larger_budget_continues_the_same_proposals(self):
        if not self.continues:
            assert self.open(budget=8).identity != self.open(budget=300).identity
            return
        longest = drive(self.open(budget=self.longest_budget))
        for budget in range(5, self.longest_budget, self.longest_budget // 10):
            shorter = self.open(budget=budget)
            assert drive(shorter) == longest[:budget]
            assert shorter.identity == self.open(budget=self.longest_budget).identity

    def test_asking_again_gives_what_is_still_missing(self):
        search = self.open()
        first, *rest = search.ask()
        search.tell([(first, 0.5)])
        assert search.ask() == rest == search.ask()

    def test_telling_what_was_not_asked_or_twice_is_refused(self):
        search = self.open()
        first = search.ask()[0]
        search.tell([(first, 0.5)])
        for mixture in (first, PRIOR):
            with pytest.raises(ValueError, match="not waiting for a result"):
                search.tell([(mixture, 0.5)])

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_failures_survive(self, every):
        def run(failure: float | None) -> list[Mixture]:
            calls = itertools.count(1)
            search = self.open(budget=self.long_budget)
            return drive(search, lambda mixture: failure if next(calls) % every == 0 else bumpy(mixture))

        proposed = run(None)
        assert len(set(proposed)) == len(proposed) >= self.long_budget // 2
        for not_a_score in (float("nan"), float("-inf"), float("inf")):
            assert run(not_a_score) == proposed

    def test_equal_scores_do_not_break_it(self):
        search = self.open(budget=self.long_budget)
        assert len(drive(search, lambda mixture: 0.0)) >= self.long_budget // 2
        assert search.stop()

    def test_identity_names_the_search_and_its_prior(self):
        assert self.open().identity["search"] == self.kind
        assert self.open(prior=PRIOR).identity != self.open().identity
        assert self.open(seed=1).identity != self.open(seed=2).identity

    def test_a_budget_below_the_start_points_is_refused(self):
        with pytest.raises(
            ConfigError, match=r"--budget must cover the 5 start points.*but is 4.*--budget 5"
        ):
            self.open(budget=4)
        with pytest.raises(ConfigError, match=r"6 start points.*the prior"):
            self.open(budget=5, prior=PRIOR)

    @constrained
    @given(regions(), st.integers(0, 3), st.integers(1, 3))
    def test_proposals_are_inside_the_region(self, region, seed, batch):
        starts = region.start_points()
        search = self.open(len(starts) + 8, seed, names=region.names, region=region, batch=batch)
        proposed = drive(search, lambda mixture: float(np.sin(37 * np.array(mixture.weights)).sum()))
        assert proposed[: len(starts)] == starts
        assert len(set(proposed)) == len(proposed) <= len(starts) + 8
        assert all(region.contains(mixture) for mixture in proposed)
        assert search.identity.get("constraints", {}) == region.describe()

    @constrained
    @given(st.integers(2, 6), st.randoms(use_true_random=False))
    def test_no_engine_waits_for_others(self, workers, order):
        search = self.open()
        told = Pool(search, workers, order).drive(lambda mixture: Outcome(bumpy(mixture)))
        assert len(set(told)) == len(told) <= search.budget

    @pytest.mark.parametrize("modelled", [False, True])
    def test_capabilities_partial_results_and_failures(self, modelled):
        def run(order: int) -> list[Mixture]:
            search = self.open()
            search.objective = mean_of if modelled else None
            return Pool(search, 3, random.Random(order)).drive(detailed)

        assert run(1) == run(1)
        assert len(set(run(2))) > self.budget // 2

    @pytest.mark.parametrize("same", [True, False])
    def test_evidence_from_elsewhere(self, same):
        """Of more domains than there are now, with failures, and of the base, which is no mixture."""
        rng = np.random.default_rng(0)
        old = (*NAMES, "gone")
        shares = [(*row, 0.0) for row in rng.dirichlet(np.ones(4), 12)] + [tuple(np.eye(5)[4]), (0.0,) * 5]
        evidence = [(Mixture(old, row), Outcome(bumpy(Mixture(NAMES, row[:4])), 0.1)) for row in shares]
        evidence += [(PRIOR, Outcome(None)), (Mixture.uniform(NAMES), Outcome(0.3))]

        def run() -> list[Mixture]:
            search = self.open()
            search.learn(evidence, same=same)
            return drive(search)

        proposed = run()
        assert proposed == run()
        assert proposed[:5] == start_points(NAMES)
        assert len(set(proposed)) == len(proposed)

    def test_it_recommends_what_it_knows_to_be_good(self):
        search = self.open()
        assert search.recommend() is None
        drive(search, lambda mixture: -float(((np.array(mixture.weights) - 0.25) ** 2).sum()))
        mixture, mean, sd = search.recommend()
        assert max(abs(weight - 0.25) for weight in mixture.weights) < 0.2
        assert abs(mean) < 0.1
        assert 0 <= sd < 0.3

    def test_one_expert_is_refused(self):
        with pytest.raises(ConfigError, match=r"at least two experts.*got 1"):
            self.open(names=("math",))
        with pytest.raises(ConfigError, match=r"at least two experts.*got 0"):
            self.open(names=())

    @pytest.mark.parametrize(
        "pin", [{"math": 0.2, "code": 0.3, "web": 0.4}, {"math": 0.2, "code": 0.7999, "sft": 0.0}]
    )
    def test_a_region_of_one_or_two_mixtures_is_soon_exhausted(self, pin):
        region = Constraints(pin=pin).region(NAMES)
        search = open_search(self.kind, NAMES, budget=30, region=region, groups=self.groups)
        for _ in range(60):
            batch = search.ask()
            search.tell([(mixture, bumpy(mixture)) for mixture in batch])
            if search.stop():
                break
        assert search.stop(), "it says why it ends, and does not spin"

    def test_it_goes_on_when_everything_failed(self):
        search = self.open(budget=12)
        assert len(drive(search, lambda mixture: None)) >= 5
        assert search.stop()

    def test_nothing_is_printed_read_or_written(self, tmp_path, monkeypatch, capfd):
        expected = drive(self.open())
        monkeypatch.chdir(tmp_path)
        (tmp_path / "cma_signals.in").write_text("{'timeout': 0}")  # pycma obeys this file by default
        assert drive(self.open()) == expected
        assert capfd.readouterr() == ("", "")
        assert [path.name for path in tmp_path.iterdir()] == ["cma_signals.in"]
