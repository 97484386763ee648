"""Which checkpoints are averaged: names, weights, scores, the best N."""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.merge.average import distinct_names, select

parts = st.lists(st.sampled_from(["a", "b", "checkpoint-1", "checkpoint-2"]), min_size=1, max_size=4)


@given(st.lists(parts, min_size=1, max_size=8, unique_by=tuple))
def test_names_are_the_shortest_ends_that_differ(given_parts: list[list[str]]) -> None:
    paths = [PurePath("/nowhere", *each) for each in given_parts]
    names = [PurePath(name).parts for name in distinct_names([str(path) for path in paths], paths)]
    assert len(set(names)) == len(names)
    for path, name in zip(paths, names, strict=True):
        assert path.parts[-len(name) :] == name
        shorter = name[1:]
        assert not shorter or sum(other.parts[-len(shorter) :] == shorter for other in paths) > 1


def test_hub_ids_are_named_as_directories_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    chosen = select(["org/run@step100", "model", "other/model"])
    assert [each.name for each in chosen.taken] == ["run@step100", f"{tmp_path.name}/model", "other/model"]


def test_a_checkpoint_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "last").symlink_to("checkpoint-1")
    for first, second in (("checkpoint-1", "last"), ("checkpoint-1", "./checkpoint-1/")):
        with pytest.raises(ConfigError, match="is the same checkpoint as"):
            select([f"{tmp_path}/{first}", f"{tmp_path}/{second}"])
    with pytest.raises(ConfigError, match="org/a is the same checkpoint as org/a"):
        select(["org/a", "org/a"])


