"""Candidates' answers beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergemix.errors import ConfigError
from mergemix.report.items import beside_rows, item_rows
from tests.study.answers import Answer, mixture, open_study

FIRST = [
    Answer("a", "1", 1.0, "yes"),
    Answer("a", "2", 0.0, "no"),
    Answer("b", "1", -3.0),
    Answer("b", "2", -1.0),
]
SECOND = [
    Answer("a", "1", 1.0, "yes"),
    Answer("a", "2", 1.0, "two"),
    Answer("b", "1", -0.5),
    Answer("b", "2", None, error="ValueError: broken"),
]


def test_where_a_candidate_differs_from_another_furthest_behind_first(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.record(mixture(1), origin="cma", results=FIRST, timings={})
        study.record(mixture(2), origin="cma", results=SECOND, timings={})
        rows = beside_rows(study, 1, 2)
        found = [(row["benchmark"], row["item"], row["score"], row["beside"]["score"]) for row in rows]
        assert found == [("b", "1", -3.0, -0.5), ("a", "2", 0.0, 1.0), ("b", "2", -1.0, None)]
        assert rows[1]["text"] == "no"
        assert rows[1]["beside"]["text"] == "two"
        turned = [(row["benchmark"], row["item"]) for row in beside_rows(study, 2, 1)]
        assert turned == [("b", "2"), ("a", "2"), ("b", "1")], "what could not be scored is looked at first"
        assert [row["item"] for row in beside_rows(study, 1, 2, benchmarks=["a"])] == ["2"]
        for other, said in ((1, "both are 1"), (9, "no candidate 9")):
            with pytest.raises(ConfigError, match=said):
                beside_rows(study, 1, other)


def test_errors_are_failures_whatever_the_limit(tmp_path: Path) -> None:
    with open_study(tmp_path) as study:
        study.record(mixture(2), origin="cma", results=SECOND, timings={})
        [row] = item_rows(study, below=-100.0)
        assert (row["item"], row["score"], row["error"]) == ("2", None, "ValueError: broken")
