from pathlib import Path

import click
import pytest

from mergemix.config import RunConfig, load_config_file
from mergemix.errors import ConfigError
from mergemix.options import NamedValues, Size, collect

EXPERTS = {"math": "m", "code": "c"}


def config(**changes: object) -> RunConfig:
    return RunConfig(**{"experts": EXPERTS, "bench": ("b.yaml",), "study": Path("s"), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": {}}, "got 0"),
        ({"experts": {"math": "m"}}, "got 1 \\(math\\)"),
        ({"experts": {"math": "m", "base": "b"}}, "'base'"),
        ({"experts": {"math": "m", "uniform": "b"}}, "'uniform'"),
        ({"experts": {"best": "m", "code": "b"}}, "'best'"),
        ({"bench": ()}, "--bench"),
        ({"search": "magic"}, "'magic'"),
        ({"engine": "tpu"}, "'tpu'"),
        ({"normalize": "base"}, "--base"),
        ({"max_model_len": 0}, "max_model_len"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_value(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    (tmp_path / "math-expert").mkdir()
    (tmp_path / "bench.yaml").write_text("name: x")
    file = tmp_path / "study.yaml"
    file.write_text(
        "experts: {math: math-expert, code: org/code@abc}\nbench: bench.yaml\nstudy: out\nseed: 3\n"
        "prior: {math: 0.5, code: 1}\n"
    )
    given = load_config_file(file)
    assert given == {
        "experts": {"math": str(tmp_path / "math-expert"), "code": "org/code@abc"},
        "bench": (str(tmp_path / "bench.yaml"),),
        "study": str(tmp_path / "out"),
        "seed": 3,
        "prior": {"math": 0.5, "code": 1},
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("expert: {math: m}", "unknown key 'expert'; did you mean 'experts'"),
        ("budget: many", "budget must be a whole number, but is 'many'"),
        ("seed: true", "seed must be a whole number"),
        ("experts: [m, c]", "experts must map names to values"),
        ("bench: {a: b}", "bench must be a path or a list of paths"),
        ("engine: 3", "engine must be text"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config_file(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config_file(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("256MiB", 1 << 28), ("1GB", 10**9), ("1.5 KiB", 1536), ("2g", 2 * 10**9)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "1 XB", "-1", "1MiB2", "i"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="size"):
        Size().convert(text, None, None)


def test_named_values_split_at_commas_that_start_a_name() -> None:
    parse = NamedValues(str).convert
    assert parse("math=/a,b/c,code=org/x@1", None, None) == [("math", "/a,b/c"), ("code", "org/x@1")]
    for text in ("math", "=x", "math=", "math=1,,code=2,"):
        if text.startswith("math=1"):
            assert parse(text, None, None) == [("math", "1,"), ("code", "2,")]
        else:
            with pytest.raises(click.BadParameter, match="NAME=VALUE"):
                parse(text, None, None)
    with pytest.raises(click.BadParameter, match="'half'"):
        NamedValues(float).convert("math=half", None, None)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(click.UsageError, match="'a' twice"):
        collect("--experts", [[("a", 1)], [("a", 2)]])
