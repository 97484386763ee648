"""Surfaces on which searches are replayed: fitted to measured mixtures, or simulated item by item."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.children import BenchmarkError
from benchmarks.score_matrices import SURFACES
from mergemix.mixture import Mixture
from mergemix.search.base import Outcome
from mergemix.search.surrogates.gp import GaussianProcess
from mergemix.study import Study

MIXTURES = "mixtures"  # the array of a .npz file that holds shares, (candidates, K)
OPTIMUM_SAMPLES, OPTIMUM_CLIMBERS, OPTIMUM_STEPS = 8_000, 10, 50
LEAST_LEAD = 1.5  # standard deviations of the noise that the optimum is ahead of uniform in simulations

Scores = dict[str, np.ndarray]  # by capability, (n,)


@dataclass(frozen=True)
class Surface:
    """A truth that measurements scatter around.

    truth: capability scores at shares (n, K). measure: of one mixture, its measured scores and their standard errors,
    by capability. The utility is the mean over the capabilities.
    """

    names: tuple[str, ...]
    truth: Callable[[np.ndarray], Scores]
    measure: Callable[[np.ndarray, np.random.Generator], Mapping[str, tuple[float, float]]]

    def utility(self, shares: np.ndarray) -> np.ndarray:
        """(n,), without noise."""
        return objective(self.truth(shares))

    def outcome(self, mixture: Mixture, rng: np.random.Generator) -> Outcome:
        found = self.measure(np.array(mixture.weights), rng)
        stderr = float(np.sqrt(sum(error**2 for _, error in found.values()))) / len(found)
        return Outcome(float(np.mean([score for score, _ in found.values()])), stderr, found)

    def noise_sd(self, seed: int = 0, repeats: int = 200) -> float:
        """Of the utility that is measured at the uniform mixture."""
        rng = np.random.default_rng(seed)
        uniform = Mixture.uniform(self.names)
        return float(np.std([self.outcome(uniform, rng).utility or 0.0 for _ in range(repeats)]))


def objective(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The macro-average."""
    return np.mean(list(scores.values()), axis=0)


@dataclass(frozen=True)
class Scale:
    """Utilities of the optimum and of the uniform mixture: regret is measured in units of their difference."""

    best: float
    uniform: float

    @classmethod
    def of(cls, surface: Surface) -> Scale:
        uniform = np.full((1, len(surface.names)), 1 / len(surface.names))
        return cls(optimum(surface), float(surface.utility(uniform)[0]))

    @property
    def lead(self) -> float:
        return self.best - self.uniform

    def regret(self, utility: float) -> float:
        return (self.best - utility) / self.lead


