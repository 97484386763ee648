"""Verification against scores that somebody has measured: no engine; files that are refused; what is concluded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from mergemix.errors import ConfigError, StudyError
from mergemix.evals.utility import Utility
from mergemix.mixture import Mixture
from mergemix.rank_stats import agreement, bootstrap, correlations, rank_agreement
from mergemix.report.verify_tables import verify_table
from mergemix.stored import read_evidence
from mergemix.trained import read_runs
from mergemix.verify import verify
from mergemix.verify.measure import Scored
from mergemix.verify.ranking import Reference, rank, values
from mergemix.verify.verdict import DOUBTFUL, FINE, NOT, OPEN, verdict
from tests.solve_study import CAPABILITY, NAMES, SURFACES, write_study

Line = Mapping[str, Any]


@pytest.fixture(scope="module", autouse=True)
def few_draws() -> Iterator[None]:
    """What is told does not hang on how many draws an interval has."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (bootstrap, agreement):
            patch.setattr(module, "RESAMPLES", 200)
        patch.setattr(correlations, "PERMUTATIONS", 200)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Mixture]]:
    """A study of known surfaces, and its mixtures: uniform, three single domains, 20 others."""
    directory = tmp_path_factory.mktemp("study") / "study"
    return directory, write_study(directory, candidates=20, items=40)


def truth(mixture: Mixture) -> dict[str, float]:
    return {CAPABILITY[name]: surface(np.array(mixture.weights)) for name, surface in SURFACES.items()}


def trained(path: Path, mixtures: Sequence[Mixture], seeds: int = 2, noise: float = 0.02) -> Path:
    """Runs that score what the surfaces say, half a point less, and noise."""
    rng = np.random.default_rng(1)
    lines = [
        {
            "mixture": mixture.as_dict(),
            "scores": {name: score - 0.5 + rng.normal(0, noise) for name, score in truth(mixture).items()},
            "seed": seed,
        }
        for mixture in mixtures
        for seed in range(seeds)
    ]
    return write(path, lines)


def write(path: Path, lines: Sequence[Line | str]) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def test_scores_by_capability(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    directory, mixtures = study
    result = verify(directory, trained(tmp_path / "trained.jsonl", mixtures[4:]))
    assert result["references"] == len(mixtures) - 4
    assert result["trust"] == FINE
    evidence = read_evidence(directory)
    proxies = {each.mixture: each.outcome for each in evidence.candidates}
    for name, found in result["capabilities"].items():
        points = result["calibration"]
        runs = [np.mean(point["trained"]["capabilities"][name]) for point in points]
        told = [
            proxies[Mixture(NAMES, tuple(point["mixture"].values()))].capabilities[name][0]
            for point in points
        ]
        assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(told, runs).statistic)
        assert found["offset"]["mean"] == pytest.approx(0.5, abs=0.03)
        assert found["ceiling"]["seed_deviation"] == pytest.approx(0.02, rel=0.4)
    assert result["evaluated"] == {"proxies": 0, "checkpoints": 0}
    assert result["intervals_over"] == ["references"]
    assert any("leave out that the items are a sample" in warning for warning in result["warnings"])
    assert verify(directory, tmp_path / "trained.jsonl") == result, "the same call, the same answer"


