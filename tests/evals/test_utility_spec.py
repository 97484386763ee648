import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.evals.expression import MAX_DEPTH, Expression
from mergemix.evals.utility_spec import (
    FLOOR_FACTOR,
    Floor,
    Objective,
    UtilitySpec,
    capability_objective,
    parse_utility,
)

NAMES = ["math", "code", "long-context"]
SCORES = {"math": 0.5, "code": 0.2, "long-context": 0.8}
REFERENCES = {
    "base": {"math": 0.4, "code": 0.3, "long-context": 0.1},
    "web": {"math": 0.1, "code": 0.1, "long-context": 0.9},
}


def value(spec: str, scores: dict[str, float] = SCORES) -> float:
    objective = capability_objective(spec, NAMES, REFERENCES)
    [result] = objective({name: np.array([score]) for name, score in scores.items()}).tolist()
    return result


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("macro", 0.5),
        ("worst", 0.2),
        ("math", 0.5),
        ("long-context", 0.8),
        ("math=3,code=1", 0.425),
        ("'long-context'=1, math=1", 0.65),
        ("math + 2 * code", 0.9),
        ("-math ** 2 + +1 - 0.5", None),
        ("-math ** 2 + 1 - 0.5", 0.25),
        ("(math - code) / 2", 0.15),
        ("min(math, 'long-context')", 0.5),
        ('max(code, "long-context", 0.1)', 0.8),
        ("mean(math, code)", 0.35),
        ("sqrt(math * code * 10)", 1.0),
        ("math ** 0.5 * code ** 0.5", 0.1**0.5),
        ("macro + worst", 0.7),
        ("0.5", None),
    ],
)
def test_what_a_goal_is_worth(spec: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError):
            value(spec)
    else:
        assert value(spec) == pytest.approx(expected)


def test_an_objective_values_many_mixtures_at_once() -> None:
    rng = np.random.default_rng(0)
    many = {name: rng.random(7) for name in NAMES}
    for spec in ("worst", "macro; code >= 0.5", "math * code", "math", "2 * math - 1 * code"):
        objective = capability_objective(spec, NAMES, REFERENCES)
        each = [value(spec, {name: float(column[row]) for name, column in many.items()}) for row in range(7)]
        assert objective(many) == pytest.approx(each)
        assert objective(many).shape == (7,)


def test_only_the_capabilities_that_count_are_needed() -> None:
    objective = capability_objective("math; code >= base", NAMES, REFERENCES)
    assert objective.spec.counted == ("math", "code")
    assert objective({"math": np.array([0.5]), "code": np.array([0.3])}) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("__import__('os').system('true')", "holds \"__import__('os').system('true')\""),
        ("math.real", "holds 'math.real'"),
        ("math[0]", "holds 'math[0]'"),
        ("abs(math)", "holds 'abs(math)'; an expression may hold numbers"),
        ("min(*[math])", "holds '*[math]'"),
        ("min(math, key=code)", "holds 'min(math, key=code)'"),
        ("min()", "holds 'min()'"),
        ("sqrt(math, code)", "gives sqrt() more than one argument"),
        ("math if code else math", "holds"),
        ("math < code", "holds 'math < code'"),
        ("math and code", "holds 'math and code'"),
        ("math // code", "holds 'math // code'"),
        ("math % code", "holds"),
        ("math << 2", "holds"),
        ("~math", "holds '~math'"),
        ("not math", "holds 'not math'"),
        ("lambda: math", "holds 'lambda: math'"),
        ("[math for math in code]", "holds"),
        ("f'{math}'", "holds"),
        ("b'math'", "holds"),
        ("(math := 1)", "holds 'math := 1'"),
        ("True * math", "holds 'True'"),
        ("1j * math", "holds '1j'"),
        ("None", "holds 'None'"),
        ("math code", "is not a formula"),
        ("math +", "is not a formula"),
        ("math\x00", "is not a formula"),
        ("1e999 * math", "a number that is too large"),
        ("1" * 400 + " * math", "a number that is too large"),
        ("1 + 2", "must depend on a capability, but '1 + 2' names none"),
        ("math >= 0.4", "floors follow after a semicolon, but its goal is 'math >= 0.4'"),
        ("math == code", "floors follow after a semicolon"),
        (
            "mth * code",
            "unknown capability 'mth'; did you mean 'math'? (capabilities: code, long-context, math)",
        ),
        ("long-context + math", "unknown capability 'long'; write 'long-context' with its quotes"),
        ("min(math, 'cod')", "unknown capability 'cod'; did you mean 'code'?"),
        ("", "must begin with its goal, but it is empty; write macro, worst, a capability"),
        (" ; math >= 1", "must begin with its goal"),
        ("-" * 3000 + "math", "must have at most 2000 characters, but has 3004"),
        ("+".join(["math"] * 390), "is nested more than"),
    ],
)
def test_a_goal_that_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_utility(spec, NAMES)