def optimum(surface: Surface, seed: int = 0) -> float:
    """The highest utility on the simplex: samples of several kinds, then ever smaller moves of the best ones."""
    rng = np.random.default_rng(seed)
    k = len(surface.names)
    starts = [rng.dirichlet(np.full(k, alpha), OPTIMUM_SAMPLES // 4) for alpha in (0.1, 0.3, 1.0, 3.0)]
    shares = np.concatenate([np.eye(k), *starts])
    best = shares[np.argsort(-surface.utility(shares))[:OPTIMUM_CLIMBERS]]
    step = 0.2
    for _ in range(OPTIMUM_STEPS):
        moved = best[:, None] + step * (rng.dirichlet(np.full(k, 0.2), (len(best), 20)) - best[:, None])
        pulled = np.where(rng.random(moved.shape) < 1.5 / k, 0.0, best[:, None])
        total = pulled.sum(axis=2, keepdims=True)
        pulled = np.where(total > 0, pulled / np.where(total > 0, total, 1.0), best[:, None])
        tried = np.concatenate([best[:, None], moved, pulled], axis=1)
        utility = surface.utility(tried.reshape(-1, k)).reshape(tried.shape[:2])
        best = tried[np.arange(len(best)), utility.argmax(axis=1)]
        step *= 0.88
    return float(surface.utility(best).max())


def fitted(names: Sequence[str], shares: np.ndarray, scores: Scores) -> Surface:
    """The posterior mean of a Gaussian process for each score; noise is drawn from its residuals.

    The residuals of a whole candidate are drawn together: what its scores have in common stays. Each score is
    standardised first, so that none rules the mean.
    """
    standard = {name: (values - values.mean()) / (values.std() or 1.0) for name, values in scores.items()}
    models = {name: GaussianProcess().fit(shares, values) for name, values in standard.items()}
    # What a model misses where it was fitted is smaller than the noise: scaled to what the model holds that for.
    missed = np.stack([values - models[name].predict(shares).mean for name, values in standard.items()])
    noise = np.array([model.predict(shares[:1]).noise_sd[0] for model in models.values()])
    residuals = (missed - missed.mean(axis=1, keepdims=True)) * (noise / missed.std(axis=1))[:, None]

    def truth(at: np.ndarray) -> Scores:
        return {name: model.predict(at).mean for name, model in models.items()}

    def measure(at: np.ndarray, rng: np.random.Generator) -> Mapping[str, tuple[float, float]]:
        drawn = residuals[:, rng.integers(residuals.shape[1])]
        exact = truth(at[None])
        return {name: (float(exact[name][0] + drawn[i]), float(noise[i])) for i, name in enumerate(exact)}

    return Surface(tuple(names), truth, measure)


REGMIX_GROUPS = {
    "code": ("github", "stackexchange", "ubuntu_irc", "hackernews"),
    "science": ("arxiv", "pubmed_central", "pubmed_abstracts", "dm_mathematics"),
    "web": ("pile_cc", "wikipedia_en", "gutenberg_pg_19"),
    "law": ("freelaw", "uspto_backgrounds"),
}


def regmix(directory: Path) -> Surface:
    """All 768 small runs of RegMix (Liu et al., arXiv 2407.01492): 17 domains, 13 losses in four groups, negated.

    Raises BenchmarkError when the files are not there or not as expected.
    """
    parts: dict[str, list[np.ndarray]] = {"mixture": [], "pile_loss": []}
    header: dict[str, list[str]] = {}
    for kind, tables in parts.items():
        for split in ("train", "test"):
            header[kind], table = _table(directory / f"{split}_{kind}_1m.csv")
            tables.append(table)
    shares, losses = (np.concatenate(tables) for tables in parts.values())
    shares = shares / shares.sum(axis=1, keepdims=True)
    scores = {}
    for group, members in REGMIX_GROUPS.items():
        columns = [
            i for i, name in enumerate(header["pile_loss"]) if any(f"_{m}_val" in name for m in members)
        ]
        if len(columns) != len(members):
            raise BenchmarkError(
                f"{directory} must hold losses of {', '.join(members)}: {header['pile_loss']}"
            )
        scores[group] = -losses[:, columns].mean(axis=1)
    return fitted([name.removeprefix("train_the_pile_") for name in header["mixture"]], shares, scores)


def _table(path: Path) -> tuple[list[str], np.ndarray]:
    """(names, numbers) of a CSV without its first column, which numbers the rows."""
    try:
        with path.open(newline="") as file:
            first, *rows = csv.reader(file)
        return first[1:], np.array([row[1:] for row in rows], np.float64)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} must be a CSV file of the RegMix data: {error}") from error


def read_measured(path: Path) -> Surface:
    """A surface fitted to a .npz file: "mixtures" (n, K), and by benchmark scores (n,) or of items (n, items)."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name].astype(np.float64) for name in arrays.files}
        shares = found.pop(MIXTURES)
        scores = {name: values.reshape(len(shares), -1).mean(axis=1) for name, values in found.items()}
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"{path} must be a .npz file of scores and {MIXTURES!r}: {error}") from error
    return fitted([f"domain{k}" for k in range(shares.shape[1])], shares, scores)


def read_study(directory: Path) -> Surface:
    """A surface fitted to a study's candidates that answered all items. Raises StudyError when there is no study."""
    with Study.read(directory) as study:
        done = [c for c in study.candidates() if c.done and c.repeat == 0 and any(c.mixture.weights)]
    done = [record for record in done if not record.mixture.groups]
    if len(done) < 10:
        raise BenchmarkError(f"{directory} must hold ten candidates or more, but has {len(done)}")
    names = set.intersection(*(set(record.scores) for record in done))
    scores = {name: np.array([record.scores[name] for record in done]) for name in sorted(names)}
    return fitted(done[0].mixture.names, np.array([record.mixture.weights for record in done]), scores)


def simulated_with_a_best(k: int, seed: int) -> Surface:
    """The first of many simulated surfaces on which there is something to find.

    Where the best mixture is ahead of the uniform one by hardly more than the noise of a measurement, all
    searches find as little, and regrets in units of that lead say nothing.
    """
    for attempt in range(100):
        surface = simulated(k, 1000 * seed + attempt)
        if Scale.of(surface).lead > LEAST_LEAD * surface.noise_sd():
            return surface
    raise AssertionError("most surfaces have a best mixture")


def simulated(k: int, seed: int, items: Sequence[int] = (200, 350, 500), kind: str = "anywhere") -> Surface:
    """Right and wrong answers of mixtures of `k` domains, by the item-response model of benchmarks.score_matrices.

    The truth of a mixture is its expected share of right answers to these very items: what repeats would average
    to. What it reports as standard error also holds the choice of items, as a user's would.
    """
    shape = SURFACES[kind]
    rng = np.random.default_rng((k, seed))
    best = rng.dirichlet(np.full(k, 2.0))
    traits, topics = 12, 8
    reference = rng.dirichlet(np.ones(k), 200)
    parts = []
    for size in items:
        peak = (best + rng.dirichlet(np.full(k, 1.5))) / 2
        waves, phases = rng.normal(0, 2, (k, traits)), rng.uniform(0, 2 * np.pi, traits)
        topic = rng.integers(topics, size=size)
        loading = 0.7 * rng.normal(size=(size, traits)) + 0.7 * rng.normal(size=(topics, traits))[topic]
        difficulty = rng.normal(rng.uniform(-1, 1), 1.5, size) + 0.7 * rng.normal(size=topics)[topic]
        sharpness = np.exp(rng.normal(0, 0.3, size))
        parts.append((peak, waves, phases, loading, difficulty, sharpness))

    def ability(part: tuple[np.ndarray, ...], at: np.ndarray) -> np.ndarray:
        """(n, items)"""
        peak, waves, phases, loading = part[:4]

        def skill(x: np.ndarray) -> np.ndarray:
            return -shape.curvature * ((x - peak) ** 2).sum(axis=1)

        def features(x: np.ndarray) -> np.ndarray:
            return np.cos(x @ waves + phases) * np.sqrt(2 / traits)

        smooth = (features(at) - features(reference).mean(axis=0)) @ loading.T
        return (skill(at) - np.median(skill(reference)))[:, None] + smooth

    def chances(at: np.ndarray) -> list[np.ndarray]:
        """By benchmark, (n, items): the probability of a right answer."""
        logits = [part[5] * (ability(part, at) - part[4]) / shape.own_noise for part in parts]
        return [1 / (1 + np.exp(-np.clip(logit, -500, 500))) for logit in logits]

    def truth(at: np.ndarray) -> Scores:
        pieces = [
            [chance.mean(axis=1) for chance in chances(at[i : i + 500])] for i in range(0, len(at), 500)
        ]
        return {f"bench{b}": np.concatenate([piece[b] for piece in pieces]) for b in range(len(parts))}

    def measure(at: np.ndarray, generator: np.random.Generator) -> Mapping[str, tuple[float, float]]:
        found = {}
        for b, chance in enumerate(chances(at[None])):
            answers = (generator.random(chance.shape[1]) < chance[0]).astype(np.float64)
            found[f"bench{b}"] = (float(answers.mean()), float(answers.std(ddof=1) / np.sqrt(len(answers))))
        return found

    return Surface(tuple(f"domain{d}" for d in range(k)), truth, measure)