def test_scores_by_benchmark_are_the_same(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    directory, mixtures = study
    by_capability = trained(tmp_path / "capabilities.jsonl", mixtures)
    of = {capability: name for name, capability in CAPABILITY.items()}
    lines = [json.loads(line) for line in by_capability.read_text().splitlines()]
    named = [
        {**each, "scores": {of[name]: score for name, score in each["scores"].items()}} for each in lines
    ]
    one, other = (
        verify(directory, by_capability),
        verify(directory, write(tmp_path / "benchmarks.jsonl", named)),
    )
    assert one["overall"] == other["overall"]
    assert one["capabilities"] == other["capabilities"]
    assert {source for point in other["calibration"] for source in point["sources"]} == {"benchmark"}
    assert any("4 of 24 references have a single domain" not in warning for warning in one["warnings"])
    mixed = verify(directory, write(tmp_path / "mixed.jsonl", [*lines[:20], *named[20:]]))
    assert mixed["overall"] == one["overall"]
    assert any("(28 by benchmark, 20 by capability)" in warning for warning in mixed["warnings"])


def test_runs_stand_in_the_order_of_their_seeds(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    """The same seed of two mixtures is compared with the same: in one column."""
    directory, mixtures = study
    path = trained(tmp_path / "trained.jsonl", mixtures[4:12])
    turned = write(tmp_path / "turned.jsonl", path.read_text().splitlines()[::-1])
    one, other = verify(directory, path), verify(directory, turned)
    assert other["calibration"] == one["calibration"][::-1]
    assert other["calibration"][0]["seeds"] == [0, 1]
    assert other["overall"]["ceiling"]["seed_to_seed"] == one["overall"]["ceiling"]["seed_to_seed"]


def test_single_domains_are_no_test_of_merges(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    directory, mixtures = study
    warnings = verify(directory, trained(tmp_path / "trained.jsonl", mixtures))["warnings"]
    assert any("3 of 24 references have a single domain" in warning for warning in warnings)
    warnings = verify(directory, trained(tmp_path / "trained.jsonl", mixtures[4:], seeds=1))["warnings"]
    assert not any("single domain" in warning for warning in warnings)
    assert any("how well training agrees with itself is not known" in warning for warning in warnings)


def test_lower_is_better_is_turned_round(tmp_path: Path) -> None:
    mixtures = write_study(tmp_path / "study", candidates=12, lower=["words"])
    lines = [
        {"mixture": m.as_dict(), "scores": {**truth(m), "language": -truth(m)["language"]}} for m in mixtures
    ]
    found = verify(tmp_path / "study", write(tmp_path / "trained.jsonl", lines))
    assert found["capabilities"]["language"]["spearman"] > 0.9
    assert found["calibration"][0]["trained"]["capabilities"]["language"][0] > 0


def test_a_utility_with_a_minimum(tmp_path: Path) -> None:
    mixtures = write_study(tmp_path / "study", candidates=16, identity={"utility": "worst"})
    found = verify(tmp_path / "study", trained(tmp_path / "trained.jsonl", mixtures[4:]))
    assert found["utility"] == "worst"
    for point in found["calibration"]:
        assert point["proxy"]["overall"] == min(point["proxy"]["capabilities"].values())
    assert found["overall"]["spearman"] > 0.5


def test_normalised_scores(tmp_path: Path) -> None:
    mixtures = write_study(tmp_path / "study", candidates=16, identity={"normalize": "zscore"})
    found = verify(tmp_path / "study", trained(tmp_path / "trained.jsonl", mixtures[4:]))
    evidence = read_evidence(tmp_path / "study")
    wanted = evidence.valuation.capabilities["math"]({"sums": truth(mixtures[4])["math"] - 0.5})
    assert found["calibration"][0]["trained"]["capabilities"]["math"][0] == pytest.approx(wanted, abs=0.5)


def test_a_mixture_is_found_though_its_shares_were_rounded(
    study: tuple[Path, list[Mixture]], tmp_path: Path
) -> None:
    directory, mixtures = study
    lines = []
    for mixture in mixtures[:8]:
        for digits in (3, 4):
            rounded = {name: round(share, digits) for name, share in mixture.as_dict().items()}
            lines.append({"mixture": rounded, "scores": truth(mixture), "seed": digits})
    found = verify(directory, write(tmp_path / "trained.jsonl", lines))
    assert found["references"] == 8
    assert [Mixture(NAMES, tuple(point["mixture"].values())) for point in found["calibration"]] == mixtures[
        :8
    ]


def test_a_proxy_that_is_missing_needs_the_studys_configuration(
    study: tuple[Path, list[Mixture]], tmp_path: Path
) -> None:
    directory, mixtures = study
    path = trained(tmp_path / "trained.jsonl", [*mixtures[:6], Mixture(NAMES, (0.01, 0.01, 0.98))])
    with pytest.raises(StudyError, match="a study must say how it was configured to measure more"):
        verify(directory, path)


def test_a_score_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    write_study(tmp_path / "study", candidates=12, identity={"utility": "sqrt(math)"})
    [*mixtures] = [each.mixture for each in read_evidence(tmp_path / "study").candidates]
    lines = [{"mixture": m.as_dict(), "scores": truth(m)} for m in mixtures[:8]]
    lines[1]["scores"] = {**truth(mixtures[1]), "math": -1}
    found = verify(tmp_path / "study", write(tmp_path / "trained.jsonl", lines))
    assert found["references"] == 7
    assert any("line 2 is left out: its utility is" in warning for warning in found["warnings"])


GOOD: dict[str, Any] = {
    "mixture": {"math": 0.5, "code": 0.5}, "scores": {"math": 1, "code": 2, "language": 3}, "seed": 1
}  # fmt: skip
BAD: list[tuple[Any, str]] = [
    ("{", ":2 is not valid JSON"),
    ("[1]", ":2 must be a JSON object"),
    ('{"seed": 1, "seed": 2}', ":2 holds the key 'seed' twice"),
    ({**GOOD, "sed": 1}, r":2: unknown key 'sed'; did you mean 'seed'\?"),
    ({**GOOD, "checkpoint": "x"}, ":2: .* either 'checkpoint', to be scored, or 'scores' .* has both"),
    ({"mixture": GOOD["mixture"]}, ":2: .* has neither"),
    ({**GOOD, "mixture": None}, ":2: 'mixture' must map domains to shares, but is None"),
    ({**GOOD, "mixture": {"math": 0.5, "maths": 0.5}}, r":2: 'maths' is no domain .*; did you mean 'math'\?"),
    ({**GOOD, "mixture": {"math": 0.5, "code": 0.4}}, ":2: the shares of a mixture must sum to 1, but sum to 0.9"),
    ({**GOOD, "mixture": {"math": 1.5, "code": -0.5}}, ":2: the share of 'code' .* but is -0.5"),
    ({**GOOD, "mixture": {"math": True}}, ":2: the share of 'math' .* but is True"),
    ({**GOOD, "mixture": {"math": 10**400}}, ":2: the share of 'math' .* but is 1000"),
    ('{"mixture": {"math": NaN}, "scores": {}}', ":2: the share of 'math' .* but is nan"),
    ({**GOOD, "scores": 3}, ":2: 'scores' must map capabilities to numbers, but is 3"),
    ({**GOOD, "scores": {"math": 1, "code": 2}}, ":2: .* a score of every capability, but 'language' has none"),
    ({**GOOD, "scores": {"sums": 1, "mbpp": 2}}, ":2: .* a score of every benchmark, but 'words' has none"),
    ({**GOOD, "scores": {"math": 1, "code": 2, "words": 3}}, ":2: .* 'words' is no capability .* it is a benchmark"),
    ({**GOOD, "scores": {"math": "1", "code": 2, "language": 3}}, ":2: the score of 'math' .* but is '1'"),
    ({**GOOD, "scores": {"math": float("inf"), "code": 2, "language": 3}}, ":2: the score of 'math' .* but is inf"),
    ({**GOOD, "seed": "a"}, ":2: 'seed' must be a whole number, but is 'a'"),
    ({**GOOD, "seed": True}, ":2: 'seed' must be a whole number, but is True"),
    (GOOD, ":2: a mixture and seed must be there once, but line 1 is math 0.5 code 0.5 with seed 1 too"),
    ({"mixture": {"web": 1}, "checkpoint": ""}, ":2: 'checkpoint' must be a directory or a Hub id, but is ''"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD, ids=[message for _, message in BAD])
def test_a_line_that_is_wrong(
    study: tuple[Path, list[Mixture]], tmp_path: Path, line: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        verify(study[0], write(tmp_path / "trained.jsonl", [GOOD, line]))


def test_a_file_that_is_none(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trained references .*none.jsonl"):
        verify(study[0], tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no trained references: write one a line, such as"):
        verify(study[0], write(tmp_path / "empty.jsonl", ["", " "]))
    with pytest.raises(ConfigError, match="references of two mixtures or more, but there is one"):
        verify(study[0], write(tmp_path / "one.jsonl", [GOOD, {**GOOD, "seed": 2}]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"mixture": {"m\xe4th": 1}}')
    with pytest.raises(ConfigError, match=r"latin.jsonl:1 is not UTF-8"):
        verify(study[0], tmp_path / "latin.jsonl")
    twice = [{**GOOD, "seed": n} for n in (1, 2)]
    for each in twice:
        del each["scores"]
        each["checkpoint"] = "same"
    with pytest.raises(
        ConfigError, match=":2: each training run is a checkpoint of its own, but line 1 gives same"
    ):
        verify(study[0], write(tmp_path / "same.jsonl", twice))


SUITE = {
    "a": {"capability": "x", "higher_is_better": True},
    "b": {"capability": "x", "higher_is_better": True},
    "c": {"capability": "y", "higher_is_better": False},
}


def runs_of(path: Path, scores: Line, normalize: str = "raw", suite: Mapping[str, Any] = SUITE) -> Any:
    write(path, [{"mixture": {"m": 1}, "scores": scores}])
    return read_runs(path, ["m", "n"], suite, normalize, [])


def test_one_number_for_several_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "trained.jsonl"
    [run] = runs_of(path, {"x": 0.5, "y": 2})
    assert run.scores == {"a": 0.5, "b": 0.5, "c": 2}
    with pytest.raises(
        ConfigError, match=r"'x' is the mean of scores normalised by zscore.*each benchmark \(a, b, c\)"
    ):
        runs_of(path, {"x": 0.5, "y": 2}, "zscore")
    mixed = {**SUITE, "b": {"capability": "x", "higher_is_better": False}}
    with pytest.raises(ConfigError, match="'x' mixes directions"):
        runs_of(path, {"x": 0.5, "y": 2}, suite=mixed)
    assert runs_of(path, {"a": 0.5, "b": 1, "c": 2}, "zscore")[0].scored_by == "benchmark"
    # A capability may be called as a benchmark of its own.
    named = {
        "x": {"capability": "x", "higher_is_better": True},
        "z": {"capability": "y", "higher_is_better": True},
    }
    assert runs_of(path, {"x": 1, "y": 2}, suite=named)[0].scored_by == "capability"
    assert runs_of(path, {"x": 1, "z": 2}, suite=named)[0].scored_by == "benchmark"
    three = {name: {"capability": "y" if name == "z" else name, "higher_is_better": True} for name in "xyz"}
    assert runs_of(path, {"x": 1, "y": 2}, suite=three)[0].scores == {"x": 1, "y": 2, "z": 2}


def test_a_checkpoint_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = write(tmp_path / "t.jsonl", [
        {"mixture": {"m": 1}, "checkpoint": "run"}, {"mixture": {"n": 1}, "checkpoint": "org/model@v1"},
    ])  # fmt: skip
    local, hub = read_runs(path, ["m", "n"], SUITE, "raw", [])
    assert local.checkpoint == str(tmp_path / "run")
    assert hub.checkpoint == "org/model@v1"
    assert (local.seed, local.scores, local.line, hub.line) == (0, None, 1, 2)


def references(study: Path, items: Callable[[int], list[str]]) -> tuple[list[Reference], Any]:
    """Each mixture of the study as its own reference, with the items that are named."""
    evidence = read_evidence(study)
    found = []
    for number, each in enumerate(evidence.candidates):
        kept = {
            name: {item: float(each.items[name][int(item)]) for item in items(number)} for name in each.items
        }
        scored = Scored(each.record.scores, kept)
        found.append(Reference(each.mixture, scored, (scored,), (0,), ("checkpoint",)))
    return found, evidence.valuation


def test_items_are_resampled_where_all_models_have_answered_the_same(
    study: tuple[Path, list[Mixture]],
) -> None:
    same, valuation = references(study[0], lambda number: [str(i) for i in range(40)])
    overall, capabilities, over_items = rank(same, valuation, top=None, seed=0)
    assert over_items
    assert overall["spearman"] == 1
    assert overall["interval"][1] == 1
    assert all(found["offset"] == {"mean": 0, "spread": 0} for found in capabilities.values())
    other, _ = references(study[0], lambda number: [str(number)])
    assert not rank(other, valuation, top=None, seed=0)[2], "no item in common"
    some, _ = references(study[0], lambda number: [str(i) for i in range(40) if i != number])
    assert rank(some, valuation, top=None, seed=0)[2], "an item that failed is left out of its model's mean"
    none = [Reference(r.mixture, Scored(r.proxy.means), r.runs, r.seeds, r.sources) for r in same]
    assert not rank(none, valuation, top=None, seed=0)[2]


def test_values_are_those_of_the_valuation(study: tuple[Path, list[Mixture]]) -> None:
    evidence = read_evidence(study[0])
    record = evidence.candidates[5].record
    found = values(evidence.valuation, Scored(record.scores))
    assert isinstance(evidence.valuation.utility, Utility)
    assert found[None] == evidence.candidates[5].outcome.utility
    assert {name for name in found if name is not None} == set(CAPABILITY.values())


def normal(rho: float, n: int, seeds: int = 1, noise: float = 0.0, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n))
    y = rho * x + math.sqrt(1 - rho * rho) * y
    return rank_agreement(x, y[:, None] + noise * rng.normal(size=(n, seeds)))


@pytest.mark.parametrize(
    ("found", "trust", "said"),
    [
        (normal(0.97, 30), FINE, "can be trusted to choose a mixture by, also by any one capability"),
        (normal(0.7, 40, seed=1), DOUBTFUL, "choose by them only what further references confirm"),
        (normal(-0.9, 30), NOT, "do not choose a mixture by them"),
        (normal(0.3, 200), NOT, "They cannot stand for training here"),
        (normal(0.97, 4), OPEN, "cannot be said whether the proxies can be trusted: 4 references are too few"),
        (normal(0.0, 20), OPEN, "cannot tell the correlation from chance"),
        (normal(0.99, 40, seeds=2, noise=0.5), FINE, "a perfect proxy would reach 0.9"),
    ],
)  # fmt: skip
def test_the_verdict_in_words(found: dict[str, Any], trust: str, said: str) -> None:
    got, sentence = verdict(found, {"math": normal(0.97, 30)})
    assert got == trust, (found["interval"], sentence)
    assert said in sentence


def test_a_capability_that_is_ranked_badly_is_named() -> None:
    _, sentence = verdict(normal(0.97, 30), {"math": normal(0.2, 30), "code": normal(0.97, 30)})
    assert "but not by math alone" in sentence


def test_tables_show_what_is_not_known(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    directory, mixtures = study
    few = trained(tmp_path / "trained.jsonl", mixtures[:4], seeds=1)
    whole = trained(tmp_path / "whole.jsonl", mixtures)
    texts = []
    for path in (few, whole):
        console = Console(width=120, file=(tmp_path / "out").open("w"))
        with console.capture() as captured:
            console.print(verify_table(verify(directory, path)))
        texts.append(captured.get())
    assert "Verdict: too few references. It cannot be said" in texts[0]
    assert " - " in texts[0], "no ceiling"
    assert "Verdict: fine." in texts[1]
    assert "corrected" in texts[1]
    assert "(95% intervals over references)" in texts[1]
    json.dumps(verify(directory, few), allow_nan=False)


def test_tables_fit_a_terminal_of_80_columns(study: tuple[Path, list[Mixture]], tmp_path: Path) -> None:
    """No interval is cut, below zero neither; and a capability may be called overall, too."""
    directory, mixtures = study
    result = verify(directory, trained(tmp_path / "trained.jsonl", mixtures))
    low = {**result["overall"], "interval": [-0.28, 1.0], "kendall_interval": [-0.32, 1.0]}
    result["capabilities"] |= {"overall": low, "a-capability-of-a-long-name": low}
    console = Console(width=80, file=(tmp_path / "out").open("w"))
    with console.capture() as captured:
        console.print(verify_table(result))
    assert "…" not in captured.get()
    assert captured.get().count("(-0.28..1.00)") == captured.get().count("(-0.32..1.00)") == 2
