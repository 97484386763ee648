"""Token-level shares: exact at the end, close at every stage, and general data that no mixture moves."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.train.config import TrainConfig, expert_configs
from mergemix.train.plan import Plan, apportion, make_plan, spread

SHARES = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6).map(
    lambda values: {f"d{i}": value / sum(values) for i, value in enumerate(values)}
)
SIZES = {"steps": st.integers(1, 60), "batch": st.integers(1, 9), "sequence_length": st.integers(2, 70)}


def by_source(plan: Plan) -> dict[tuple[str, bool], int]:
    return {
        (source.domain, source.general): int(count)
        for source, count in zip(plan.sources, plan.consumed(plan.steps), strict=True)
    }


@settings(deadline=None, max_examples=150)
@given(shares=SHARES, general=SHARES, general_share=st.floats(0.0, 0.95), **SIZES)
def test_every_source_gets_its_share_to_the_token(
    shares: dict[str, float],
    general: dict[str, float],
    general_share: float,
    steps: int,
    batch: int,
    sequence_length: int,
) -> None:
    plan = make_plan(
        shares,
        steps=steps,
        batch=batch,
        sequence_length=sequence_length,
        general=general,
        general_share=general_share,
    )
    tokens = steps * batch * sequence_length
    got = by_source(plan)
    assert sum(got.values()) == tokens
    assert all(sum(count for _, count in recipe) == sequence_length for recipe in plan.recipes)
    general_tokens = sum(count for (_, is_general), count in got.items() if is_general)
    assert abs(general_tokens - general_share * tokens) <= 0.5 + 1e-6
    for domain, share in shares.items():
        assert abs(got[domain, False] - share * (tokens - general_tokens)) < 1
    for domain, share in general.items():
        assert abs(got[domain, True] - share * general_tokens) < 1


@settings(deadline=None, max_examples=100)
@given(shares=SHARES, **SIZES)
def test_shares_hold_at_every_stage(
    shares: dict[str, float], steps: int, batch: int, sequence_length: int
) -> None:
    plan = make_plan(shares, steps=steps, batch=batch, sequence_length=sequence_length)
    for step in range(steps + 1):
        for source, count in zip(plan.sources, plan.consumed(step), strict=True):
            expected = shares[source.domain] * step * batch * sequence_length
            # Mixed sequences are a kind too, and hold no more than a sequence of each domain.
            assert abs(count - expected) <= (len(shares) + 3) / 2 * sequence_length + len(shares)


@settings(deadline=None, max_examples=100)
@given(one=SHARES, other=SHARES, general=SHARES, general_share=st.floats(0.01, 0.95), **SIZES)
def test_general_data_stands_at_the_same_places_whatever_the_mixture(
    one: dict[str, float],
    other: dict[str, float],
    general: dict[str, float],
    general_share: float,
    steps: int,
    batch: int,
    sequence_length: int,
) -> None:
    def places(shares: dict[str, float]) -> list[list[tuple[str, int]]]:
        """Of every sequence: its general tokens, which come first."""
        sizes = {"steps": steps, "batch": batch, "sequence_length": sequence_length}
        plan = make_plan(shares, **sizes, general=general, general_share=general_share)
        found = []
        for kind in plan.kinds:
            recipe = plan.recipes[kind]
            flags = [plan.sources[source].general for source, _ in recipe]
            assert flags == sorted(flags, reverse=True)
            found.append([(plan.sources[s].domain, n) for s, n in recipe if plan.sources[s].general])
        return found

    assert places(one) == places(other)


@given(total=st.integers(0, 10**13), shares=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20))
def test_apportioning_is_exact(total: int, shares: list[float]) -> None:
    parts = apportion(total, shares)
    assert sum(parts) == total
    whole = sum(map(Fraction, shares))
    assert all(abs(n - total * Fraction(s) / whole) < 1 for n, s in zip(parts, shares, strict=True))


def test_the_largest_remainder_gets_what_is_left() -> None:
    assert apportion(10, [0.55, 0.27, 0.18]) == [5, 3, 2]
    assert apportion(7, [0.5, 0.5]) == [4, 3]


@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_kinds_are_spread_evenly(counts: list[int]) -> None:
    order = spread(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    for kind, count in enumerate(counts):
        for place, done in enumerate(accumulate((order == kind).tolist()), 1):
            assert abs(done - count * place / len(order)) <= len(counts) / 2 + 1


def test_what_was_consumed_is_what_the_recipes_say() -> None:
    plan = make_plan({"a": 0.5, "b": 0.3, "c": 0.2}, steps=7, batch=3, sequence_length=10)
    consumed = np.zeros(3, np.int64)
    for step in range(7):
        assert plan.consumed(step).tolist() == consumed.tolist()
        for recipe in plan.recipes_of(step):
            for source, count in recipe:
                consumed[source] += count
    assert plan.tokens_of("abc") == {"a": 105, "b": 63, "c": 42}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mixture": {"sums": 1, "law": 1}}, "there is no data of 'law'; the domains are sums, texts"),
        ({"mixture": {"sums": 0.0}}, "positive, finite sum"),
        ({"mixture": {"sums": -1, "texts": 2}}, "sums=-1"),
        ({"data": {}}, "--data NAME=FILE.jsonl"),
        ({"tokens": 0}, "tokens must be at least 1, but is 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"sequence_length": 1}, "sequence_length must be at least 2"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, but is nan"),
        ({"max_epochs": 0}, "max_epochs must be a positive number"),
        ({"general_share": 0.5}, "needs both its mixture"),
        ({"general": {"sums": 1}}, "needs both its mixture"),
        ({"general": {"sums": 1}, "general_share": 1.0}, "below 1"),
        ({"general": {"law": 1}, "general_share": 0.5}, "general: there is no data of 'law'"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_configurations_that_make_no_sense(changed: dict[str, object], said: str) -> None:
    given: dict[str, object] = {
        "base": "base", "data": {"sums": "s", "texts": "t"}, "mixture": {"sums": 1}, "out": "out"
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{**given, **changed})  # type: ignore[arg-type]
    assert said in str(error.value)


def test_an_expert_per_domain(tmp_path) -> None:
    data = {"sums": tmp_path / "s", "texts": tmp_path / "t"}
    configs = expert_configs(out=tmp_path, data=data, base="base", seed=7, tokens=100)
    assert {name: (c.out, c.own_shares(), c.seed) for name, c in configs.items()} == {
        "sums": (tmp_path / "sums", {"sums": 1.0}, 7),
        "texts": (tmp_path / "texts", {"texts": 1.0}, 7),
    }
    with pytest.raises(ConfigError, match=r"cannot be '\.\.'"):
        expert_configs(out=tmp_path, data={"..": tmp_path}, base="base", tokens=100)
    with pytest.raises(ConfigError, match=r"equally many tokens; give their number \(--tokens\)"):
        expert_configs(out=tmp_path, data=data, base="base")