@given(st.text(max_size=40))
def test_any_text_is_a_utility_or_an_error_in_words(text: str) -> None:
    try:
        spec = parse_utility(text, NAMES)
    except ConfigError:
        return
    assert spec.counted


@given(
    st.recursive(
        st.sampled_from(["math", "code", "'long-context'", "2", "0.25", "worst"]),
        lambda inner: st.one_of(
            st.builds(lambda a, b, op: f"({a} {op} {b})", inner, inner, st.sampled_from("+-*/")),
            st.builds(lambda a: f"-{a}", inner),
            st.builds(lambda a, b: f"min({a}, {b})", inner, inner),
            st.builds(lambda a, b: f"mean({a}, {b})", inner, inner),
        ),
        max_leaves=8,
    )
)
def test_expressions_mean_what_they_do_in_python(text: str) -> None:
    names = {"math": 0.5, "code": 0.2, "worst": 0.2, "min": min, "mean": lambda a, b: (a + b) / 2}
    try:
        expected = eval(text.replace("'long-context'", "0.8"), {"__builtins__": {}}, names)
    except ZeroDivisionError:
        expected = math.nan
    if not any(name in text for name in (*NAMES, "worst")):
        with pytest.raises(ConfigError, match="names none"):
            Expression.parse(text, NAMES)
        return
    found = Expression.parse(text, NAMES)
    scores = {name: np.array([score]) for name, score in SCORES.items()}
    if math.isfinite(expected) and "/" not in text:
        assert found(scores) == pytest.approx([expected])
    if found.affine is not None and math.isfinite(expected):
        offset, weights = found.affine
        linear = offset + sum(weight * SCORES[name] for name, weight in weights.items())
        assert linear == pytest.approx(float(found(scores)[0]))


@pytest.mark.parametrize(
    ("spec", "affine"),
    [
        ("macro", (0.0, dict.fromkeys(NAMES, 1 / 3))),
        ("0.7*math + 0.3*code", (0.0, {"math": 0.7, "code": 0.3})),
        ("2 * (math - 1) / 4 - code", (-0.5, {"math": 0.5, "code": -1.0})),
        ("mean(math, code) * 2 ** 2", (0.0, {"math": 2.0, "code": 2.0})),
        ("math - 0 * code", (0.0, {"math": 1.0})),
        ("min(math)", (0.0, {"math": 1.0})),
        ("math / (math / 2)", None),
        ("math / 0", None),
        ("math * code", None),
        ("math ** 2", None),
        ("worst", None),
        ("sqrt(math)", None),
        ("macro; math >= 0", None),
    ],
)
def test_what_is_linear_is_known_as_such(spec: str, affine: tuple[float, dict[str, float]] | None) -> None:
    found = parse_utility(spec, NAMES).affine
    if affine is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == pytest.approx(affine[0])
        assert found[1] == pytest.approx(affine[1])


def test_where_there_is_no_finite_value_nobody_wants_to_go() -> None:
    assert value("sqrt(code - math)") == -math.inf
    assert value("1 / (math - 0.5)") == -math.inf
    assert value("math ** 9 ** 9 ** 9 * 0 + 2 ** (10000 * math)") == -math.inf


def test_powers_of_numbers_are_not_computed_as_whole_numbers() -> None:
    """As Python integers this one would take all memory there is."""
    assert value("math + 1 / 9 ** 9 ** 9 ** 9") == pytest.approx(0.5)


def test_deep_nesting_is_read_up_to_a_limit() -> None:
    text = "math"
    for _ in range(MAX_DEPTH):
        text = f"-{text}"
    assert value(text) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="is nested more than"):
        value(f"-{text}")


@pytest.mark.parametrize("name", ["weights.yaml", "weights.yml", "weights.json"])
def test_a_weights_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"math": 3.000003, "long-context": 1.000001, "code": 0}))
    spec = parse_utility(f"{path}; math >= 0.4", NAMES)
    assert spec.goal.affine == (0.0, pytest.approx({"math": 0.75, "long-context": 0.25}))
    assert spec.floors == (Floor("math", 0.4),)
    path.unlink()
    assert parse_utility(spec.text, NAMES) == spec  # the text needs no file: it is the contents that count


def test_a_weights_file_with_odd_names_has_a_text_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"a; b": 1, "code (python)": 3}))
    names = ["a; b", "code (python)", "c"]
    spec = parse_utility(f"{path}; 'a; b' >= 0.5", names)
    assert parse_utility(spec.text, names) == spec
    assert spec.counted == ("a; b", "code (python)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mth: 1\n", "weights.yaml: utility names the unknown capability 'mth'; did you mean 'math'?"),
        (
            "math: -1\n",
            "weights.yaml: the weight of capability 'math' must be a finite number >= 0, but is -1",
        ),
        (
            "math: yes\n",
            "weights.yaml: the weight of capability 'math' must be a finite number >= 0, but is True",
        ),
        ("math: '1'\n", "must be a finite number >= 0, but is '1'"),
        ("math: .nan\n", "must be a finite number >= 0, but is nan"),
        ("math: .inf\n", "must be a finite number >= 0, but is inf"),
        ("math: 0\n", "must have a positive sum, but"),
        ("math: 1\nmath: 2\n", "weights.yaml:2: not valid YAML: key 'math' is given twice"),
        ("- math\n", "weights.yaml: must be a mapping"),
        ("{}", "weights.yaml sums to 0"),
    ],
)
def test_a_weights_file_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "weights.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_utility(str(path), NAMES)
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read"):
        parse_utility(str(tmp_path / "no.yaml"), NAMES)


