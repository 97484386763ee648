"""Families that are really trained: the preflight tells broken ones from a sound one, by weights alone or with text."""

from __future__ import annotations

from typing import Any

from mergemix.checkpoints.family import open_family
from mergemix.path_scores import PreflightConfig, preflight
from mergemix.preflight.family import preflight_family
from tests.preflight.conftest import Trained


def by_weights(experts: dict[str, str], base: str | None) -> dict[str, Any]:
    return preflight_family(open_family(base, experts))


def verdicts(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in result["checks"]}


def failed(result: dict[str, Any]) -> set[str]:
    return {name for name, verdict in verdicts(result).items() if verdict == "do not trust"}


def test_by_weights_a_sound_family_is_fine(trained: Trained) -> None:
    result = by_weights(trained.sound, trained.base)
    assert result["verdict"] == "fine", result["checks"]
    assert by_weights(trained.sound, None)["verdict"] == "fine"


def test_by_weights_a_rate_ten_times_too_high_is_not(trained: Trained) -> None:
    found = verdicts(by_weights(trained.hot, trained.base))
    assert found["norms"] != "fine"
    assert found["same base"] == "fine", "it is not mistaken for another base"
    assert verdicts(by_weights(trained.hot, None))["distance"] != "fine"


def test_by_weights_another_base_is_told_by_what_all_experts_have_in_common(trained: Trained) -> None:
    result = by_weights(trained.of_other_base, trained.base)
    assert verdicts(result)["same base"] == "do not trust"
    assert any("another checkpoint than --base" in check["why"] for check in result["checks"])
    assert by_weights(trained.of_other_base, None)["verdict"] == "fine", "among themselves they are sound"


def test_by_weights_one_expert_of_another_base_is_named(trained: Trained) -> None:
    mixed = {**trained.sound, "math": trained.of_other_base["math"]}
    result = by_weights(mixed, trained.base)
    [why] = [check["why"] for check in result["checks"] if check["name"] == "same base"]
    assert {"same base", "equally far"} <= failed(result)
    assert why.startswith("math: ")
    assert failed(by_weights(mixed, None)) == {"distance"}


def test_by_weights_a_diverged_expert_is_named(trained: Trained) -> None:
    result = by_weights(trained.diverged, trained.base)
    [why] = [check["why"] for check in result["checks"] if check["name"] == "equally far"]
    assert {"norms", "equally far"} <= failed(result)
    assert why.startswith("code moved")


def with_text(trained: Trained, experts: dict[str, str]) -> dict[str, Any]:
    return preflight(PreflightConfig(base=trained.base, experts=experts, data=trained.data, engine="hf"))


def test_with_text_a_sound_family_is_fine(trained: Trained) -> None:
    """All that is measured is there, and the losses are those of models that learned."""
    result = with_text(trained, trained.sound)
    assert result["verdict"] == "fine", result["checks"]
    assert set(result["not_measured"]) == {"routing"}, "a dense model"
    ends = result["paths"]["loss"]["ends"]
    assert set(ends) == {*trained.sound, "uniform", "base"}
    for domain in trained.sound:
        assert ends[domain][domain] < ends["base"][domain]
        assert ends[domain][domain] == min(ends[name][domain] for name in ends)
    lines = {(barrier["from"], barrier["to"]) for barrier in result["paths"]["loss"]["barriers"]}
    assert len(lines) == 3 + 3
    assert set(result["curvature"]["gamma"]) == set(trained.data)


def test_with_text_a_rate_ten_times_too_high_is_not_to_be_trusted(trained: Trained) -> None:
    result = with_text(trained, trained.hot)
    assert {"barrier", "learned", "merge"} & failed(result)
    assert result["verdict"] == "do not trust"


def test_with_text_a_diverged_expert_is_told_by_its_own_domain_and_by_a_barrier(trained: Trained) -> None:
    result = with_text(trained, trained.diverged)
    assert {"barrier", "learned"} <= failed(result)
    [why] = [check["why"] for check in result["checks"] if check["name"] == "learned"]
    assert "code is" in why
    assert "worse than the base" in why
