"""Regressions from shares to a score: `open_surrogate(name).fit(shares, scores).predict(more)`."""

from mergemix.search.surrogates.auto import Average, Stack
from mergemix.search.surrogates.base import Prediction, Surrogate, num_folds
from mergemix.search.surrogates.factory import SURROGATES, open_surrogate
from mergemix.search.surrogates.gp import GaussianProcess

__all__ = [
    "SURROGATES",
    "Average",
    "GaussianProcess",
    "Prediction",
    "Stack",
    "Surrogate",
    "num_folds",
    "open_surrogate",
]
