"""Searches for the best mixture: ask/tell, nothing else known of the world."""

from mergemix.search.base import Outcome, Search
from mergemix.search.factory import SEARCHES, open_search
from mergemix.search.layers import layer_groups
from mergemix.search.simplex import snap, start_points
from mergemix.search.tree import load_tree

__all__ = [
    "SEARCHES",
    "Outcome",
    "Search",
    "layer_groups",
    "load_tree",
    "open_search",
    "snap",
    "start_points",
]
