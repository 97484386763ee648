"""Constraints as users state them, and what is said when they do not hold together."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.constraints import Constraints
from tests.search.regions import names, random_constraints

ABC = ("a", "b", "c")
GROUPS = {"g": ("a", "b"), "h": ("b", "c")}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32))
def test_what_a_mixture_satisfies_is_a_region_that_holds_it(seed):
    hidden, constraints = random_constraints(seed)
    assert constraints.region(hidden.names).contains(hidden)


def test_minima_round_up_and_maxima_down():
    region = Constraints(min={"a": 0.20001, "b": 0.29}, max={"c": 0.33339}).region(ABC)
    assert [(bound.key, bound.limit) for bound in region.bounds] == [
        ("min a", 0.2001),
        ("min b", 0.29),
        ("max c", 0.3333),
    ]


def test_what_every_mixture_satisfies_is_no_constraint():
    free = Constraints(min={"a": 0}, max={"b": 1.0}, tokens={"c": 5e9}, train_tokens=1e10, max_epochs=2)
    assert free.region(ABC).is_simplex


def test_tokens_cap_the_share():
    region = Constraints(tokens={"a": 2e9, "b": 1e12}, train_tokens=1e11, max_epochs=4).region(ABC)
    [bound] = region.bounds
    assert (bound.key, bound.limit) == ("epochs a", 0.08)
    assert bound.text == "a: at most 4 epochs of 2e+09 tokens (share 0.08)"
    assert region.snap([1.0, 0, 0]).weights[0] == 0.08


def test_no_tokens_no_share():
    assert Constraints(tokens={"a": 0}, train_tokens=1e9).region(ABC).snap([1.0, 0, 0]).weights[0] == 0


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(max={"aa": 0.3}), "max names 'aa', which is no domain or group: did you mean 'a'"),
        (Constraints(min={"zzz": 0.3}), "there are a, b, c"),
        (Constraints(max={"a": 1.5}), "max a=1.5 must be a share from 0 to 1"),
        (Constraints(min={"a": -0.1}), "must be a share"),
        (Constraints(min={"a": float("nan")}), "must be a share"),
        (Constraints(pin={"a": 0.33333}), "pinned to 0.33333: give 0.3333 or 0.3334"),
        (Constraints(groups={"a": ("b",)}), "rename the group"),
        (Constraints(groups={"g": ("b", "x")}), "the group 'g' names 'x'"),
        (Constraints(groups={"g": ("b", "b")}), "twice"),
        (Constraints(groups={"g": ()}), "at least one domain"),
        (Constraints(tokens={"a": -1}, train_tokens=10), "the tokens of a must be a number >= 0, but is -1"),
        (Constraints(tokens={"x": 1}, train_tokens=10), "tokens are given for 'x'"),
        (Constraints(tokens={"a": 1}), "how many tokens are trained on"),
        (Constraints(train_tokens=1), "how many tokens a domain has"),
        (Constraints(tokens={"a": 1}, train_tokens=0), "the training tokens must be a number > 0"),
        (Constraints(tokens={"a": 1}, train_tokens=9, max_epochs=-1), "the epochs must be a number > 0"),
        (Constraints(kl_limit=0.1), "needs a prior"),
        (Constraints(kl_penalty=0.1), "needs a prior"),
        (Constraints(prior={"x": 1.0}), "the prior names 'x'"),
        (Constraints(prior={"a": -1.0, "b": 2.0}), "the prior: .*>= 0"),
        (Constraints(prior={"a": 1.0}, kl_limit=-0.1), "the KL limit must be a number >= 0"),
        (Constraints(prior={"a": 1.0}, kl_penalty=float("inf")), "the KL penalty must be a number >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(constraints, message):
    with pytest.raises(ConfigError, match=message):
        constraints.region(ABC)


@pytest.mark.parametrize(
    ("constraints", "conflict", "why"),
    [
        (Constraints(min={"a": 0.6, "b": 0.5, "c": 0.1}), ["min a=0.6", "min b=0.5"], "at least 1.1000"),
        (Constraints(max={"a": 0.2, "b": 0.3, "c": 0.4}), ["max a=0.2", "max b=0.3", "max c=0.4"], "at most 0.9000"),
        (Constraints(min={"a": 0.4}, max={"a": 0.3, "b": 0.9}), ["min a=0.4", "max a=0.3"], "contradict each other"),
        (
            Constraints(groups=GROUPS, max={"g": 0.3, "a": 0.9}, min={"b": 0.4}),
            ["min b=0.4", "max g=0.3 (a + b)"],
            "contradict each other",
        ),
        (
            Constraints(groups=GROUPS, max={"g": 0.3, "h": 0.75}, min={"b": 0.1}),
            ["min b=0.1", "max g=0.3 (a + b)", "max h=0.75 (b + c)"],
            "at most 0.9500",
        ),
        (Constraints(pin={"a": 0.7}, min={"b": 0.2, "c": 0.2}), ["min b=0.2", "min c=0.2", "pin a=0.7"], "1.1000"),
        (
            Constraints(tokens=dict.fromkeys(ABC, 1e9), train_tokens=4e9, max_epochs=1),
            ["a: at most 1 epochs", "b: at most 1 epochs", "c: at most 1 epochs"],
            "at most 0.7500",
        ),
        (
            Constraints(prior={"a": 1, "b": 1}, kl_limit=1, min={"c": 0.1, "a": 0.1}),
            ["min c=0.1"],
            "no share of c, whose prior is 0",
        ),
        (
            Constraints(prior={"a": 0.1, "b": 0.9}, kl_limit=0.1, min={"a": 0.5}, max={"b": 0.9}),
            ["min a=0.5", "KL <= 0.1"],
            "the smallest KL .* is 0.5108",
        ),
        (
            Constraints(groups={"ab": "ab", "bc": "bc", "ac": "ac"}, pin={"ab": 0.3333, "bc": 0.3333, "ac": 0.3333}),
            ["pin bc", "pin ac"],
            "at most 0.6666",
        ),
    ],
)  # fmt: skip
def test_an_infeasible_set_names_a_smallest_conflict(constraints, conflict, why):
    with pytest.raises(ConfigError) as error:
        constraints.region(ABC)
    message = str(error.value)
    assert re.search(why, message), message
    for text in conflict:
        assert text in message
    stated = len(re.findall(r"\b(?:min|max|pin) \w+=|at most \d+ epochs|KL <=", message))
    assert stated == len(conflict), message


def test_sums_that_only_half_units_satisfy_are_infeasible():
    pairs = {"ab": ("a", "b"), "bc": ("b", "c"), "ac": ("a", "c")}
    with pytest.raises(ConfigError, match=r"no mixture of whole ten-thousandths .* loosen"):
        Constraints(groups=pairs, pin=dict.fromkeys(pairs, 0.3333)).region("abcd")


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32), st.integers(3, 12))
def test_the_conflict_named_is_one_and_no_part_of_it_is(seed, k):
    rng = np.random.default_rng(seed)
    low = dict(zip(names(k), np.round(rng.dirichlet(np.ones(k)) * 1.3, 3), strict=True))
    high = dict.fromkeys(names(k)[:3], 0.5)
    with pytest.raises(ConfigError) as error:
        Constraints(min=low, max=high).region(names(k))
    named = re.findall(r"(min|max) (d\d+)=", str(error.value))

    def stated(kept: list[tuple[str, str]]) -> Constraints:
        return Constraints(
            min={name: low[name] for kind, name in kept if kind == "min"},
            max={name: high[name] for kind, name in kept if kind == "max"},
        )

    with pytest.raises(ConfigError):
        stated(named).region(names(k))
    for one in named:
        stated([other for other in named if other != one]).region(names(k))


def test_the_description_is_json_and_tells_regions_apart():
    first = Constraints(max={"g": 0.5}, groups=GROUPS, prior={"a": 1, "b": 1, "c": 2}, kl_limit=0.3).region(
        ABC
    )
    assert first.describe() == {
        "bounds": [
            {"constraint": "max g", "limit": 0.5, "domains": ["a", "b"]},
            {"constraint": "kl prior", "limit": 0.3, "domains": ["a", "b", "c"]},
        ],
        "prior": {"a": 0.25, "b": 0.25, "c": 0.5},
    }
    assert first.contains(Mixture(ABC, (0.25, 0.25, 0.5)))
