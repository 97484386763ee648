"""`mergemix generate`: several mixtures answered in turn by one engine, with real engines on tiny models."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import mergemix.generate
from mergemix.checkpoints.family import open_family
from mergemix.errors import ConfigError
from mergemix.generate import STDIN, GenerateConfig, generate, read_prompts
from mergemix.merge import merge_to_directory
from mergemix.mixture import LayerGroup, Mixture
from mergemix.report.generate_tables import generate_table, printable
from mergemix.serve import hf_engine
from mergemix.serve.engine import Engine, EngineSpec, Generate
from mergemix.serve.hf_engine import HfEngine
from mergemix.serve.open import start_engine
from tests.command_line import Invoke, refused
from tests.serve.tiny_models import MAX_POSITIONS, make_family

PROMPTS = ("the cat 12", "In the beginning", "x = 3 + 4;", "hello world, how are you")
MAX_TOKENS = 12
NAMES = ("math", "code", "web")
WEIGHTS = ("math=1", "math=1,code=3", "web=0.5,math=0.5", "math=1")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family(tmp_path_factory.mktemp("family"), "llama", experts=3)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def arguments(paths: dict[str, Path], prompts: object, *more: str, engine: str = "hf") -> list[str]:
    experts = [f"--experts={name}={paths[name]}" for name in NAMES]
    return [
        "generate",
        *experts,
        f"--prompts={prompts}",
        f"--max-tokens={MAX_TOKENS}",
        f"--engine={engine}",
        *more,
    ]


def fresh_answers(paths: dict[str, Path], mixture: Mixture, kind: str, directory: Path) -> list[str]:
    """What an engine says that was started on the merge on disk, and never swapped."""
    family = open_family(str(paths["base"]), {name: str(paths[name]) for name in mixture.names})
    directory.mkdir(exist_ok=True)
    merge_to_directory(family, mixture, directory / "merged")
    alone = open_family(None, {"merged": str(directory / "merged")})
    spec = EngineSpec(alone, kind, log=directory / "engine.log")  # type: ignore[arg-type]
    with start_engine(spec, Mixture.one_hot(("merged",), "merged")) as engine:
        return [each.text for each in engine.generate([Generate(p, MAX_TOKENS) for p in PROMPTS])]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Mixture]:
    """The mixtures that an engine was started on."""
    started: list[Mixture] = []
    real = mergemix.generate.open_engine

    def open_engine(spec: EngineSpec, initial: Mixture) -> Engine:
        started.append(initial)
        return real(spec, initial)

    monkeypatch.setattr(mergemix.generate, "open_engine", open_engine)
    return started


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_answers_equal_those_of_fresh_engines_on_merged_checkpoints(
    paths: dict[str, Path], prompts: Path, tmp_path: Path, invoke: Invoke, starts: list[Mixture], engine: str
) -> None:
    weights = [f"--weights={each}" for each in WEIGHTS]
    code, out, err = invoke(*arguments(paths, prompts, *weights, "--json", engine=engine))
    assert code == 0, err
    result = json.loads(out)
    assert out == json.dumps(result) + "\n"
    assert result["engine"] == engine
    assert result["proven"] is True
    assert len(starts) == 1
    mixtures = [(1, 0, 0), (0.25, 0.75, 0), (0.5, 0, 0.5), (1, 0, 0)]
    assert [list(each["mixture"].values()) for each in result["mixtures"]] == [list(m) for m in mixtures]
    assert [each["given"] for each in result["mixtures"]][1] == {"math": 1, "code": 3}
    assert [each["mixture"] for each in result["outputs"][:: len(PROMPTS)]] == [
        each["mixture"] for each in result["mixtures"]
    ]
    assert [each["prompt"] for each in result["outputs"]] == list(PROMPTS) * 4
    texts = [each["text"] for each in result["outputs"]]
    size = len(PROMPTS)
    compared = (0, 1, 2) if engine == "hf" else (1,)  # a fresh start of vLLM takes long
    for index in compared:
        directory = tmp_path / str(index)
        fresh = fresh_answers(paths, Mixture(NAMES, tuple(map(float, mixtures[index]))), engine, directory)
        assert texts[index * size :][:size] == fresh
    assert texts[:size] == texts[3 * size :]
    assert texts[:size] != texts[size : 2 * size]


def test_mixtures_of_a_file_with_layer_groups_and_a_share_of_the_base(
    paths: dict[str, Path], prompts: Path, tmp_path: Path, invoke: Invoke
) -> None:
    lines = [
        {
            "name": "blocks",
            "weights": {"math": 1},
            "groups": [{"tensors": ["*.mlp.*"], "weights": {"code": 1}}],
        },
        {"weights": {"math": 0.5, "web": 0.25}},
    ]
    file = tmp_path / "mixtures.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = invoke(
        *arguments(
            paths, prompts, f"--mixtures={file}", f"--base={paths['base']}", "--no-normalize", "--json"
        )
    )
    assert code == 0, err
    result = json.loads(out)
    assert [each["name"] for each in result["mixtures"]] == ["blocks", "mixture-0002"]
    assert result["outputs"][0]["groups"] == [
        {"tensors": ["*.mlp.*"], "weights": {"math": 0.0, "code": 1.0, "web": 0.0}}
    ]
    group = LayerGroup(("*.mlp.*",), (0.0, 1.0, 0.0))
    mixtures = [Mixture(NAMES, (1.0, 0.0, 0.0), (group,)), Mixture(NAMES, (0.5, 0.0, 0.25))]
    texts = [each["text"] for each in result["outputs"]]
    for index, mixture in enumerate(mixtures):
        fresh = fresh_answers(paths, mixture, "hf", tmp_path / str(index))
        assert texts[index * len(PROMPTS) :][: len(PROMPTS)] == fresh


def test_people_see_answers_side_by_side(paths: dict[str, Path], prompts: Path, invoke: Invoke) -> None:
    code, out, err = invoke(*arguments(paths, prompts, "--weights=math=1", "--weights=code=3,web=1"))
    assert code == 0, err
    heading = out.splitlines()[1]
    assert all(name in heading for name in ("prompt", "math 1", "code 0.75 web 0.25"))
    assert PROMPTS[1] in out
    assert "swaps proven" in out
    assert "mixture 2 of 2: code 0.75 web 0.25" in err


def answers(mixtures: list[str], prompts: list[str]) -> dict[str, Any]:
    return {
        "engine": "hf",
        "proven": False,
        "seconds": 1.0,
        "mixtures": [{"name": name, "swap_seconds": 0.1, "generate_seconds": 0.1} for name in mixtures],
        "outputs": [
            {"name": name, "prompt": prompt, "text": f"{prompt} by {name}"}
            for name in mixtures
            for prompt in prompts
        ],
    }


def shown(table: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_many_mixtures_get_a_row_each() -> None:
    text = shown(generate_table(answers([f"m{number}" for number in range(5)], ["P", "Q"])))
    rows = [line for line in text.splitlines() if " by " in line]
    assert [row.split()[-4:-1] for row in rows] == [[p, "by", f"m{n}"] for p in "PQ" for n in range(5)]
    assert "NOT proven" in text


def test_a_long_answer_is_wrapped_and_none_of_it_lost() -> None:
    result = answers(["a", "b"], ["P"])
    result["outputs"][0]["text"] = "0123456789" * 40
    text = shown(generate_table(result))
    assert sum(line.count(str(digit)) for line in text.splitlines()[3:-4] for digit in range(10)) >= 400


def test_an_answer_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\n[red]é\u202e").plain == "a\\x1b[31mb\\x07\\r\n[red]é\\u202e"


def test_a_stop_text_ends_answers(paths: dict[str, Path], prompts: Path, invoke: Invoke) -> None:
    asked = arguments(paths, prompts, "--weights=math=1", "--json")
    whole = [each["text"] for each in json.loads(invoke(*asked)[1])["outputs"]]
    stop = whole[0][4]
    cut = [each["text"] for each in json.loads(invoke(*asked, f"--stop={stop}")[1])["outputs"]]
    assert cut == [text.split(stop)[0] for text in whole]
    refused(invoke(*asked[:-1], "--stop="), 1, "--stop must be a text")


def test_prompt_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b'\xef\xbb\xbf one \r\n\r\n  \ntwo \xc3\xa9\n{"prompt": 1}')
    assert read_prompts(text) == [" one ", "two é", '{"prompt": 1}']
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"prompt": "two\\nlines", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["two\nlines", ""]
    reader, writer = os.pipe()
    os.write(writer, b"a\nb\n")
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert read_prompts(STDIN) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "holds no prompts; write one a line"),
        ("p.txt", b"\n \r\n", "holds no prompts"),
        ("p.txt", b"ok\n\xff\n", "p.txt:2 is not UTF-8"),
        ("p.jsonl", b"", 'holds no prompts; write one {"prompt": "..."} a line'),
        ("p.jsonl", b'{"prompt": "a"}\nhello', "p.jsonl:2 is not valid JSON"),
        ("p.jsonl", b'["a"]', "must be a JSON object"),
        ("p.jsonl", b'{"text": "a"}', "'prompt' must be text, but is None"),
        ("p.jsonl", b'{"prompt": 3}', "'prompt' must be text, but is 3"),
        (None, b"", "cannot read the prompts"),
    ],
)
def test_a_bad_prompt_file_is_refused(
    paths: dict[str, Path], tmp_path: Path, invoke: Invoke, starts: list[Mixture],
    name: str | None, content: bytes, said: str,
) -> None:  # fmt: skip
    file = tmp_path / (name or "none.txt")
    if name is not None:
        file.write_bytes(content)
    refused(invoke(*arguments(paths, file, "--weights=math=1")), 1, said)
    assert starts == []


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ([], 1, "one of --weights (once per mixture) and --mixtures (a file of them) must be given"),
        (["--weights=math=1", "--mixtures=m.jsonl"], 1, "but both are"),
        (["--weights=math=1", "--weights=maths=1"], 1, "no expert is called 'maths'; the experts are math"),
        (["--weights=math=0"], 1, "positive, finite sum"),
        (["--weights=math=0.5", "--no-normalize"], 1, "the base has a share of 0.5: give --base"),
        (["--weights=math=1,math=2"], 2, "--weights names 'math' twice"),
        (["--weights=math=x"], 2, "must be a number"),
        (["--weights=math=1", "--max-tokens=0"], 2, "max-tokens"),
        (["--weights=math=1", f"--max-tokens={MAX_POSITIONS}"], 1, "less than the model's length of 256"),
        (["--weights=math=1", "--max-model-len=1"], 1, "max_model_len must be at least"),
        (["--mixtures=none.jsonl"], 1, "cannot read the mixtures none.jsonl"),
        (["--weights=math=1", "--experts=more=/nowhere"], 1, "/nowhere"),
        (["--weights=math=1", "--engine=tgi"], 2, "tgi"),
    ],
)
def test_what_makes_no_sense_is_refused(
    paths: dict[str, Path], prompts: Path, invoke: Invoke, more: list[str], code: int, said: str
) -> None:
    refused(invoke(*arguments(paths, prompts, *more)), code, said)


def test_an_engine_whose_swaps_are_wrong_is_replaced_and_that_is_told(
    paths: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = HfEngine.apply

    def apply(self: HfEngine, mixture: Mixture) -> Any:
        return real(self, Mixture.one_hot(mixture.names, mixture.names[-1]))  # not what was asked for

    monkeypatch.setattr(HfEngine, "apply", apply)
    config = GenerateConfig(
        experts={name: str(paths[name]) for name in NAMES},
        prompts=prompts,
        weights=[{"math": 1}, {"code": 1}],
        max_tokens=MAX_TOKENS,
        engine="hf",
    )
    result = generate(config)
    assert result["proven"] is False
    assert "NOT proven" in shown(generate_table(result))
    texts = [each["text"] for each in result["outputs"]]
    assert texts[len(PROMPTS) :] == fresh_answers(paths, Mixture.one_hot(NAMES, "code"), "hf", tmp_path)


def test_a_mixture_whose_swap_goes_wrong_is_answered_by_a_new_engine(
    paths: dict[str, Path], prompts: Path, starts: list[Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerateConfig(
        experts={name: str(paths[name]) for name in NAMES},
        prompts=prompts,
        weights=[{"math": 1}, {"code": 1}],
        max_tokens=MAX_TOKENS,
        engine="hf",
    )
    right = generate(config)
    real, swaps = hf_engine.stream, [0]

    def stream(plan: Any, sink: Any) -> Any:
        swaps[0] += 1
        # The load, two swaps of the self-test, the first mixture, and then the second one: nothing is written.
        return None if swaps[0] == 5 else real(plan, sink)

    monkeypatch.setattr(hf_engine, "stream", stream)
    result = generate(config)
    assert len(starts) == 3
    assert swaps[0] > 5
    assert result["proven"] is True
    assert [each["text"] for each in result["outputs"]] == [each["text"] for each in right["outputs"]]


def test_a_failed_engines_log_is_kept_and_otherwise_nothing(
    paths: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    config: dict[str, Any] = {
        "experts": {name: str(paths[name]) for name in NAMES},
        "prompts": prompts,
        "weights": [{"math": 1}],
        "engine": "hf",
    }
    generate(GenerateConfig(**config, max_tokens=2))
    with pytest.raises(ConfigError):
        generate(GenerateConfig(**config, max_tokens=10**6))
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(paths: dict[str, Path], prompts: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-m", "mergemix", *arguments(paths, prompts, "--weights=math=1", "--json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while "starting hf" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        time.sleep(0.2)
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert set(json.loads(out)) == {"error"}
