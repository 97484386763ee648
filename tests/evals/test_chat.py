import datetime
import re
from pathlib import Path
from typing import Any

import pytest

from mergemix.errors import BenchmarkError
from mergemix.evals.benchmark import Benchmark, Context, load_benchmark
from mergemix.evals.chat import ChatTemplate
from mergemix.serve.engine import Generate, LogLikelihood
from mergemix.serve.tokens import RequestEncoder, load_tokenizer
from tests.evals.benchmark_files import write
from tests.serve.tiny_models import tiny_tokenizer

# As Llama 3's: BOS once, then turns.
TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ITEM = {"question": "1+1", "answer": 2}


def checkpoint(directory: Path, template: str | None = TEMPLATE, *, bos: bool = True) -> Path:
    tokenizer = tiny_tokenizer(bos=bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def load(directory: Path, root: Path | None, item: dict[str, Any] = ITEM, /, **keys: Any) -> Benchmark:
    keys = {"chat": True, "prompt": "{{ question }}", **keys}
    return load_benchmark(write(directory, [item], **keys), Context(root=root))


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_is_a_turn_of_the_user_with_one_bos(tmp_path: Path, bos: bool) -> None:
    root = checkpoint(tmp_path / "model", bos=bos)
    [request] = load(tmp_path, root, max_tokens=8).requests(0)
    assert isinstance(request, Generate)
    # The tokenizer puts BOS before a text by itself; the template has written it already.
    tokenizer = load_tokenizer(root)
    ids = RequestEncoder(tokenizer, 128).encode(request).ids
    assert tokenizer.decode(ids) == ("<s>" if bos else "") + "[user]1+1\n[assistant]"
    assert ids.count(0) == (1 if bos else 0)
    assert list(ids) == tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, return_dict=False
    )


def test_bos_is_not_added_where_the_template_writes_none(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model", TEMPLATE.removeprefix("{{ bos_token or '' }}"))
    [request] = load(tmp_path, root).requests(0)
    encoded = RequestEncoder(load_tokenizer(root), 512).encode(request)
    assert load_tokenizer(root).decode(encoded.ids) == "[user]1+1\n[assistant]"


def test_examples_are_turns_and_the_system_comes_first(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    shots = '{"question": "0+1", "answer": [1, "one"]}\n{"question": "0+2", "answer": 2}\n'
    (tmp_path / "shots.jsonl").write_text(shots)
    few_shot = {"count": 2, "items": "shots.jsonl"}
    benchmark = load(tmp_path, root, system="Add {{ question }}!", few_shot=few_shot)
    text = load_tokenizer(root).decode(benchmark.items[0].prompt)
    assert (
        text
        == "<s>[system]Add 1+1!\n[user]0+1\n[assistant]1\n[user]0+2\n[assistant]2\n[user]1+1\n[assistant]"
    )
    with pytest.raises(
        BenchmarkError, match=r"few_shot: the examples of a chat are turns.*remove 'separator'"
    ):
        load(tmp_path, root, few_shot={**few_shot, "separator": "\n"})


def test_log_likelihoods_in_a_chat_are_of_ids_after_the_turn(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "model")
    item = {"question": "which?", "choices": ["the", "abc a"], "answer": 0}
    benchmark = load(tmp_path, root, item, grader="choice")
    tokenizer = load_tokenizer(root)
    for request, choice in zip(benchmark.requests(0), item["choices"], strict=True):
        assert isinstance(request, LogLikelihood)
        assert tokenizer.decode(request.context) == "<s>[user]which?\n[assistant]"
        assert list(request.continuation) == tokenizer(choice, add_special_tokens=False)["input_ids"]
    [request] = load(tmp_path, root, metric="bits_per_byte", grader=None, delimiter=" ").requests(0)
    assert tokenizer.decode(request.continuation) == " 2"


def test_a_token_that_spans_the_end_of_the_prompt(tmp_path: Path) -> None:
    template = ChatTemplate(checkpoint(tmp_path / "model"))
    assert template.continuation_ids("t", "he ") == template.ids("he ")
    assert template.continuation_ids("1", "the") == template.ids("the")


def test_a_date_in_a_template_does_not_change_from_day_to_day(tmp_path: Path) -> None:
    today = "{{ strftime_now('%d %b %Y') }}"
    root = checkpoint(tmp_path / "model", today + TEMPLATE)
    text = load_tokenizer(root).decode(load(tmp_path, root).items[0].prompt)
    assert text.startswith("26 Jul 2024")
    assert datetime.date.today() != datetime.date(2024, 7, 26)


def test_the_chat_template_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    first = load(tmp_path, checkpoint(tmp_path / "a"))
    again = load(tmp_path, checkpoint(tmp_path / "b"))
    other = load(tmp_path, checkpoint(tmp_path / "c", TEMPLATE.replace("user", "human") + " "))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_checkpoint_that_cannot_chat(tmp_path: Path) -> None:
    with pytest.raises(
        BenchmarkError, match=r"sums.yaml: chat: true needs a checkpoint, .* but none is given"
    ):
        load(tmp_path, None)
    root = checkpoint(tmp_path / "plain", None)
    with pytest.raises(
        BenchmarkError, match=r"sums.yaml: chat: true needs a chat template, but .*plain has none"
    ):
        load(tmp_path, root)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        BenchmarkError, match=r"chat: true needs a tokenizer, but none could be loaded from .*empty"
    ):
        load(tmp_path, tmp_path / "empty")


def test_messages_that_a_template_refuses(tmp_path: Path) -> None:
    no_system = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    )
    root = checkpoint(tmp_path / "model", no_system)
    message = (
        r"items.jsonl:1: the chat template of .*model refuses these messages \(system, user\): no system role"
    )
    with pytest.raises(BenchmarkError, match=message):
        load(tmp_path, root, system="You add.")
    assert load(tmp_path, root).items


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat": "yes"}, "chat must be true or false, but is 'yes' (str)"),
        (
            {"chat": False, "system": "x"},
            "only a chat has a system message; add chat: true or remove 'system'",
        ),
        ({"delimiter": " "}, "remove 'delimiter'"),
        ({"prompt": None, "metric": "perplexity", "grader": None}, "there is no prompt; remove 'chat'"),
    ],
)
def test_keys_that_do_not_go_with_a_chat(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    root = checkpoint(tmp_path / "model")
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load(tmp_path, root, **keys)
