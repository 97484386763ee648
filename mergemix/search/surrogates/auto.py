"""`auto`: the surrogates together, each with the weight that predicts left-out points best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from mergemix.search.surrogates.base import Data, Prediction, Surrogate, checked
from mergemix.search.surrogates.gp import GaussianProcess
from mergemix.search.surrogates.loglinear import LogLinear
from mergemix.search.surrogates.scheffe import Scheffe
from mergemix.search.surrogates.trees import BaggedTrees

MEMBERS: tuple[type[Surrogate], ...] = (BaggedTrees, GaussianProcess, LogLinear, Scheffe)
LEAST_WEIGHT = 0.05  # below it a member is left out


class Stack(Surrogate):
    """A weighted mean of surrogates, with weights >= 0 of sum 1 that minimise the squared error of left-out points.

    Stacked regressions: Wolpert, Neural Networks 1992; Breiman, Machine Learning 1996. After `fit`: `members`, the
    fitted ones by name, also those of weight 0; `weights`, by name. Both are empty where a simpler model stands in.
    """

    name = "auto"
    title = "surrogates stacked by cross-validation"

    def __init__(self) -> None:
        super().__init__()
        self.members: dict[str, Surrogate] = {}
        self.weights: dict[str, float] = {}

    @classmethod
    def of(
        cls,
        members: Mapping[str, Surrogate],
        shares: np.ndarray,
        scores: np.ndarray,
        noise_var: np.ndarray | None = None,
        *,
        seed: int = 0,
    ) -> Self:
        """Of members that were all fitted to these points with this seed, so that their folds are the same."""
        data = Data(*checked(shares, scores, noise_var))
        stack = cls()
        stack._combine(members, data)
        stack._calibrate(stack._cross_validated(data, seed), data, stack._num_chosen())
        return stack

    def needs(self, k: int) -> int:
        return 6

    def _fit(self, data: Data, seed: int) -> None:
        num_points, k = data.shares.shape
        opened = [member() for member in MEMBERS]
        fitted = {
            member.name: member.fit(*data, seed=seed) for member in opened if num_points >= member.needs(k)
        }
        self._combine(fitted, data)

    def _combine(self, members: Mapping[str, Surrogate], data: Data) -> None:
        self.members = dict(members)
        predicted = np.stack([member.held_out.mean for member in members.values()], axis=1)
        self.weights = dict(zip(members, stack_weights(predicted, data).tolist(), strict=True))

    def _num_chosen(self) -> int:
        return sum(weight > 0 for weight in self.weights.values())

    def _used(self) -> list[tuple[float, Surrogate]]:
        return [(weight, self.members[name]) for name, weight in self.weights.items() if weight > 0]

    def _predict(self, shares: np.ndarray) -> Prediction:
        return _mixed([(weight, member.predict(shares)) for weight, member in self._used()])

    def _mean(self, shares: np.ndarray) -> np.ndarray:
        return np.sum([weight * member.mean(shares) for weight, member in self._used()], axis=0)

    def _cross_validated(self, data: Data, seed: int) -> Prediction:
        if self._stand_in is not None:
            return super()._cross_validated(data, seed)
        return _mixed([(weight, member.held_out) for weight, member in self._used()])

    def _freedom(self) -> float:
        return float(sum(weight * member.held_out.freedom for weight, member in self._used()))


class Average(Surrogate):
    """The mean of several scores, each with a surrogate of its own: easier to predict than the mean by itself.

    Every score depends on few domains; their mean on all. members: fitted to the same points with the same seed.
    """

    name = "columns"
    title = "the mean of the columns' predictions"

    def __init__(self, members: Sequence[Surrogate] = ()) -> None:
        super().__init__()
        self.members = tuple(members)

    @classmethod
    def of(cls, members: Sequence[Surrogate], shares: np.ndarray, scores: np.ndarray) -> Self:
        """members: of the columns, fitted at shares (n, K). scores: (n,), the means of the columns' scores."""
        average = cls(members)
        held_out = _averaged([member.held_out for member in members])
        average._calibrate(held_out, Data(*checked(shares, scores, None)))
        return average

    def needs(self, k: int) -> int:
        return 1

    def _fit(self, data: Data, seed: int) -> None:
        raise NotImplementedError("made of fitted surrogates: Average.of")

    def _predict(self, shares: np.ndarray) -> Prediction:
        return _averaged([member.predict(shares) for member in self.members])

    def _mean(self, shares: np.ndarray) -> np.ndarray:
        return np.mean([member.mean(shares) for member in self.members], axis=0)

    def _freedom(self) -> float:
        return float(np.mean([member.held_out.freedom for member in self.members]))


def _averaged(parts: Sequence[Prediction]) -> Prediction:
    """As if the columns' errors were independent; how far they are not is seen on the points left out."""
    count = len(parts)
    return Prediction(
        np.mean([part.mean for part in parts], axis=0),
        np.sqrt(np.sum([part.sd**2 for part in parts], axis=0)) / count,
        np.sqrt(np.sum([part.noise_sd**2 for part in parts], axis=0)) / count,
        float(np.mean([part.freedom for part in parts])),
    )


def _mixed(parts: Sequence[tuple[float, Prediction]]) -> Prediction:
    """Of the weighted mean. Where members disagree, the surface is less certain; their errors are taken as one."""
    weights = np.array([weight for weight, _ in parts])[:, None]
    means = np.array([part.mean for _, part in parts])
    mean = (weights * means).sum(axis=0)
    within = (weights * np.array([part.sd for _, part in parts])).sum(axis=0)
    between = (weights * (means - mean) ** 2).sum(axis=0)
    noise_sd = (weights * np.array([part.noise_sd for _, part in parts])).sum(axis=0)
    freedom = sum(weight * part.freedom for weight, part in parts)
    return Prediction(mean, np.sqrt(within**2 + between), noise_sd, float(freedom))


def stack_weights(predicted: np.ndarray, data: Data) -> np.ndarray:
    """(members,), >= 0, sum 1, of the least squared error of `predicted` (n, members)."""
    from scipy.optimize import nnls

    errors = predicted - data.scores[:, None]
    if data.noise_var is not None:
        errors = errors / np.sqrt(data.noise_var + np.median(errors**2) + 1e-300)[:, None]
    errors = errors / (np.sqrt(np.mean(errors**2)) or 1.0)
    # With weights of sum 1 the error of the mean is the mean of the errors; the last row makes the sum 1.
    strong = 1e3 * np.sqrt(len(errors))
    design = np.concatenate([errors, np.full((1, errors.shape[1]), strong)])
    weights, _ = nnls(design, np.append(np.zeros(len(errors)), strong))
    weights[weights < LEAST_WEIGHT * weights.sum()] = 0.0
    return weights / weights.sum()
