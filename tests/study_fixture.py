"""A small real study for tests of the run loop and of the command line: tiny Llama experts and two benchmarks."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tests.serve.tiny_models import make_family


@dataclass(frozen=True)
class TinyStudy:
    """paths: base and experts by name. bench, holdout: benchmark files."""

    paths: dict[str, Path]
    bench: list[Path]
    holdout: list[Path]

    def arguments(self, study: Path, *, budget: int = 9, engine: str = "hf", base: bool = True) -> list[str]:
        """Arguments of `mergemix run`, without the program's name."""
        experts = [f"--experts={name}={path}" for name, path in self.paths.items() if name != "base"]
        return [
            "run",
            *([f"--base={self.paths['base']}"] if base else []),
            *experts,
            *(f"--bench={path}" for path in self.bench),
            f"--study={study}",
            f"--budget={budget}",
            f"--engine={engine}",
            "--seed=7",
        ]


def make_tiny_study(directory: Path) -> TinyStudy:
    """Random models score at random, but each mixture differs: enough for everything but the quality of a search."""
    paths = make_family(directory / "models", "llama", experts=3, seed=5)
    rng = random.Random(0)
    bench = [
        write_benchmark(directory / "bench", "words", 24, rng, capability="language", metric="loglikelihood"),
        write_benchmark(
            directory / "bench", "copy", 12, rng, capability="copying", grader="contains", max_tokens=6
        ),
    ]
    holdout = [
        write_benchmark(
            directory / "holdout", "words", 20, rng, "now", capability="language", metric="loglikelihood"
        )
    ]
    return TinyStudy(paths, bench, holdout)


def write_benchmark(
    directory: Path, name: str, items: int, rng: random.Random, last: str = "then", **keys: object
) -> Path:
    """Items end in the word `last`: another one makes other items."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(items):
        word = "".join(rng.choices("abcdefgh", k=rng.randint(1, 6)))
        lines.append(
            json.dumps({"id": f"{name}-{number}", "question": f"say {word} {last}", "answer": word[0]})
        )
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    content = {"name": name, "items": f"{name}.jsonl", "prompt": "{{ question }}", **keys}
    path = directory / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items()))
    return path
