import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.mixture import LayerGroup, Mixture

NAMES = ("math", "code", "web")
shares = st.lists(st.floats(0, 1e6), min_size=3, max_size=3).filter(lambda w: sum(w) > 1e-200)


@given(shares)
def test_normalising_gives_shares_that_need_no_base(weights: list[float]) -> None:
    mixture = Mixture.of(NAMES, dict(zip(NAMES, weights, strict=True)))
    assert math.isclose(math.fsum(mixture.weights), 1.0, rel_tol=1e-12)
    assert mixture.base_weight == 0.0
    for weight, share in zip(weights, mixture.weights, strict=True):
        assert math.isclose(share * math.fsum(weights), weight, rel_tol=1e-9, abs_tol=1e-300)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_a_key_gives_the_mixture_back_exactly(weights: list[float]) -> None:
    mixture = Mixture(tuple(f"d{i}" for i in range(len(weights))), tuple(weights))
    assert Mixture.from_key(mixture.key()) == mixture


def test_equal_mixtures_have_equal_keys_whatever_the_sign_of_zero() -> None:
    assert Mixture(("a", "b"), (1.0, -0.0)).key() == Mixture(("a", "b"), (1.0, 0.0)).key()


def test_weights_kept_as_given_leave_the_rest_to_the_base() -> None:
    mixture = Mixture.of(NAMES, {"math": 0.5, "web": -0.25}, normalize=False)
    assert mixture.base_weight == 0.75
    assert mixture.coefficients() == [(None, 0.75), ("math", 0.5), ("web", -0.25)]


def test_operands_that_do_not_count_are_left_out() -> None:
    assert Mixture.one_hot(NAMES, "code").coefficients() == [("code", 1.0)]
    assert Mixture.base_only(NAMES).coefficients() == [(None, 1.0)]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"physics": 1.0}, "'physics'"),
        ({"math": -0.1, "code": 1.0}, "math=-0.1"),
        ({"math": 0.0}, "positive"),
        ({}, "positive"),
        ({"math": math.nan}, "math=nan"),
        ({"math": math.inf}, "math=inf"),
    ],
)
def test_weights_that_cannot_be_normalised_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mixture.of(NAMES, weights)


def test_a_name_twice_or_a_weight_too_few_is_refused() -> None:
    with pytest.raises(ConfigError, match="differ"):
        Mixture(("a", "a"), (0.5, 0.5))
    with pytest.raises(ConfigError, match="one weight per expert"):
        Mixture(("a", "b"), (1.0,))


@given(
    st.lists(
        st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.lists(st.text(min_size=1), min_size=1, max_size=3), min_size=3, max_size=3),
)
def test_a_key_gives_layer_groups_back_exactly(weights: list[list[float]], patterns: list[list[str]]) -> None:
    overall, *others = (tuple(each) for each in weights)
    groups = tuple(LayerGroup(tuple(p), w) for p, w in zip(patterns, others, strict=False))
    mixture = Mixture(NAMES, overall, groups)
    assert Mixture.from_key(mixture.key()) == mixture
    assert (Mixture(NAMES, overall).key() == mixture.key()) == (not groups)


def test_a_tensor_takes_the_weights_of_the_first_group_that_holds_it() -> None:
    early = LayerGroup(("*.layers.0.*", "*.layers.1.*"), (1.0, 0.0, 0.0))
    mlp = LayerGroup(("*.mlp.*",), (0.0, 1.0, 0.0))
    mixture = Mixture(NAMES, (0.2, 0.3, 0.5), (early, mlp))
    assert mixture.at("model.layers.1.mlp.up_proj.weight").weights == early.weights
    assert mixture.at("model.layers.11.mlp.up_proj.weight").weights == mlp.weights
    assert mixture.at("model.norm.weight") == mixture.without_groups() == Mixture(NAMES, (0.2, 0.3, 0.5))
    assert str(mixture).endswith("(2 of 2 layer groups differ)")


def test_groups_are_checked_as_the_weights_are() -> None:
    with pytest.raises(ConfigError, match="one weight per expert"):
        Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("*",), (1.0,)),))
    with pytest.raises(ConfigError, match="finite"):
        Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("*",), (1.0, math.inf, 0.0)),))
    with pytest.raises(ConfigError, match="at least one pattern"):
        Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup((), (1.0, 0.0, 0.0)),))
