"""Do proxies rank mixtures as training does: rank correlations, their intervals and ceilings, what a choice costs.

Higher is better in all scores. n references (mixtures) were trained, each with up to s seeds; NaN: that seed was not.

Intervals are bootstrapped over the references: percentiles, corrected for the bias of the median (Efron & Tibshirani,
An Introduction to the Bootstrap, 1993, section 14.3), because a reference that is drawn twice is a tie. Where the
caller gives the scores under other draws of items, what those move a correlation by is added to each draw, without
their median effect: items drawn again are noisier than the items, and would make every correlation look lower.
An interval is about the correlation that other references of this kind, and as many other items, would show. In
simulated studies (250 each) of 6 to 32 references with normal scores and correlations of 0.48 to 0.98, 95% intervals
held the truth in 91 to 100% for Spearman and 94 to 100% for Kendall; with simulated answers to items in 98 to 99%, and
in 91 to 97% where the items were left out. Complete agreement has no spread to resample: its lower limit is
`perfect_order_limit`, without which intervals of 6 references miss in 11% (rho 0.89) to 41% (0.98) of cases.

The ceiling says what of a missing correlation is the training's own: runs of the same mixture with other seeds do not
rank the same either. It knows nothing of what all seeds share, such as the items that were asked.
"""

from mergemix.rank_stats.agreement import MAX_WIDTH, rank_agreement, regret, top_overlap
from mergemix.rank_stats.bootstrap import RESAMPLES, drawn_means
from mergemix.rank_stats.correlations import kendall, perfect_order_limit, spearman
from mergemix.rank_stats.reliability import MIN_REFERENCES, ceiling, effective_seeds, spearman_brown

__all__ = [
    "MAX_WIDTH",
    "MIN_REFERENCES",
    "RESAMPLES",
    "ceiling",
    "drawn_means",
    "effective_seeds",
    "kendall",
    "perfect_order_limit",
    "rank_agreement",
    "regret",
    "spearman",
    "spearman_brown",
    "top_overlap",
]
