import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import BenchmarkError, ConfigError
from mergemix.evals.utility import (
    NORMALIZATIONS,
    CapabilityUtility,
    Utility,
    make_utility,
    mean_score,
    parse_utility,
    preference,
)

CAPABILITIES = {"math": ["sums", "gsm"], "code": ["mbpp"]}
BASE = {"sums": 0.2, "gsm": 0.1, "mbpp": 0.4}
UNIFORM = {"sums": 0.5, "gsm": 0.3, "mbpp": 0.3}
EXPERTS = {"a": {"sums": 0.7, "gsm": 0.5, "mbpp": 0.2}, "b": {"sums": 0.2, "gsm": 0.1, "mbpp": 0.3}}
REFERENCES = {"base": BASE, "uniform": UNIFORM, "experts": EXPERTS}


def test_macro_is_the_mean_over_capabilities_of_the_mean_over_benchmarks() -> None:
    scores = {"sums": 0.2, "gsm": 0.4, "mbpp": 0.9}
    alone = {name: make_utility(CAPABILITIES, name)(scores) for name in CAPABILITIES}
    assert alone == pytest.approx({"math": 0.3, "code": 0.9})
    assert make_utility(CAPABILITIES)(scores) == pytest.approx(0.6)


def test_utility_of_item_scores_is_that_of_their_means() -> None:
    items = {"sums": np.array([0.0, 1.0, 1.0]), "gsm": np.array([-1.5, -0.25]), "mbpp": np.array([1.0])}
    utility = make_utility(CAPABILITIES, "math=3,code=1", "base", base=BASE)
    assert utility(items) == utility({name: mean_score(values) for name, values in items.items()})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.randoms(use_true_random=False))
def test_a_mean_does_not_depend_on_the_order(values: list[float], random: object) -> None:
    shuffled = random.sample(values, len(values))  # type: ignore[attr-defined]
    assert mean_score(np.array(values)) == mean_score(np.array(shuffled))


