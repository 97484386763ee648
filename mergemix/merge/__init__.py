"""Merging checkpoints: plan (pure), stream (the loop), sinks (where the result goes)."""

from mergemix.merge.directory import merge_many, merge_to_directory

__all__ = ["merge_many", "merge_to_directory"]
