"""The searches that exist, held to the protocol, and what is special about each."""

import math
from types import MappingProxyType

import numpy as np
import pytest

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import SEARCHES, open_search, posterior
from mergemix.search.simplex import lattice
from tests.search.conformance import NAMES, SearchConformance, drive


@pytest.fixture(autouse=True, scope="module")
def _fits_are_shared():
    """The same scores are fitted once in all tests: most run the same search several times."""
    fits: dict[object, object] = {}
    fit = posterior._remembered

    def shared(memory, name, surrogate, parts, seed):
        key = (surrogate, seed, *(None if part is None else part.tobytes() for part in parts))
        if key not in fits:
            fits[key] = fit({}, name, surrogate, parts, seed)
        return fits[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posterior, "_remembered", shared)
        yield


class TestCma(SearchConformance):
    kind = "cma"


class TestBo(SearchConformance):
    kind = "bo"
    budget = 12
    long_budget = 16
    longest_budget = 20


class TestSurrogate(SearchConformance):
    """With the cheapest surrogate; the others are tried by themselves."""

    kind = "surrogate"
    budget = 14
    long_budget = 16
    options = MappingProxyType({"surrogate": "loglinear"})
    continues = False


class TestRandom(SearchConformance):
    kind = "random"

    def test_the_budget_is_used_exactly(self):
        assert len(drive(self.open(budget=123))) == 123

    def test_it_ends_when_the_simplex_is_exhausted(self, monkeypatch):
        monkeypatch.setattr("mergemix.search.simplex.UNITS", 20)
        search = self.open(budget=30, names=("a", "b"))
        assert len(drive(search)) == 21
        assert "exhausted" in search.stop()


class TestGrid(SearchConformance):
    kind = "grid"
    seeded = False
    continues = False

    @pytest.mark.parametrize("budget", [5, 10, 11, 20, 36, 100, 300])
    def test_the_finest_lattice_that_fits_is_evaluated_whole(self, budget):
        search = self.open(budget=budget)
        proposed = set(drive(search))
        steps = search.identity["grid_steps"]
        assert proposed >= set(lattice(NAMES, steps))
        finer = set(lattice(NAMES, steps + 1)) | {Mixture.uniform(NAMES)}
        assert len(finer) > budget

    def test_it_ends_when_the_lattice_is_done(self):
        search = self.open(budget=34)
        assert len(drive(search)) == math.comb(4 + 3, 3) - 15 + 1 == 21  # step 1/3 and uniform
        assert "1/3" in search.stop()["grid"]


GROUPS = (("a.0.*", "a.1.*"), ("a.2.*",), ("b",))


class TestBlockwise(SearchConformance):
    """Layer groups after a search of whole mixtures; of the objective only what the whole model has counts."""

    kind = "cma"
    continues = False
    groups = GROUPS

    def test_the_second_half_changes_one_group_of_the_best_at_a_time(self):
        def score(mixture):
            return sum(
                weight * (k + 1) for k, group in enumerate(mixture.groups) for weight in group.weights[:1]
            )

        search = self.open(budget=60)
        plain, layered = [], []
        best, best_score = None, -math.inf
        while not search.stop():
            batch = search.ask()
            for mixture in batch:
                (layered if mixture.groups else plain).append(mixture)
                if mixture.groups and best is not None and best.groups:
                    pairs = zip(best.groups, mixture.groups, strict=True)
                    assert sum(a != b for a, b in pairs) == 1
                    assert best.weights == mixture.weights
                assert not mixture.groups or tuple(g.tensors for g in mixture.groups) == GROUPS
            search.tell([(mixture, score(mixture)) for mixture in batch])
            for mixture in batch:
                if score(mixture) > best_score:
                    best, best_score = mixture, score(mixture)
        assert len(plain) == 30
        assert len(layered) == 30
        assert best_score > 3.0  # of 6 that are possible; the best whole mixture, wherever it is, counts 0

    def test_it_ends_when_no_group_gets_better(self):
        search = open_search("random", ("a", "b"), budget=2000, seed=0, groups=GROUPS[:1])
        drive(search)
        assert search.stop()

    def test_groups_and_budget_are_part_of_its_identity(self):
        assert self.open(30).identity != self.open(31).identity
        assert self.open(30).identity["layer_groups"] == [list(group) for group in GROUPS]


def test_every_search_has_a_conformance_class():
    tested = {cls.kind for cls in SearchConformance.__subclasses__()}
    assert tested == set(SEARCHES)


def test_an_unknown_search_is_refused():
    with pytest.raises(ConfigError, match="one of cma, bo, surrogate, random, grid, but is 'annealing'"):
        open_search("annealing", NAMES, budget=10)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="--seed must be an integer >= 0, but is -1"):
        open_search("cma", NAMES, budget=10, seed=-1)


def test_cma_uses_its_budget_on_a_noisy_score():
    rng = np.random.default_rng(0)
    search = open_search("cma", NAMES, budget=150)
    assert len(drive(search, lambda mixture: mixture.weights[0] + rng.normal())) == 150
    assert list(search.stop()) == ["budget"]
