"""Evidence of an earlier study for a search to begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergemix.errors import ConfigError, StudyError
from mergemix.mixture import Mixture
from mergemix.stored import read_evidence
from mergemix.warm_start import load_warm_start
from tests.solve_study import NAMES, write_study

IDENTITY = {
    **{f"expert {name}": f"weights of {name}" for name in NAMES},
    **{f"benchmark {name}": f"items of {name}" for name in ("sums", "mbpp", "words")},
    "engine": "hf",
    "max_model_len": None,
}


def stored(directory: Path, **changes: object) -> Path:
    write_study(directory, identity=IDENTITY, **changes)
    return directory


def load(directory: Path, names=NAMES, identity=IDENTITY, utility="macro"):
    return load_warm_start(directory, names, identity, utility, "raw")


def test_the_same_experts_and_benchmarks_are_as_good_as_own_evidence(tmp_path: Path) -> None:
    directory = stored(tmp_path / "a")
    warm = load(directory, utility="math")
    assert warm.same
    valuation = read_evidence(directory, utility="code").valuation  # of the study that begins
    outcomes = dict(warm.outcomes(valuation))
    expert = Mixture.one_hot(NAMES, "code")
    assert len(outcomes) == 34
    assert outcomes[expert].utility == pytest.approx(0.7 - 0.8 * 0.01, abs=0.03), "valued by the new utility"
    assert set(outcomes[expert].capabilities) == {"math", "code", "language"}


@pytest.mark.parametrize(
    "changed",
    [
        {"expert code": "weights of a later code"},
        {"benchmark sums": "other items"},
        {"benchmark more": "items of more"},
        {"engine": "vllm"},
    ],
)
def test_what_was_measured_otherwise_is_a_hint(tmp_path: Path, changed: dict[str, str]) -> None:
    directory = stored(tmp_path / "a")
    warm = load(directory, identity={**IDENTITY, **changed})
    assert not warm.same
    own = read_evidence(directory, utility="code").valuation
    assert dict(warm.outcomes(own)) == dict(read_evidence(directory).outcomes()), (
        "valued by its own baselines"
    )


def test_a_domain_that_is_new_has_no_share_in_old_mixtures(tmp_path: Path) -> None:
    directory = stored(tmp_path / "a")
    names = ("books", "web", "code", "math")
    warm = load(directory, names, {**IDENTITY, "expert books": "weights of books"})
    assert warm.same
    mixtures = [mixture for mixture, _ in warm.candidates]
    assert len(mixtures) == 34
    assert all(mixture.names == names and mixture.weights[0] == 0 for mixture in mixtures)
    assert Mixture.one_hot(names, "code") in mixtures


def test_mixtures_with_a_domain_that_is_gone_are_left_out(tmp_path: Path) -> None:
    directory = stored(tmp_path / "a")
    warm = load(directory, ("code", "math"))
    assert [mixture.as_dict() for mixture, _ in warm.candidates] == [
        {"code": 0.0, "math": 1.0},
        {"code": 1.0, "math": 0.0},
    ]
    with pytest.raises(
        ConfigError, match=r"mixture of law, art must have been measured, but .* math, code, web"
    ):
        load(directory, ("law", "art"))


def test_a_utility_that_does_not_fit_the_earlier_benchmarks_is_not_used(tmp_path: Path) -> None:
    directory = stored(tmp_path / "a")
    warm = load(directory, identity={**IDENTITY, "benchmark x": "other"}, utility="physics")
    assert not warm.same
    assert dict(warm.outcomes(read_evidence(directory).valuation)) == dict(
        read_evidence(directory).outcomes()
    )


def test_what_it_brings_is_part_of_the_identity(tmp_path: Path) -> None:
    first = stored(tmp_path / "a")
    assert load(first).digest() == load(first).digest()
    assert load(first).digest() != load(stored(tmp_path / "b", seed=1)).digest()
    assert load(first).digest() != load(first, identity={**IDENTITY, "engine": "vllm"}).digest()


def test_there_must_be_such_a_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="must exist"):
        load(tmp_path / "none")
