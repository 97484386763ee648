import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mergemix.errors import ConfigError, StudyError
from mergemix.mixture import LayerGroup, Mixture
from mergemix.report.solve_tables import solve_table
from mergemix.search import decision
from mergemix.search.constraints import Constraints
from mergemix.search.pareto import front
from mergemix.search.region import Region
from mergemix.solve import constraints_of, solve
from mergemix.study import ItemRecord, Study
from tests.solve_study import NAMES, SURFACES, TIMINGS, write_study


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One model in place of several: fits are not what is tested here."""
    monkeypatch.setattr(decision, "FEW", 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("solve") / "study"
    write_study(directory, stopped=4)
    return directory


def truth(mixture: dict[str, float]) -> dict[str, float]:
    shares = np.array([mixture[name] for name in NAMES])
    scores = {name: surface(shares) for name, surface in SURFACES.items()}
    return {"math": scores["sums"], "code": scores["mbpp"], "language": scores["words"]}


def test_the_study_s_own_question_is_answered(study: Path) -> None:
    result = solve(study)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["utility"], result["normalize"], result["domains"]) == ("macro", "raw", list(NAMES))
    assert result["candidates"] == 34
    predicted, observed = result["predicted"], result["observed"]
    assert predicted["capabilities"].keys() == {"math", "code", "language"}
    real = np.mean(list(truth(predicted["mixture"]).values()))
    assert predicted["utility"] == pytest.approx(real, abs=0.02)
    assert predicted["interval"][0] < real < predicted["interval"][1]
    assert (
        real >= max(np.mean(list(truth(m["mixture"]).values())) for m in result["pareto"]["observed"]) - 0.005
    )
    assert observed["interval"][0] < observed["utility"] < observed["interval"][1]
    assert observed["utility"] == pytest.approx(np.mean(list(observed["capabilities"].values())))
    assert observed["utility"] == pytest.approx(np.mean(list(truth(observed["mixture"]).values())), abs=0.03)
    assert observed["mixture"] not in result["indistinguishable"]
    assert result["noise_floor"] > 0
    assert result["unconstrained"] is None
    assert result["prices"] == []
    assert result["warnings"] == []
    assert set(result["surrogates"]) == {"math", "code", "language"}
    unbeaten = [list(point["capabilities"].values()) for point in result["pareto"]["observed"]]
    assert not front(np.array(unbeaten)).all()  # what is beaten by no more than noise stays


@pytest.mark.parametrize(
    ("utility", "best"),
    [("math", (0.6, 0.4, 0.0)), ("code", (0.1, 0.9, 0.0)), ("language=2,code=0", (0.0, 0.0, 1.0))],
)
def test_another_utility_has_another_answer(study: Path, utility: str, best: tuple[float, ...]) -> None:
    result = solve(study, utility=utility)
    found = np.array([result["predicted"]["mixture"][name] for name in NAMES])
    name = utility.split("=")[0]
    at_best = truth(dict(zip(NAMES, best, strict=True)))[name]
    assert truth(result["predicted"]["mixture"])[name] == pytest.approx(at_best, abs=0.02)
    assert np.abs(found - best).sum() / 2 < 0.2
    assert result["predicted"]["capabilities"].keys() == {"math", "code", "language"}


def test_floors_that_can_be_met_decide_before_the_number(tmp_path: Path) -> None:
    """Somebody just below the floor has the higher number, and is not chosen; the base is a reference."""
    directory = tmp_path / "study"
    with Study.open(
        directory, {"experts": ["a", "b"], "utility": "macro", "normalize": "raw"}, suite_of()
    ) as study:
        for weights, scores in {
            (0.5, 0.5): (0.9, 0.4999),
            (1.0, 0.0): (0.2, 0.1),
            (0.0, 1.0): (0.1, 0.5),
            (0.3, 0.7): (0.3, 0.5),
            (0.0, 0.0): (0.1, 0.5),
        }.items():
            put(study, Mixture(("a", "b"), weights), scores)
    result = solve(directory, utility="x; y >= base")
    assert result["observed"]["mixture"] == {"a": 0.3, "b": 0.7}
    assert result["observed"]["shortfalls"] == {}
    assert result["predicted"]["shortfalls"] == {}
    missed = solve(directory, utility="x; y >= 0.6")["observed"]
    assert missed["shortfalls"] == {"y >= 0.6": pytest.approx(missed["capabilities"]["y"] * -1 + 0.6)}
    assert solve(directory, utility="x")["observed"]["mixture"] == {"a": 0.5, "b": 0.5}


def suite_of() -> dict[str, object]:
    about = {"higher_is_better": True, "metric": "accuracy", "items": 8}
    return {"suite": {"bench-x": {"capability": "x", **about}, "bench-y": {"capability": "y", **about}}}


def put(study: Study, mixture: Mixture, scores: tuple[float, float]) -> None:
    results = [
        ItemRecord(name, f"{name}-{i}", score, None)
        for name, score in zip(("bench-x", "bench-y"), scores, strict=True)
        for i in range(8)
    ]
    study.record(mixture, origin="random", results=results, timings=TIMINGS)


def test_constraints_hold_and_cost(study: Path) -> None:
    constraints = Constraints(max={"code": 0.2}, min={"web": 0.1})
    result = solve(study, utility="math", constraints=constraints)
    region = constraints.region(NAMES)

    def allowed(mixture: dict[str, float]) -> bool:
        return region.contains(Mixture.of(NAMES, mixture, normalize=False))

    chosen = [
        result["observed"],
        result["predicted"],
        *result["pareto"]["observed"],
        *result["pareto"]["predicted"],
    ]
    assert all(allowed(each["mixture"]) for each in chosen)
    assert all(allowed(mixture) for mixture in result["indistinguishable"])
    assert not allowed(result["unconstrained"]["mixture"])
    assert result["constraints"] == ["min web=0.1", "max code=0.2"]
    assert {price["constraint"] for price in result["prices"]} == set(result["constraints"])
    costs = sum(price["price"] for price in result["prices"])
    assert costs > 0.01
    assert result["unconstrained"]["utility"] > result["predicted"]["utility"]
    assert result["candidates"] == solve(study)["candidates"]  # those outside teach the models too


def test_a_study_s_own_constraints_hold_until_others_are_given(tmp_path: Path) -> None:
    region = Constraints(
        max={"code": 0.2},
        min={"text": 0.3},
        groups={"text": ("math", "web")},
        tokens={"web": 1e9},
        train_tokens=1e10,
        prior={"math": 2, "code": 1, "web": 1},
        kl_limit=0.8,
        kl_penalty=0.01,
    ).region(NAMES)
    write_study(tmp_path / "study", identity={"constraints": json.loads(json.dumps(region.describe()))})
    result = solve(tmp_path / "study")
    assert region.contains(Mixture.of(NAMES, result["predicted"]["mixture"], normalize=False))
    assert len(result["constraints"]) == 4
    free = solve(tmp_path / "study", constraints=Constraints(max={"code": 0.5}))
    assert free["constraints"] == ["max code=0.5"]
    again = constraints_of(region.describe()).region(NAMES)
    points = Region.simplex(NAMES).sample(400, np.random.default_rng(0))
    snapped = [Region.simplex(NAMES).snap(point) for point in points]
    inside = [region.contains(mixture) for mixture in snapped]
    assert inside == [again.contains(mixture) for mixture in snapped]
    assert any(inside)
    assert again.penalty(points) == pytest.approx(region.penalty(points))
    assert constraints_of({}).region(NAMES).is_simplex


def test_a_dropped_domain_has_no_share_and_a_price(study: Path) -> None:
    result = solve(study, drop=["code"])
    assert result["predicted"]["mixture"]["code"] == 0
    assert result["observed"]["mixture"]["code"] == 0
    assert result["unconstrained"]["mixture"]["code"] > 0.2
    assert [price["constraint"] for price in result["prices"]] == ["pin code=0"]
    assert result["dropped"] == ["code"]
    with pytest.raises(
        ConfigError, match="--drop names 'cod', which is no domain of the study; did you mean"
    ):
        solve(study, drop=["cod"])
    with pytest.raises(ConfigError, match="all are dropped"):
        solve(study, drop=list(NAMES))
    with pytest.raises(ConfigError, match="'code' is dropped and pinned to"):
        solve(study, drop=["code"], constraints=Constraints(pin={"code": 0.2}))
    alone = solve(study, drop=["code", "web"])
    assert alone["predicted"]["mixture"] == {"math": 1.0, "code": 0.0, "web": 0.0}


def test_where_nothing_measured_is_allowed_the_answer_is_a_prediction(study: Path) -> None:
    result = solve(study, constraints=Constraints(pin={"math": 0.1234, "code": 0.4321}))
    assert result["observed"] is None
    assert result["indistinguishable"] == result["pareto"]["observed"] == []
    assert result["warnings"] == [
        "no measured mixture satisfies the constraints: the answer is a prediction alone"
    ]
    assert result["predicted"]["mixture"] == pytest.approx({"math": 0.1234, "code": 0.4321, "web": 0.4445})


def test_lower_scores_can_be_better_and_normalisation_changes(tmp_path: Path) -> None:
    plain, turned = tmp_path / "plain", tmp_path / "turned"
    write_study(plain, candidates=12)
    write_study(turned, candidates=12, lower=["sums"])
    for normalize in ("base", "minmax", "zscore"):
        here, there = (solve(each, normalize=normalize) for each in (plain, turned))
        assert there["observed"] == {
            **here["observed"],
            "utility": pytest.approx(here["observed"]["utility"]),
            "interval": pytest.approx(here["observed"]["interval"]),
            "capabilities": pytest.approx(here["observed"]["capabilities"]),
        }
        assert here["normalize"] == normalize
    by_base = solve(plain, normalize="base")["observed"]
    raw = solve(plain)["observed"]
    assert by_base["utility"] < raw["utility"]
    with pytest.raises(ConfigError, match="unknown normalisation 'minmx'"):
        solve(plain, normalize="minmx")


def test_utilities_that_do_not_fit_the_study(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown capability 'mth'; did you mean 'math'"):
        solve(study, utility="mth")
    with pytest.raises(ConfigError, match=re.escape("names 'wb'; did you mean 'web'?")):
        solve(study, utility="macro; all >= wb")
    write_study(tmp_path / "baseless", candidates=3, base=False)
    with pytest.raises(ConfigError, match="needs the scores of the base"):
        solve(tmp_path / "baseless", utility="macro; all >= base")
    assert solve(tmp_path / "baseless", utility="macro; math >= web")["observed"] is not None


def test_studies_that_cannot_be_solved(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="a study must exist to be read"):
        solve(tmp_path / "none")
    write_study(tmp_path / "old", candidates=3, suite=False)
    with pytest.raises(StudyError, match="must say which capability its benchmarks measure"):
        solve(tmp_path / "old")
    with Study.open(
        tmp_path / "failed", {"experts": ["a", "b"], "utility": "macro", "normalize": "raw"}, suite_of()
    ) as study:
        study.record_failure(Mixture.uniform(("a", "b")), origin="baseline", reason="no memory")
    with pytest.raises(StudyError, match="run it first"):
        solve(tmp_path / "failed")


def test_candidates_with_layer_groups_are_left_out(tmp_path: Path) -> None:
    directory = tmp_path / "study"
    write_study(directory, candidates=6)
    before = solve(directory)
    mixture = Mixture(NAMES, (0.2, 0.3, 0.5), (LayerGroup(("*",), (1.0, 0.0, 0.0)),))
    results = [ItemRecord(name, f"{name}-{i}", 9.0, None) for name in SURFACES for i in range(60)]
    with Study.open(directory, *facts(directory)) as study:
        study.record(mixture, origin="blockwise", results=results, timings=TIMINGS)
    assert solve(directory) == before


def facts(directory: Path) -> tuple[dict[str, object], dict[str, object]]:
    with Study.read(directory) as study:
        return study.identity, study.info


def test_stopped_candidates_teach_and_are_not_chosen(tmp_path: Path) -> None:
    directory = tmp_path / "study"
    mixtures = write_study(directory, candidates=10, stopped=10)
    result = solve(directory)
    assert result["candidates"] == result["points"] == len(mixtures)
    baselines = [mixture.as_dict() for mixture in mixtures[:4]]
    assert result["observed"]["mixture"] in baselines
    assert all(point["mixture"] in baselines for point in result["pareto"]["observed"])


def test_the_same_study_gives_the_same_decision(study: Path) -> None:
    assert solve(study, utility="worst", seed=4) == solve(study, utility="worst", seed=4)


def test_items_without_a_score_are_left_out(tmp_path: Path) -> None:
    directory = tmp_path / "study"
    write_study(directory, candidates=6)
    results = [
        ItemRecord(name, f"{name}-{i}", None if i % 2 else 0.9, None, "no answer" if i % 2 else None)
        for name in SURFACES
        for i in range(60)
    ]
    with Study.open(directory, *facts(directory)) as study:
        study.record(Mixture(NAMES, (0.2, 0.3, 0.5)), origin="random", results=results, timings=TIMINGS)
    result = solve(directory)
    assert result["observed"]["mixture"] == {"math": 0.2, "code": 0.3, "web": 0.5}
    assert result["observed"]["utility"] == pytest.approx(0.9)


def shown(result: dict[str, object]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(solve_table(result))
    return console.export_text()


def test_the_table_shows_what_was_found(study: Path) -> None:
    result = solve(
        study, utility="macro; all >= base; language >= 0.35", constraints=Constraints(max={"code": 0.2})
    )
    text = shown(result)
    for part in (
        "best measured", "best predicted", "without constraints", "max code=0.2", "utility lost", "34 measured",
        "'macro; all >= base; language >= 0.35'", "Not beaten in all capabilities", "a Gaussian process",
    ):  # fmt: skip
        assert part in text
    assert f"{result['predicted']['utility']:.4g}" in text
    nothing = shown(solve(study, drop=["code"], constraints=Constraints(pin={"math": 0.1234})))
    assert "Without code." in nothing
    assert "Note: no measured mixture satisfies the constraints" in nothing
    assert "best measured" not in nothing
    assert "[b]" in shown({**result, "utility": "[b]"})
