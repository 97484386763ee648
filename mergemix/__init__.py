"""MergeMix: find a data mixture by merging experts into a live inference engine."""

__version__ = "0.1.0"