@pytest.mark.parametrize(
    ("spec", "weights"),
    [
        ("macro", {"math": 0.5, "code": 0.5}),
        ("math", {"math": 1.0}),
        ("math=3,code=1", {"math": 0.75, "code": 0.25}),
        (" code = 1e0 , math = 3 ", {"math": 0.75, "code": 0.25}),
        ("math=2,code=0", {"math": 1.0}),
    ],
)
def test_specs_of_a_utility(spec: str, weights: dict[str, float]) -> None:
    assert parse_utility(spec, list(CAPABILITIES)).affine == (0.0, weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maths", "unknown capability 'maths'; did you mean 'math'? (capabilities: code, math)"),
        ("", "must begin with its goal, but it is empty"),
        ("math,code", "the utility 'math,code' holds 'math,code'; an expression may hold numbers"),
        ("math=1,mbpp=1", "unknown capability 'mbpp'"),
        ("math=1,math=2", "names 'math' twice"),
        ("math=-1,code=2", "the weight of capability 'math' must be a finite number >= 0, but is '-1'"),
        ("math=nan", "must be a finite number >= 0, but is 'nan'"),
        ("math=", "must be a finite number >= 0, but is ''"),
        ("math=0", "must have a positive sum, but 'math=0' sums to 0"),
    ],
)
def test_a_utility_that_makes_no_sense(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_utility(CAPABILITIES, spec)


def test_base_and_minmax_put_the_base_at_0_and_minmax_the_best_expert_at_1() -> None:
    assert make_utility(CAPABILITIES, normalize="base", **REFERENCES)(BASE) == pytest.approx(0)
    gains = {name: score + 0.25 for name, score in BASE.items()}
    assert make_utility(CAPABILITIES, normalize="base", **REFERENCES)(gains) == pytest.approx(0.25)
    minmax = make_utility(CAPABILITIES, "math", "minmax", **REFERENCES)
    assert minmax(BASE) == pytest.approx(0)
    assert minmax(EXPERTS["a"]) == pytest.approx(1)


def test_minmax_is_the_gain_over_the_base_where_no_expert_beats_it() -> None:
    code = make_utility(CAPABILITIES, "code", "minmax", **REFERENCES)
    assert code({"mbpp": 0.5}) == pytest.approx(0.1)
    assert code({"mbpp": 0.5}) > code({"mbpp": 0.4})


def test_zscore_standardises_over_the_start_points() -> None:
    utility = make_utility(CAPABILITIES, "code", "zscore", **REFERENCES)
    values = [utility(scores) for scores in (BASE, UNIFORM, *EXPERTS.values())]
    assert np.mean(values) == pytest.approx(0)
    assert np.std(values) == pytest.approx(1)
    without_base = make_utility(CAPABILITIES, "code", "zscore", uniform=UNIFORM, experts=EXPERTS)
    assert without_base({"mbpp": np.mean([0.3, 0.2, 0.3])}) == pytest.approx(0)


def test_zscore_is_the_gain_over_the_mean_where_all_start_points_score_the_same() -> None:
    same = {"sums": 0.1, "gsm": 0.1, "mbpp": 0.1}
    utility = make_utility(CAPABILITIES, normalize="zscore", uniform=same, base=same, experts={"a": same})
    assert utility({"sums": 0.2, "gsm": 0.2, "mbpp": 0.2}) == pytest.approx(0.1)


@given(st.dictionaries(st.sampled_from(["sums", "gsm", "mbpp"]), st.floats(-100, 1), min_size=3))
def test_every_normalisation_keeps_higher_better(scores: dict[str, float]) -> None:
    higher = {name: score + 1 for name, score in scores.items()}
    for normalize in NORMALIZATIONS:
        utility = make_utility(CAPABILITIES, normalize=normalize, **REFERENCES)
        assert utility(higher) > utility(scores)


@pytest.mark.parametrize(
    ("normalize", "references", "message"),
    [
        ("min-max", {}, "unknown normalisation 'min-max'; did you mean 'minmax'?"),
        ("base", {}, "--normalize base needs the scores of the base; give --base"),
        ("minmax", {"experts": EXPERTS}, "--normalize minmax needs the scores of the base"),
        ("minmax", {"base": BASE}, "--normalize minmax needs the scores of the single experts"),
        ("zscore", {"uniform": UNIFORM}, "--normalize zscore needs the scores of the single experts"),
    ],
)
def test_a_normalisation_without_its_references(normalize: str, references: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_utility(CAPABILITIES, normalize=normalize, **references)


def test_a_benchmark_that_does_not_count_is_not_needed() -> None:
    assert make_utility(CAPABILITIES, "code") == Utility({"mbpp": 1.0}, 0.0)
    assert make_utility(CAPABILITIES, "code")({"mbpp": 0.5}) == 0.5


LOWER = {"mbpp": -1}  # as if mbpp were a perplexity; base 0.4, experts 0.2 and 0.3


@pytest.mark.parametrize(
    ("normalize", "score", "expected"),
    [
        ("raw", 0.5, -0.5),
        ("base", 0.1, 0.3),
        ("minmax", 0.4, 0.0),  # the base
        ("minmax", 0.2, 1.0),  # the best expert is the lowest
        ("zscore", 0.3, 0.0),  # the mean of the references
        ("zscore", 0.3 - 0.5**0.5 / 10, 1.0),
    ],
)
def test_a_benchmark_where_lower_is_better(normalize: str, score: float, expected: float) -> None:
    utility = make_utility(CAPABILITIES, "code", normalize, **REFERENCES, directions=LOWER)
    assert utility({"mbpp": score}) == pytest.approx(expected)
    assert utility.weights["mbpp"] < 0


def test_minmax_where_no_expert_goes_below_the_base_is_the_loss_under_the_base() -> None:
    worse = {"a": {"mbpp": 0.5}, "b": {"mbpp": 0.9}}
    utility = make_utility({"code": ["mbpp"]}, normalize="minmax", base=BASE, experts=worse, directions=LOWER)
    assert utility({"mbpp": 0.1}) == pytest.approx(0.3)


@given(
    st.dictionaries(st.sampled_from(["sums", "gsm", "mbpp"]), st.floats(-100, 1), min_size=3),
    st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3),
)
def test_every_normalisation_follows_the_directions(scores: dict[str, float], signs: list[int]) -> None:
    directions = dict(zip(scores, signs, strict=True))
    better = {name: score + directions[name] for name, score in scores.items()}
    for normalize in NORMALIZATIONS:
        utility = make_utility(CAPABILITIES, normalize=normalize, **REFERENCES, directions=directions)
        assert utility(better) > utility(scores)


def test_turning_a_benchmark_round_with_its_direction_changes_nothing() -> None:
    def turned(scores: dict[str, float]) -> dict[str, float]:
        return {**scores, "mbpp": -scores["mbpp"]}

    references = {
        "base": turned(BASE),
        "uniform": turned(UNIFORM),
        "experts": {name: turned(scores) for name, scores in EXPERTS.items()},
    }
    scores = {"sums": 0.3, "gsm": 0.2, "mbpp": 0.45}
    for normalize in NORMALIZATIONS:
        plain = make_utility(CAPABILITIES, normalize=normalize, **REFERENCES)
        other = make_utility(CAPABILITIES, normalize=normalize, **references, directions=LOWER)
        assert other(turned(scores)) == pytest.approx(plain(scores))


def test_items_that_failed_are_left_out_of_means() -> None:
    items = {"sums": np.array([np.nan, 1.0, 0.5]), "gsm": np.array([0.5]), "mbpp": np.array([1.0, np.nan])}
    assert mean_score(items["sums"]) == 0.75
    assert make_utility(CAPABILITIES)(items) == pytest.approx(0.8125)


def test_a_benchmark_on_which_all_items_failed_has_no_score() -> None:
    items = {"sums": np.array([1.0]), "gsm": np.full(3, np.nan), "mbpp": np.array([1.0])}
    message = "benchmark 'gsm' must have a score for at least one item, but none of its 3 has one"
    with pytest.raises(BenchmarkError, match=message):
        make_utility(CAPABILITIES)(items)
    with pytest.raises(BenchmarkError, match=message):
        make_utility(CAPABILITIES, normalize="base", base=items)
    assert make_utility(CAPABILITIES, "code")(items) == 1.0


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_utilities_that_are_not_linear_are_of_normalised_capability_scores(normalize: str) -> None:
    scores = {"sums": 0.3, "gsm": 0.2, "mbpp": 0.45}
    alone = {
        name: make_utility(CAPABILITIES, name, normalize, **REFERENCES, directions=LOWER)(scores)
        for name in CAPABILITIES
    }
    lowest = make_utility(CAPABILITIES, "worst", normalize, **REFERENCES, directions=LOWER)
    assert isinstance(lowest, CapabilityUtility)
    assert lowest(scores) == pytest.approx(min(alone.values()))
    squares = make_utility(CAPABILITIES, "math ** 2 - code", normalize, **REFERENCES, directions=LOWER)
    assert squares(scores) == pytest.approx(alone["math"] ** 2 - alone["code"])
    assert lowest.benchmarks == ("sums", "gsm", "mbpp")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_floor_at_a_reference_is_what_that_one_scores(normalize: str) -> None:
    for name, reference in {"base": BASE, "uniform": UNIFORM, **EXPERTS}.items():
        floored = make_utility(CAPABILITIES, f"macro; all >= {name}", normalize, **REFERENCES)
        plain = make_utility(CAPABILITIES, "macro", normalize, **REFERENCES)
        assert floored(reference) == pytest.approx(plain(reference))
        assert floored.shortfalls(reference) == {}
        worse = {benchmark: score - 0.1 for benchmark, score in reference.items()}
        assert set(floored.shortfalls(worse)) == {f"math >= {name}", f"code >= {name}"}
        assert floored(worse) < plain(worse)
        assert plain.shortfalls(worse) == {}


def test_formulas_that_are_linear_are_plain_utilities() -> None:
    scores = {"sums": 0.2, "gsm": 0.4, "mbpp": 0.9}
    formula = make_utility(CAPABILITIES, "2 * math - code / 2 + 1", "base", base=BASE, directions=LOWER)
    assert isinstance(formula, Utility)
    alone = [
        make_utility(CAPABILITIES, name, "base", base=BASE, directions=LOWER)(scores) for name in CAPABILITIES
    ]
    assert formula(scores) == pytest.approx(2 * alone[0] - alone[1] / 2 + 1)
    weighted = make_utility(CAPABILITIES, "math=3,code=1", "base", base=BASE)
    assert make_utility(CAPABILITIES, "0.75 * math + 0.25 * code", "base", base=BASE) == weighted


def test_items_and_means_have_the_same_utility_whatever_it_is() -> None:
    items = {"sums": np.array([np.nan, 1.0, 0.5]), "gsm": np.array([0.25]), "mbpp": np.array([1.0, 0.0])}
    means = {name: mean_score(values) for name, values in items.items()}
    for spec in ("worst", "math * code", "macro; code >= 0.75"):
        utility = make_utility(CAPABILITIES, spec)
        assert isinstance(utility, CapabilityUtility)
        assert utility(items) == utility(means)
        many = utility.of_means({name: np.array([mean, 0.5]) for name, mean in means.items()})
        assert many[0] == pytest.approx(utility(means))
    with pytest.raises(BenchmarkError, match="benchmark 'gsm' must have a score"):
        make_utility(CAPABILITIES, "worst")({**items, "gsm": np.array([np.nan])})
    with pytest.raises(KeyError):
        make_utility(CAPABILITIES, "worst")({"sums": 0.1, "gsm": 0.2})


def test_floors_need_their_references() -> None:
    with pytest.raises(ConfigError, match="needs the scores of the base; give --base"):
        make_utility(CAPABILITIES, "macro; all >= base", uniform=UNIFORM)
    with pytest.raises(ConfigError, match="must be a number or a mixture that is scored in any case"):
        make_utility(CAPABILITIES, "macro; all >= a", base=BASE)
    assert make_utility(CAPABILITIES, "macro; math >= 0.1")(BASE) == pytest.approx(0.275)


def test_what_meets_its_floors_is_preferred() -> None:
    utility = make_utility(CAPABILITIES, "math; code >= 0.5")
    just_below = {"sums": 0.9, "gsm": 0.9, "mbpp": 0.499}
    meets = {"sums": 0.6, "gsm": 0.6, "mbpp": 0.5}
    better = {"sums": 0.7, "gsm": 0.7, "mbpp": 0.6}
    assert utility(just_below) > utility(meets)
    ordered = sorted([better, just_below, meets], key=lambda scores: preference(utility, scores))
    assert ordered == [just_below, meets, better]
