"""Regressions from shares to a score: `open_surrogate(name).fit(shares, scores).predict(more)`."""

from mergemix.search.surrogates.base import Prediction, Surrogate
from mergemix.search.surrogates.factory import SURROGATES, open_surrogate

__all__ = ["SURROGATES", "Prediction", "Surrogate", "open_surrogate"]