def test_weights_become_shares() -> None:
    chosen = select(["o/a", "o/b", "o/c"], weights=[1, 2, 1])
    assert [each["weight"] for each in chosen.as_dict()["checkpoints"]] == [0.25, 0.5, 0.25]
    assert select(["o/a", "o/b"]).mixture.weights == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0, 2.0]}, "3 checkpoints, 2 weights"),
        ({"weights": [1.0, -2.0, 3.0]}, "b=-2"),
        ({"weights": [1.0, math.nan, 3.0]}, "b=nan"),
        ({"weights": [0.0, 0.0, 0.0]}, "positive"),
        ({"top": 0}, "from 1 to 3"),
        ({"top": 4}, "from 1 to 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _ = select(["o/a", "o/b", "o/c"], **options).mixture


@pytest.mark.parametrize("count", [0, 1, 1025])
def test_an_average_takes_2_to_1024(count: int) -> None:
    with pytest.raises(ConfigError, match=f"takes 2 to 1024 checkpoints, but got {count}"):
        select([f"o/c{number}" for number in range(count)])


@given(st.data(), st.lists(st.integers(-3, 3), min_size=2, max_size=9), st.booleans(), st.booleans())
def test_the_best_are_taken_and_ties_told(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    values: list[int],
    minimize: bool,
    as_json: bool,
) -> None:
    top = data.draw(st.integers(1, len(values)))
    names = [f"c{index}" for index in range(len(values))]
    rows = data.draw(st.permutations(list(zip(names, values, strict=True))))
    path = tmp_path_factory.mktemp("scores") / "scores"
    path.write_text(
        json.dumps(dict(rows)) if as_json else "checkpoint,score\n" + "".join(f"{n},{v}\n" for n, v in rows)
    )
    chosen = select([f"o/{name}" for name in names], top=top, scores=path, minimize=minimize)
    taken = [int(each.name[1:]) for each in chosen.taken]
    left = [int(each.name[1:]) for each in chosen.left_out]
    assert len(taken) == top
    assert sorted(taken + left) == list(range(len(values)))
    assert (taken, left) == (sorted(taken), sorted(left))
    sign = -1 if minimize else 1
    for winner in taken:
        for loser in left:
            assert (sign * values[winner], -winner) > (sign * values[loser], -loser)
    cut = min(sign * values[index] for index in taken)
    split = any(sign * values[index] == cut for index in left)
    assert chosen.ties == tuple(n for n, v in zip(names, values, strict=True) if split and sign * v == cut)
    assert [each.score for each in chosen.taken] == [values[index] for index in taken]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three checkpoints of two runs, below the current directory."""
    monkeypatch.chdir(tmp_path)
    sources = ["one/checkpoint-1", "one/checkpoint-2", "two/checkpoint-2"]
    for source in sources:
        Path(source).mkdir(parents=True)
    return sources


@pytest.mark.parametrize(
    "text",
    [
        "checkpoint,score\ncheckpoint-1,1\none/checkpoint-2,2\ntwo/checkpoint-2,3\n",
        "\ufeffscore,checkpoint\r\n1,checkpoint-1\r\n\r\n2,one/checkpoint-2/\r\n3,./two/checkpoint-2\r\nnan,three\r\n",
        'checkpoint,score\n"one/checkpoint-1", 1.0\n../{name}/one/checkpoint-2,2e0\n{here}/two/checkpoint-2,3\n',
        '{"checkpoint-1": 1, "one/checkpoint-2": 2, "two/checkpoint-2": 3.0, "else": "?"}',
        '\ufeff\n{"one/../one/checkpoint-1": 1, "one/checkpoint-2": "2", "two/checkpoint-2": 3}',
    ],
)
def test_scores_are_found_by_name_or_path(run: list[str], text: str) -> None:
    Path("scores").write_bytes(
        text.replace("{here}", str(Path.cwd())).replace("{name}", Path.cwd().name).encode()
    )
    chosen = select(run, top=2, scores=Path("scores"))
    assert [(each.name, each.score) for each in chosen.taken] == [
        ("one/checkpoint-2", 2),
        ("two/checkpoint-2", 3),
    ]
    assert [(each.name, each.score) for each in chosen.left_out] == [("checkpoint-1", 1)]


ROWS = "checkpoint,score\ncheckpoint-1,1\none/checkpoint-2,2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no score of checkpoint-1 (and 2 more)"),
        (ROWS, "no score of two/checkpoint-2;"),
        (f"{ROWS}checkpoint-2,3\n", "scores:4: 'checkpoint-2' means both one/checkpoint-2 and two/checkpoint-2"),
        (f"{ROWS}two/checkpoint-2,nan\n", "scores:4: the score of two/checkpoint-2 must be a finite number"),
        (f"{ROWS}two/checkpoint-2,\n", "but is ''"),
        (f"{ROWS}two/checkpoint-2,much\n", "but is 'much'"),
        (f"{ROWS}one/checkpoint-1,3\n", "scores:4: checkpoint-1 has a score already, in scores:2"),
        (f"{ROWS}two/checkpoint-2\n", "scores:4: a line holds a checkpoint and its score"),
        (f"{ROWS}two/checkpoint-2,3,4\n", "scores:4"),
        ("checkpoint,loss\na,1\n", "scores:1: the first line must be checkpoint,score, but is 'checkpoint,loss'"),
        ("one/checkpoint-1,1\n", "scores:1: the first line"),
        (f'{ROWS}"two/checkpoint-2,3\n', "not valid CSV"),
        ('{"checkpoint-1": 1', "not valid JSON"),
        ('{"checkpoint-1": 1, "checkpoint-1": 1}', "twice"),
        ('{"checkpoint-1": true}', "finite number, but is True"),
        ('{"checkpoint-1": null}', "finite number, but is None"),
        ('{"checkpoint-1": {}}', "finite number"),
        ("\xff", "not UTF-8"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_used_are_refused(run: list[str], text: str, said: str) -> None:
    Path("scores").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        select(run, top=2, scores=Path("scores"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scores_file_that_is_not_there(run: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot read the scores nowhere"):
        select(run, top=2, scores=Path("nowhere"))