def test_floors_take_their_shortfall_off_with_a_factor() -> None:
    assert value("math; code >= 0.2; 'long-context' >= web") == pytest.approx(0.5 - FLOOR_FACTOR * 0.1)
    assert value("math; code >= 0.25; code >= base") == pytest.approx(0.5 - FLOOR_FACTOR * 0.15)
    assert value("macro; all >= base") == pytest.approx(0.5 - FLOOR_FACTOR * 0.1)
    assert value("macro; all >= 0.1") == pytest.approx(0.5)


def test_shortfalls_are_reported_by_floor() -> None:
    objective = capability_objective("macro; all >= base; code>=0.1; math >= 0.75", NAMES, REFERENCES)
    assert objective.shortfalls(SCORES) == pytest.approx({"code >= base": 0.1, "math >= 0.75": 0.25})
    assert capability_objective("math; code >= 0.2", NAMES).shortfalls(SCORES) == {}
    many = {name: np.array([score, 1.0]) for name, score in SCORES.items()}
    assert objective.shortfall(many) == pytest.approx([0.35, 0.0])
    assert capability_objective("macro", NAMES).shortfall(many) == pytest.approx([0.0, 0.0])


def test_floors_name_what_they_need() -> None:
    spec = parse_utility("math; all >= base; code >= 0.1; code >= web", NAMES)
    assert spec.references == {"base", "web"}
    assert len(spec.floors) == 5
    assert parse_utility("math", NAMES).references == frozenset()
    assert parse_utility("worst; all >= base; math >= base", NAMES).floors == tuple(
        Floor(n, "base") for n in NAMES
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math; code", "a floor of a utility must be CAPABILITY >= LIMIT"),
        ("math; code > 0.3", "must be CAPABILITY >= LIMIT"),
        ("math; code <= 0.3", "must be CAPABILITY >= LIMIT"),
        ("math; 0.2 >= code", "unknown capability '0.2'"),
        ("math; cod >= 0.2", "unknown capability 'cod'; did you mean 'code'?"),
        ("math; code >= 0.2 >= 0.1", "must be CAPABILITY >= LIMIT"),
        ("math; code >= nan", "must be a finite number or a reference"),
        ("math; code >= ", "must be CAPABILITY >= LIMIT"),
        ("math; 'all' >= 0.1", "unknown capability 'all'"),
        ("math; long >= 0.1", "unknown capability 'long'; known: code"),
        ("math;", "must be CAPABILITY >= LIMIT"),
        ("math; code >= bse", "names 'bse'; did you mean 'base'?"),
        ("math; code >= base + 0.1", "names 'base + 0.1'"),
    ],
)
def test_floors_that_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_utility(spec, NAMES, ["base", "uniform", "web"])
    if "bse" not in spec and "+" not in spec:
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_utility(spec, NAMES)


def test_a_floor_at_the_base_needs_the_base_before_anything_costs() -> None:
    with pytest.raises(ConfigError, match="'all >= base' needs the scores of the base; give --base"):
        parse_utility("macro; all >= base", NAMES, ["uniform", "web"])
    spec = parse_utility("macro; all >= base", NAMES)
    with pytest.raises(ConfigError, match="needs the scores of the base; give --base"):
        capability_objective(spec, NAMES, {"web": REFERENCES["web"]})


def test_words_in_quotes_are_capabilities() -> None:
    names = ["macro", "worst", "all", "a;b"]
    scores = {"macro": 1.0, "worst": 2.0, "all": 3.0, "a;b": 10.0}

    def worth(spec: str) -> float:
        objective: Objective = capability_objective(spec, names)
        return float(objective({name: np.array([score]) for name, score in scores.items()})[0])

    assert worth("macro") == pytest.approx(4.0)
    assert worth("'macro'") == 1.0
    assert worth("'worst' + macro") == pytest.approx(6.0)
    assert worth("'a;b' / 2; 'a;b' >= 3; 'all' >= 3") == 5.0
    assert worth("'a;b'; all >= 1") == 10.0
    spec: UtilitySpec = parse_utility("'a;b'; 'all' >= 3", names)
    assert spec.floors == (Floor("all", 3.0),)


@given(st.permutations(NAMES))
def test_the_order_of_capabilities_changes_nothing(order: list[str]) -> None:
    for spec in ("worst", "macro; all >= base", "math ** 2 + code"):
        objective = capability_objective(spec, order, REFERENCES)
        found = objective({name: np.array([SCORES[name]]) for name in order})
        assert found == pytest.approx([value(spec)])
