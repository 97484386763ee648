"""Made-up evaluations for the study's tests, and a child process that keeps writing them."""

import sys
from dataclasses import dataclass
from pathlib import Path

from mergemix.mixture import Mixture
from mergemix.study import Study

NAMES = ("math", "code")
IDENTITY = {"search": "cma", "seed": 0, "benchmarks": {"arith": "ab12"}, "experts": ["1f", "2e"]}
INFO = {"mergemix": "0.1.0", "budget": 40}


@dataclass(frozen=True)
class Answer:
    benchmark: str
    item: str
    score: float | None
    text: str | None = None
    error: str | None = None
    cut: int = 0
    unfinished: int = 0


def mixture(n: int) -> Mixture:
    return Mixture(NAMES, (n / 10_000, (10_000 - n) / 10_000))


def answers(n: int, items: int = 3) -> list[Answer]:
    """`items` answers to each of two benchmarks, different for every n."""
    return [
        Answer(benchmark, f"{benchmark}-{i}", (n * 7 + i * 3) % 11 / 10, f"answer {n}.{i}")
        for benchmark in ("zeta", "arith")  # not in alphabetical order: the suite's order must survive
        for i in range(items)
    ]


def open_study(directory: Path) -> Study:
    return Study.open(directory, IDENTITY, INFO)


def record(study: Study, n: int, items: int = 3) -> None:
    study.record(mixture(n), origin="cma", results=answers(n, items), timings={"swap": 0.1})


def write_forever(directory: Path, items: int) -> None:
    """Record candidates from where the study ends, and print the number of each once it is committed."""
    with open_study(directory) as study:
        n = len(study.candidates())
        print("open", flush=True)
        while n < 10_000:
            record(study, n, items)
            print(n, flush=True)
            n += 1


if __name__ == "__main__":
    write_forever(Path(sys.argv[1]), int(sys.argv[2]))
