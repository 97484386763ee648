"""A benchmark to time evaluation with, once as our own benchmark files and once as local lm-eval tasks: the same items.

Half of the items ask for a short answer, half choose among four by log-likelihood. Like most benchmarks, all of them
begin with the same few-shot examples.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GENERATE, CHOOSE = "bench-generate", "bench-choose"
WORDS = "water is the red blue seven three plus one two cat sun was green many go and with a stone".split()  # noqa: SIM905
SHOTS, SHOT_WORDS, QUESTION_WORDS = 4, 8, 14
CHOICES, CHOICE_WORDS = 4, 3
MAX_TOKENS = 16

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
{rest}
"""
# lm-eval's vLLM backend keeps special tokens in the text unless it is told otherwise, its transformers backend never.
GENERATE_TASK = f"""doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {MAX_TOKENS}, do_sample: false, skip_special_tokens: true}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]"""
CHOOSE_TASK = """doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@dataclass(frozen=True)
class Files:
    """ours: benchmark files. tasks: a directory of lm-eval tasks, called GENERATE and CHOOSE."""

    ours: tuple[Path, Path]
    tasks: Path


def write_files(directory: Path, count: int, seed: int = 0) -> Files:
    """`count` items in all, below `directory`."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words))

    shots = "".join(f"question: {text(SHOT_WORDS)}\nanswer: {text(CHOICE_WORDS)}\n\n" for _ in range(SHOTS))

    def prompts(number: int) -> Iterator[str]:
        return (f"{shots}question: {text(QUESTION_WORDS)}\nanswer:" for _ in range(number))

    generate: list[dict[str, object]] = [
        {"prompt": prompt, "answer": text(1)} for prompt in prompts(count - count // 2)
    ]
    choose: list[dict[str, object]] = [
        {
            "prompt": prompt,
            "choices": [text(CHOICE_WORDS) + f" {n}" for n in range(CHOICES)],
            "answer": rng.randrange(CHOICES),
        }
        for prompt in prompts(count // 2)
    ]
    tasks = directory / "tasks"
    tasks.mkdir(parents=True)
    files = []
    for name, items, kind, rest, grader in (
        (GENERATE, generate, "generate_until", GENERATE_TASK, "grader: exact"),
        (CHOOSE, choose, "multiple_choice", CHOOSE_TASK, "grader: choice"),
    ):
        lines = directory / f"{name}.jsonl"
        lines.write_text("".join(json.dumps({"id": n, **item}) + "\n" for n, item in enumerate(items)))
        (tasks / f"{name}.yaml").write_text(TASK.format(name=name, items=lines, kind=kind, rest=rest))
        ours = f'name: {name}\nitems: {lines.name}\nprompt: "{{{{ prompt }}}}"\n{grader}\n'
        if name == GENERATE:
            ours += f'stop: ["\\n"]\nmax_tokens: {MAX_TOKENS}\n'
        files.append(directory / f"{name}.yaml")
        files[-1].write_text(ours)
    return Files((files[0], files[1]), tasks)
