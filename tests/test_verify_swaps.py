"""--verify-swaps through the command line, and what the answer and the store then say, with the transformers engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mergemix.run
from mergemix.mixture import Mixture
from mergemix.serve import hf_engine, memory_check
from mergemix.serve.engine import Engine, EngineSpec
from mergemix.serve.open import start_engine
from mergemix.serve.restarting import RestartingEngine
from mergemix.study import Study
from tests.command_line import Invoke, refused
from tests.study_fixture import TinyStudy

BUDGET = 5
# The self-test of a start swaps twice; then uniform, base and experts.
FIFTH = 2 + 5


def scores(study: Path) -> list[Any]:
    with Study.read(study) as opened:
        return [(record.status, dict(record.scores)) for record in opened.candidates()]


def proofs(study: Path) -> set[bool]:
    with Study.read(study) as opened:
        return {record.proven for record in opened.candidates()}


def arguments(tiny: TinyStudy, study: Path, verify: str = "") -> list[str]:
    return tiny.arguments(study, budget=BUDGET) + ([f"--verify-swaps={verify}"] if verify else [])


@pytest.fixture(scope="module")
def right(tiny_study: TinyStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with nothing wrong."""
    from click.testing import CliRunner

    from mergemix.cli import cli

    study = tmp_path_factory.mktemp("right") / "study"
    result = CliRunner().invoke(cli, arguments(tiny_study, study))
    assert result.exit_code == 0, result.output
    return study


def test_never_is_not_proven_and_says_so(
    tiny_study: TinyStudy, right: Path, tmp_path: Path, invoke: Invoke
) -> None:
    code, out, err = invoke(*arguments(tiny_study, tmp_path / "study", "never"))
    assert code == 0, err
    text = " ".join(out.split())
    assert "NOT proven: every candidate was swapped without verification" in text
    assert "fresh start" not in text
    assert proofs(tmp_path / "study") == {False}
    assert scores(tmp_path / "study") == scores(right)
    code, out, _ = invoke(*arguments(tiny_study, tmp_path / "study", "never"), "--json")
    swaps = json.loads(out)["swaps"]
    assert (swaps["proven"], swaps["unproven"], swaps["fresh_starts"]) == (False, swaps["count"], 0)


def test_fresh_starts_are_not_proven_and_told_apart(
    tiny_study: TinyStudy, right: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restarting(spec: EngineSpec, initial: Mixture) -> Engine:
        return RestartingEngine(lambda mixture: start_engine(spec, mixture), initial)

    monkeypatch.setattr(mergemix.run, "open_engine", restarting)
    code, out, err = invoke(*arguments(tiny_study, tmp_path / "study"))
    assert code == 0, err
    assert "NOT proven: every candidate was a fresh start" in " ".join(out.split())
    assert proofs(tmp_path / "study") == {False}
    assert scores(tmp_path / "study") == scores(right)


def test_a_study_that_is_proven_in_part_says_how_much_is_not(
    tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke
) -> None:
    study = tmp_path / "study"
    assert invoke(*arguments(tiny_study, study))[0] == 0
    more = [each.replace(f"={BUDGET}", f"={BUDGET + 2}") for each in arguments(tiny_study, study, "never")]
    code, out, err = invoke(*more)
    assert code == 0, err
    assert "NOT all proven: " in " ".join(out.split())
    assert proofs(study) == {True, False}


def losing(monkeypatch: pytest.MonkeyPatch, swap: int) -> list[int]:
    """The swap of that number, counted from the first load (0), leaves one live tensor as it was."""
    real, calls = hf_engine.stream, [-1]

    def stream(plan: Any, sink: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] != swap:
            return real(plan, sink, **options)
        target = next(view for name, view in sink_memory(sink).items() if "down_proj" in name)
        before = target.copy()
        done = real(plan, sink, **options)
        target[:] = before
        return done

    monkeypatch.setattr(hf_engine, "stream", stream)
    return calls


def sink_memory(sink: Any) -> dict[str, Any]:
    [memory] = [value for value in vars(sink).values() if isinstance(value, dict) and len(value) > 5]
    return memory


@pytest.mark.parametrize("verify", ["every", "first", "never"])
def test_a_write_that_is_lost_in_the_fifth_swap_is_noticed_unless_nothing_is_verified(
    tiny_study: TinyStudy,
    right: Path,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    verify: str,
) -> None:
    """A sample is as large as this model, so that `first` is sure to meet what was lost."""
    fifth = FIFTH if verify != "never" else 5  # without the two swaps of the self-test
    monkeypatch.setattr(memory_check, "SAMPLED_PARTS", 1 << 20)
    calls = losing(monkeypatch, fifth)
    code, _, err = invoke(*arguments(tiny_study, tmp_path / "study", verify), "--json")
    assert code == 0, err
    assert calls[0] >= fifth
    assert (scores(tmp_path / "study") == scores(right)) is (verify != "never")
    assert proofs(tmp_path / "study") == {verify != "never"}


def test_another_word_is_refused(tiny_study: TinyStudy, tmp_path: Path, invoke: Invoke) -> None:
    refused(invoke(*arguments(tiny_study, tmp_path / "study", "sometimes")), 2, "sometimes")
