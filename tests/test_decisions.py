"""What decides on mixtures, on the command line: constrained runs, warm starts, trees; solve, compare, fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergemix.mixture import Mixture
from mergemix.study import Study
from tests.command_line import Invoke, refused
from tests.solve_study import write_study
from tests.study_fixture import TinyStudy


def proposed(study: Path) -> list[Mixture]:
    """What the search asked for itself."""
    with Study.read(study) as opened:
        return [
            record.mixture for record in opened.candidates() if record.origin not in ("baseline", "repeat")
        ]


def test_a_run_stays_inside_its_constraints_and_tells_their_price(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    names = [name for name in tiny_study.paths if name != "base"]
    first, second, third = names
    limits = [
        f"--max={first}=0.3",
        "--group",
        f"pair={first}+{second}",
        "--min",
        "pair=0.5",
        f"--tokens={third}=1e9",
    ]
    arguments = [
        *tiny_study.arguments(tmp_path / "a", budget=16),
        *limits,
        "--train-tokens=1e10",
        "--max-epochs=4",
    ]
    arguments += ["--search=surrogate", "--surrogate=gp", "--utility", "worst; all >= -1000"]
    code, out, err = invoke(*arguments)
    assert code == 0, err
    assert "Predicted and measured" in out
    assert "Best predicted" in out
    summary = json.loads((tmp_path / "a" / "mixture.json").read_text())
    asked = proposed(tmp_path / "a")
    assert len(asked) >= 8
    for mixture in [*asked, Mixture.of(names, summary["best"]["mixture"], normalize=False)]:
        share = mixture.as_dict()
        assert share[first] <= 0.3
        assert share[third] <= 0.4
        assert share[first] + share[second] >= 0.5 - 1e-12
    decision = summary["decision"]
    assert all(price["price"] >= 0 for price in decision["prices"])
    assert (decision["unconstrained"] is None) == (not decision["prices"]), "a constraint that costs is told"
    assert decision["points"] == 15, "all but the base"
    assert summary["verified"], "what models proposed is shown beside what was measured"
    for row in summary["verified"]:
        assert np.isfinite([row["predicted"], row["deviation"], row["observed"]]).all()


def test_constraints_that_conflict_stop_a_run_before_any_cost(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    first, second, _ = (name for name in tiny_study.paths if name != "base")
    arguments = tiny_study.arguments(tmp_path / "a")
    result = invoke(*arguments, f"--min={first}=0.7", f"--min={second}=0.6")
    refused(result, 1, first, second)
    refused(invoke(*arguments, "--utility", "nothing >= 3"), 1, "nothing")
    refused(invoke(*arguments, "--search=cma", "--interval=0.1"), 1, "bo or surrogate, but not cma")
    refused(invoke(*arguments, "--surrogate", "gp"), 1, "search is bo")
    refused(invoke(*arguments, "--max-epochs", "2"), 1, "limits nothing")
    refused(invoke(*arguments, "--max-epochs", "-3"), 1, "epochs must be a number > 0")
    refused(invoke(*arguments, "--utility", "copying; language >= unifrom"), 1, "did you mean 'uniform'")
    assert not (tmp_path / "a").exists()


def test_a_utility_without_a_finite_value_ends_a_run_with_a_message(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    arguments = tiny_study.arguments(tmp_path / "a")
    refused(invoke(*arguments, "--utility", "sqrt(language)"), 1, "must have a finite value for a baseline")


def test_a_penalty_counts_in_the_answer_and_in_its_ties(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    """At a thousand a nat nothing but the prior can win."""
    first, *_ = (name for name in tiny_study.paths if name != "base")
    arguments = [*tiny_study.arguments(tmp_path / "a", budget=9), f"--prior={first}=0.9", "--kl-penalty=1000"]
    others = ",".join(f"{name}=0.05" for name in tiny_study.paths if name not in ("base", first))
    code, out, err = invoke(*arguments, f"--prior={others}", "--json")
    assert code == 0, err
    best = json.loads(out)["best"]
    assert best["mixture"][first] == pytest.approx(0.9, abs=0.02)
    assert json.loads(out)["indistinguishable"] == [], "the others cost hundreds more"


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
def test_a_tree_of_domains_is_searched_and_resumed(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke, order: str
) -> None:
    first, *rest = (name for name in tiny_study.paths if name != "base")
    tree = tmp_path / "tree.yaml"
    tree.write_text(f"order: {order}\ntree: {{single: {first}, both: {json.dumps(rest)}}}\n")
    arguments = [
        *tiny_study.arguments(tmp_path / "a", budget=15),
        f"--hierarchy={tree}",
        "--search=random",
        "--json",
    ]
    code, out, err = invoke(*arguments)
    assert code == 0, err
    assert len(proposed(tmp_path / "a")) == 10, "the budget is used, beside the baselines"
    again = json.loads(invoke(*arguments)[1])
    assert again["best"] == json.loads(out)["best"]
    assert again["item_evaluations"] == json.loads(out)["item_evaluations"], "nothing is paid for twice"


def test_a_warm_start_is_taken_and_belongs_to_the_study(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    code, out, err = invoke(*tiny_study.arguments(tmp_path / "a", budget=14), "--search=random", "--json")
    assert code == 0, err
    first = json.loads(out)["best"]
    second = tiny_study.arguments(tmp_path / "b", budget=8)
    code, out, err = invoke(*second, "--search=bo", "--warm-start", tmp_path / "a", "--json")
    assert code == 0, err
    with Study.read(tmp_path / "a") as opened:
        known = {record.mixture for record in opened.candidates()}
    again = known & set(proposed(tmp_path / "b"))
    assert len(again) <= 1, "of what is known only the best is measured again"
    found = json.loads(out)
    assert found["best"]["utility"] >= first["utility"], "the answer is not below what was known"
    assert found["decision"]["points"] > 13, "models learn from both studies"
    refused(invoke(*second, "--search=bo"), 1, "warm_start")
    code, out, err = invoke("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0, err
    assert not json.loads(out)["moved"], "the same experts and benchmarks"


def test_solve_decides_again_without_models(tmp_path: Path, invoke: Invoke) -> None:
    write_study(tmp_path / "a")
    arguments = ("solve", "--study", tmp_path / "a", "--utility", "math; code >= 0.1", "--max", "math=0.4")
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["predicted"]["mixture"]["math"] == pytest.approx(0.4, abs=1e-4)
    assert result["unconstrained"]["mixture"]["math"] == pytest.approx(0.6, abs=0.12)
    assert result["prices"][0]["constraint"] == "max math=0.4"
    code, out, err = invoke(*arguments)
    assert code == 0, err
    assert "What constraints cost" in out
    code, out, err = invoke(
        "solve", "--study", tmp_path / "a", "--pin", "math=0.2,code=0.3,web=0.5", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["predicted"]["mixture"] == {"math": 0.2, "code": 0.3, "web": 0.5}
    refused(invoke("solve", "--study", tmp_path / "a", "--utility", "sqrt(0 - 1 - math)"), 1, "finite value")
    refused(invoke("solve", "--study", tmp_path / "a", "--seed", "-1"), 2, "--seed")
    refused(invoke("solve", "--study", tmp_path / "a", "--drop", "mat"), 1, "did you mean 'math'")
    refused(invoke("solve", "--study", tmp_path / "none"), 1, "must exist")


def test_compare_shows_two_studies(tmp_path: Path, invoke: Invoke) -> None:
    write_study(tmp_path / "a")
    write_study(tmp_path / "b", seed=1)
    code, out, err = invoke("compare", tmp_path / "a", tmp_path / "b")
    assert code == 0, err
    assert "no move can be told" in out.replace("\n", " ")
    refused(invoke("compare", tmp_path / "a"), 2, "takes 2 values")


def test_fit_models_what_others_have_measured(tmp_path: Path, invoke: Invoke) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 25)):
        shares = rng.dirichlet(np.ones(3), count)
        loss = 2 + ((shares - [0.6, 0.3, 0.1]) ** 2).sum(axis=1) + rng.normal(0, 0.005, count)
        rows = [f"{i},{','.join(f'{x:.6f}' for x in each)}" for i, each in enumerate(shares)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["run,math,code,web", *rows]) + "\n")
        lines = [f"{i},{value:.6f}" for i, value in enumerate(loss)]
        (tmp_path / f"{name}_scores.csv").write_text("\n".join(["run,loss", *lines]) + "\n")
    arguments = [
        "fit",
        "--mixtures",
        tmp_path / "train.csv",
        "--scores",
        tmp_path / "train_scores.csv",
        "--minimize",
    ]
    arguments += ["--test-mixtures", tmp_path / "test.csv", "--test-scores", tmp_path / "test_scores.csv"]
    code, out, err = invoke(*arguments, "--json")
    assert code == 0, err
    target = json.loads(out)["targets"]["loss"]
    assert target["test"]["spearman"] > 0.9
    assert target["cv"]["spearman"] > 0.8
    assert set(target["candidates"]) == {"lightgbm", "trees", "gp", "loglinear", "scheffe"}
    assert json.loads(out)["optimum"]["mixture"]["math"] == pytest.approx(0.6, abs=0.1)
    code, out, err = invoke(*arguments, "--max", "math=0.3", "--surrogate", "gp", "--json")
    assert code == 0, err
    assert json.loads(out)["optimum"]["mixture"]["math"] == pytest.approx(0.3, abs=1e-3)
    code, out, err = invoke(*arguments, "--surrogate", "scheffe")
    assert code == 0, err
    assert "loss" in out
    refused(invoke(*arguments[:3]), 2, "--scores")
    refused(invoke(*arguments, "--max", "maths=0.3"), 1, "maths")
