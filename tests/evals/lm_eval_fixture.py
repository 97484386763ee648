"""Local lm-eval tasks and small checkpoints with a chat template, for the tests of lm-eval benchmarks."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

TASKS = Path(__file__).parent / "lm_eval_tasks"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def write_tasks(directory: Path) -> Path:
    """The tasks with the paths of their data, which lm-eval takes from the current directory."""
    directory.mkdir(parents=True)
    for file in TASKS.iterdir():
        if file.is_file():
            (directory / file.name).write_text(file.read_text().replace("DIRECTORY", str(directory)))
    return directory


def give_chat_template(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(checkpoint)


def keep_data_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of the files is not left in the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", directory)
    datasets.disable_progress_bars()
