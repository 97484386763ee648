"""Score matrices that races are replayed on: recorded by a study, read from a file, or simulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.children import BenchmarkError
from mergemix.study import Study

Matrix = dict[str, np.ndarray]  # by benchmark: scores of all candidates, shape (candidates, items)


@dataclass(frozen=True)
class Surface:
    """How simulated candidates score.

    near_best: share of the candidates that lie near the best mixture, as a search's later ones do, instead of
    anywhere. own_noise: how much of an answer is the candidate's own, which not even a similar mixture has (the
    scale of a logistic variable; the items' difficulties have a standard deviation of 1.7). curvature: how fast
    skills fall with the squared distance from a benchmark's best mixture.
    """

    near_best: float
    own_noise: float = 0.5
    curvature: float = 4.0


SURFACES = {
    "anywhere": Surface(near_best=0.0),
    "half near the best": Surface(near_best=0.5),
    "anywhere, flat": Surface(near_best=0.0, curvature=2.0),
    "anywhere, noisy": Surface(near_best=0.0, own_noise=1.0),
}
DOMAINS, TOPICS, TRAITS = 4, 8, 12


def simulate(surface: Surface, num_candidates: int, sizes: Sequence[int], rng: np.random.Generator) -> Matrix:
    """Right and wrong answers of mixtures, by an item-response model.

    A candidate's skill at a benchmark is a smooth function of its mixture. Items differ in difficulty and in how
    sharply they tell skills apart; those of a topic are hard together, and gain together from smooth random features
    of the mixture, so that similar mixtures get the same items right. The rest is the candidate's own luck.
    """
    shares = rng.dirichlet(np.ones(DOMAINS), num_candidates)
    shares[:DOMAINS], shares[DOMAINS] = np.eye(DOMAINS), 1 / DOMAINS  # the start points of every search
    best = rng.dirichlet(np.full(DOMAINS, 2.0))
    near = round(surface.near_best * (num_candidates - DOMAINS - 1))
    shares[num_candidates - near :] = rng.dirichlet(25 * best + 0.3, near)
    matrix = {}
    for number, size in enumerate(sizes):
        peak = (best + rng.dirichlet(np.full(DOMAINS, 1.5))) / 2
        skill = -surface.curvature * ((shares - peak) ** 2).sum(axis=1)
        waves = shares @ rng.normal(0, 2, (DOMAINS, TRAITS)) + rng.uniform(0, 2 * np.pi, TRAITS)
        features = np.cos(waves) * np.sqrt(2 / TRAITS)
        topic = rng.integers(TOPICS, size=size)
        traits = 0.7 * rng.normal(size=(size, TRAITS)) + 0.7 * rng.normal(size=(TOPICS, TRAITS))[topic]
        difficulty = rng.normal(rng.uniform(-1, 1), 1.5, size) + 0.7 * rng.normal(size=TOPICS)[topic]
        sharpness = np.exp(rng.normal(0, 0.3, size))
        ability = (skill - np.median(skill))[:, None] + (features - features.mean(axis=0)) @ traits.T
        luck = surface.own_noise * rng.logistic(size=(num_candidates, size))
        matrix[f"bench{number}"] = (sharpness * (ability - difficulty) + luck > 0).astype(np.float64)
    return matrix


def read_matrix(path: Path) -> Matrix:
    """{benchmark: [[score, ...] of each candidate, ...]} in a .json file, or arrays of that shape in a .npz file.

    Raises BenchmarkError when it is neither, or its benchmarks have not the same number of candidates.
    """
    try:
        if path.suffix == ".json":
            found = {name: np.array(rows, np.float64) for name, rows in json.loads(path.read_text()).items()}
        else:
            with np.load(path) as arrays:
                found = {name: arrays[name].astype(np.float64) for name in arrays.files}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BenchmarkError(f"{path} must be a .json or .npz file of score matrices: {error}") from error
    return _checked(found, str(path))


def read_study(directory: Path) -> Matrix:
    """Scores of the candidates that answered all items (errors are NaN); not of those that were stopped early.

    The base and repeats are left out too, as they are not raced. Raises BenchmarkError when too few are left, and
    StudyError when there is no study.
    """
    study = Study.read(directory)
    try:
        done = [c for c in study.candidates() if c.done and c.repeat == 0 and any(c.mixture.weights)]
        names = sorted({name for record in done for name in record.scores})
        found = study.score_matrices([record.id for record in done])
        matrix = {name: found[name] for name in names}
    finally:
        study.close()
    return _checked(matrix, str(directory))


def _checked(matrix: Matrix, source: str) -> Matrix:
    shapes = {name: scores.shape for name, scores in matrix.items()}
    candidates = {shape[0] if shape else 0 for shape in shapes.values()}
    if any(len(shape) != 2 for shape in shapes.values()) or len(candidates) != 1 or min(candidates) < 3:
        raise BenchmarkError(
            f"{source} must hold scores of the same three candidates or more on every benchmark, but has {shapes}"
        )
    return matrix
