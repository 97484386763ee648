"""Which of a task's metrics a search can use, and what one document is then worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api import metrics

from mergemix.errors import BenchmarkError
from mergemix.evals.lm_eval_tasks.spec import LmEvalSpec, choose

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemMetric:
    """The metric and filter that give a document its score, such that the mean over documents is `name`.

    name: the metric's own where lm-eval takes the mean over documents; else of a logarithm, higher is better.
    divisor: what a document's log-likelihood is divided by; None for a plain mean.
    """

    metric: str
    filter: str
    name: str
    higher_is_better: bool
    divisor: float | None = None

    def value(self, results: Mapping[str, Mapping[str, Any]]) -> float:
        """Of one document, from its metrics by filter. Raises ValueError when the task gives none for it."""
        found = results[self.filter].get(self.metric)
        if found is None:
            raise ValueError(f"the task gives no {self.metric} for this document")
        if self.divisor is None:
            return float(found)
        loglikelihood = found[0] if isinstance(found, tuple) else found
        return float(loglikelihood) / self.divisor


def item_metric(task: Any, spec: LmEvalSpec) -> ItemMetric:
    """The task's metric and filter that the spec names, or the first that can be used.

    Divisors are those of one document and of weight 1: see `weighed`. Raises BenchmarkError for a name that the task
    does not have, and for a metric that is no mean over documents.
    """
    where = f"lm_eval:{task.task_name}"
    aggregations = task.aggregation()
    usable = {name: kind for name in aggregations if (kind := _kind(aggregations[name]))}
    if not usable:
        raise BenchmarkError(
            f"{where}: a search needs a metric that is a mean over documents, but the task has only "
            f"{', '.join(aggregations) or 'none'}; give the task another metric in a YAML of your own (metric_list)"
        )
    metric = next(iter(usable))
    if spec.metric is not None:
        metric = choose("metric", spec.metric, list(aggregations), where)
    if metric not in usable:
        raise BenchmarkError(
            f"{where}: metric must be a mean over documents, but {metric} is not, so that one document has no score; "
            f"take one of {', '.join(usable)}"
        )
    filters = [each.name for each in task._filters]
    chosen = filters[0] if spec.filter is None else choose("filter", spec.filter, filters, where)
    kind = usable[metric]
    if kind == "mean":
        flag = task.higher_is_better().get(metric)
        return ItemMetric(metric, chosen, metric, True if flag is None else bool(flag))
    name = f"-{metric}" if kind == "bits" else f"-log({metric})"
    return ItemMetric(metric, chosen, name, True, math.log(2) if kind == "bits" else 1.0)


def weighed(chosen: ItemMetric, results: Sequence[Mapping[str, Mapping[str, Any]]], where: str) -> ItemMetric:
    """The metric with the mean weight (words, bytes) of all documents in its divisor, where they have weights.

    results: of every document, from any log-likelihoods. Raises BenchmarkError when they do not hold the metric.
    """
    if chosen.divisor is None:
        return chosen
    found = [each[chosen.filter].get(chosen.metric) for each in results]
    weights = [each[1] if isinstance(each, tuple) else 1 for each in found if each is not None]
    if len(weights) < len(found) or sum(weights) <= 0:
        raise BenchmarkError(f"{where}: the task gives no {chosen.metric} for some of its documents")
    mean = sum(weights) / len(weights)
    return ItemMetric(
        chosen.metric, chosen.filter, chosen.name, chosen.higher_is_better, chosen.divisor * mean
    )


def aggregate(task: Any, results: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """What `lm_eval` reports from all documents' metrics by filter: "metric,filter", standard errors where cheap."""
    found: dict[str, float] = {}
    for filter_ in results[0]:
        values: dict[str, list[Any]] = {}
        for each in results:
            for metric, value in each[filter_].items():
                values.setdefault(metric, []).append(value)
        for metric, items in values.items():
            aggregation = task.aggregation().get(metric, metrics.mean)
            try:
                found[f"{metric},{filter_}"] = float(aggregation(items))
            except Exception as error:  # the command would end here; a search goes on with the others
                log.warning("%s: no %s: %s: %s", task.task_name, metric, type(error).__name__, error)
                continue
            if aggregation in (metrics.mean, metrics.acc_all) and len(items) > 1:
                stderr = metrics.stderr_for_metric(aggregation, bootstrap_iters=1)
                found[f"{metric}_stderr,{filter_}"] = float(stderr(items))
    return found


def _kind(aggregation: Any) -> str | None:
    if aggregation in (metrics.mean, metrics.nanmean):
        return "mean"
    if aggregation in (metrics.perplexity, metrics.weighted_perplexity):
        return "log"
    return "bits" if aggregation is metrics.bits_per_byte else None
