"""The file of --mixtures: both forms, what is tolerated, and that every mistake is named by its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.merge.mixtures_file import read_mixtures
from mergemix.mixture import LayerGroup, Mixture

EXPERTS = ("math", "code", "web")
shares = st.dictionaries(
    st.sampled_from(EXPERTS), st.floats(0, 1e3).filter(lambda w: w == 0 or w > 1e-9), min_size=1
)
lines = st.lists(
    st.tuples(shares.filter(lambda weights: sum(weights.values()) > 0), st.booleans(), st.booleans()),
    min_size=1,
)


@given(lines, st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]), st.booleans(), st.booleans())
def test_every_form_gives_the_mixture_that_weights_give(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[tuple[dict[str, float], bool, bool]],
    end: str,
    marked: bool,
    ended: bool,
) -> None:
    path = tmp_path_factory.mktemp("mixtures") / "m.jsonl"
    texts, names = [], []
    for number, (weights, keyed, named) in enumerate(lines, start=1):
        names.append(f"m.{number}" if keyed and named else f"mixture-{number:04}")
        name = {"name": names[-1]} if keyed and named else {}
        texts.append(json.dumps({**name, "weights": weights} if keyed else weights))
    path.write_bytes(b"\xef\xbb\xbf" * marked + (end.join(texts) + end * ended).encode())
    recipes = read_mixtures(path, EXPERTS)
    assert [recipe.name for recipe in recipes] == names
    assert [recipe.given for recipe in recipes] == [weights for weights, _, _ in lines]
    assert [recipe.mixture for recipe in recipes] == [Mixture.of(EXPERTS, weights) for weights, _, _ in lines]


def test_weights_kept_as_given(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"math": 0.5, "code": -0.25}')
    (recipe,) = read_mixtures(tmp_path / "m", EXPERTS, normalize=False)
    assert recipe.mixture.base_weight == 0.75


def test_experts_may_be_called_as_keys_are(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"name": 1, "weights": 3}\n{"name": "x", "weights": {"name": 1}}')
    first, second = read_mixtures(tmp_path / "m", ("name", "weights"))
    assert first.mixture.weights == (0.25, 0.75)
    assert (second.name, second.mixture.weights) == ("x", (1.0, 0.0))


GOOD = '{"math": 1}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no mixtures"),
        ("\n \r\n", "holds no mixtures"),
        (f"{GOOD}\n{{", ":2 is not valid JSON"),
        (f"{GOOD}\n\n[1]", ":3 must be a JSON object"),
        (f"{GOOD}\n\xff", ":2 is not UTF-8"),
        ('{"math": 1, "math": 2}', ":1 holds the key 'math' twice"),
        ('{"weights": {"math": 1, "math": 1}}', "twice"),
        ('{"physics": 1}', ":1: no expert is called 'physics'; the experts are math, code, web"),
        ('{"name": "a", "weights": {"physics": 1}}', "'physics'"),
        ('{"name": "a", "weights": {"math": 1}, "weigths": 1}', ":1: unknown key 'weigths'"),
        ('{"name": "a", "math": 1}', "unknown key 'math'"),
        ('{"name": "a"}', "'weights' must map experts to numbers, but is None"),
        ('{"weights": 1}', "no expert is called 'weights'"),
        ('{"math": "1"}', "must be a number, but is '1'"),
        ('{"math": true}', "must be a number, but is True"),
        ('{"math": null}', "must be a number, but is None"),
        ('{"math": NaN}', "math=nan"),
        ('{"math": Infinity}', "math=inf"),
        ('{"math": 1' + "0" * 400 + "}", "too large"),
        ('{"math": -1, "code": 2}', "math=-1"),
        ('{"math": 0}', "positive, finite sum"),
        ("{}", "positive, finite sum"),
        (f'{GOOD}\n{{"name": "mixture-0001", "weights": {{"math": 1}}}}', "taken by the mixture of line 1"),
        ('{"name": "A", "weights": {"math": 1}}\n\n{"name": "a", "weights": {"math": 1}}', ":3: the name 'a'"),
        *(
            (json.dumps({"name": name, "weights": {"math": 1}}), ":1: a mixture's name becomes a directory")
            for name in ("", ".", "..", "a/b", "../x", "/etc", ".hidden", "a\\b", "a\0b", "a b", "-rf", "é", "x" * 101)
        ),
        ('{"weights": {"math": 1}, "groups": {}}', ":1: 'groups' must be a list"),
        ('{"weights": {"math": 1}, "groups": [3]}', ":1: a group must hold 'tensors' and 'weights', but is 3"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": ["*"]}]}', "must hold 'tensors' and 'weights'"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": [], "weights": {"math": 1}}]}', "must be patterns"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": [1], "weights": {"math": 1}}]}', "must be patterns"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": "*", "weights": 1}]}', "must map experts to numbers"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": "*", "weights": {"x": 1}}]}', ":1: no expert is called 'x'"),
        ('{"weights": {"math": 1}, "groups": [{"tensors": "*", "weights": {"math": 0}}]}', "positive, finite sum"),
        ('{"name": 7, "weights": {"math": 1}}', "but is 7"),
        ('{"name": null, "weights": {"math": 1}}', "but is None"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_mixtures(path, EXPERTS)
    message = str(caught.value)
    assert said in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the mixtures {path}"):
            read_mixtures(path, EXPERTS)


def test_groups_have_weights_of_their_own(tmp_path: Path) -> None:
    groups = [
        {"tensors": ["*.0.*", "*.1.*"], "weights": {"math": 3, "code": 1}},
        {"tensors": "x", "weights": {"web": 1}},
    ]
    (tmp_path / "m").write_text(json.dumps({"name": "a", "weights": {"math": 1}, "groups": groups}))
    (recipe,) = read_mixtures(tmp_path / "m", EXPERTS)
    assert recipe.mixture == Mixture(
        EXPERTS,
        (1.0, 0.0, 0.0),
        (LayerGroup(("*.0.*", "*.1.*"), (0.75, 0.25, 0.0)), LayerGroup(("x",), (0.0, 0.0, 1.0))),
    )
