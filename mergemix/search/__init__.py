"""Searches for the best mixture: ask/tell, nothing else known of the world."""

from mergemix.search.base import Search
from mergemix.search.factory import SEARCHES, open_search
from mergemix.search.layers import layer_groups
from mergemix.search.simplex import snap, start_points

__all__ = ["SEARCHES", "Search", "layer_groups", "open_search", "snap", "start_points"]
